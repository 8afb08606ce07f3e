"""The plain masked diffusion model of the papers: one stage, all mask rates.

  python -m mdm_jax.main --config=configs/mdlm.py

No curriculum: running text, the mask rate of each row from t ~ U(0, 1) by the
linear schedule (alpha = 1 - t, which MDLM calls log-linear), the loss weighted
as in the likelihood bound, samples at T = 1 in random order. By default it has
the model, the text and the number of updates of `configs/quickstart.py`, so
that the two can be compared.

  mdlm.py:paper   the size and training of MDLM (Sahoo et al. 2024, arXiv
                  2406.07524): 12 layers x 768, length 1024, 512 rows per update
  mdlm.py:quick   either of them on a CPU in about a minute

The block is this library's (RMSNorm, SwiGLU), not the papers' DiT.
`:paper` needs a text of your own in `data.corpus`; it was lowered, not trained.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; takes `:paper` and `:quick`."""
  config = config_lib.default_config()
  config.name = "mdlm"
  config.data.update(corpus="sotu", batch_size=8)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=2, embed_dim=192, num_heads=3)
  config.model.update(qkv_bias=True, rope_theta=100.0)
  config.objective.weighting = "nelbo"
  config.noise.schedule = "linear"
  config.stages = (
    config_lib.stage(
      name="train",
      unit="paragraphs",
      length=128,
      updates=3000,
      mask_rate=None,  # by the noise schedule
    ),
  )
  config.optimizer.update(
    learning_rate=3e-3,
    warmup_steps=80,
    min_lr_ratio=0.05,
    weight_decay=0.01,
    ema_decay=0.99,
  )
  config.train.checkpoint_every = 600
  config.eval.update(every=600, rows=32, final_rows=128)
  config.sample.update(
    num_steps=32,
    order="random",
    temperature=1.0,
    temperature_range=None,
    top_k=None,
    top_p=None,
  )
  if "paper" in arg.split(","):
    _as_in_the_paper(config)
  return config_lib.apply_arg(config, arg, "paper")


def _as_in_the_paper(config):
  config.name += "_paper"
  config.data.update(corpus="text:corpus/*.jsonl", batch_size=512)
  # Of so much text, a thousandth is enough to measure.
  config.data.update(eval_fraction=0.001, test_fraction=0.001)
  config.tokenizer.vocab_size = 50_000
  config.model.update(
    num_layers=12,
    embed_dim=768,
    num_heads=12,
    dropout=0.1,
    qk_norm=False,
    qkv_bias=False,
    rope_theta=10_000.0,
    tie_embeddings=False,
  )
  config.stages[0].update(length=1024, updates=1_000_000)
  config.optimizer.update(
    learning_rate=3e-4,
    warmup_steps=2500,
    min_lr_ratio=1.0,  # constant after the warm-up
    weight_decay=0.0,
    clip_norm=1.0,
    b2=0.999,
    ema_decay=0.9999,
  )
  config.train.update(log_every=100, checkpoint_every=5_000)
  config.eval.update(every=10_000, rows=512, final_rows=None)
  config.sample.num_steps = 1024
