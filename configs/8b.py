"""An 8B denoiser in the shape of LLaMA 3, for text that is read once.

  python -m mdm_jax.main --config=configs/8b.py

The architecture is that of arXiv 2407.21783, table 3, with bidirectional
attention; all else is `configs/large.py` with longer rows. An update has 8
microbatches, and only the blocks' inputs are kept for the backward pass, so
that it fits 16 GiB per device on a mesh of 64 x 4:

  python -m mdm_jax.plan --config=configs/8b.py --mesh=64x4 --device=v5e

It was planned and compiled, never trained.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to a CPU and about a minute."""
  config = config_lib.default_config()
  config.name = "8b"
  config.data.update(corpus="text:corpus/*.jsonl", batch_size=64)
  # Of so much text, a thousandth is enough to measure.
  config.data.update(eval_fraction=0.001, test_fraction=0.001)
  config.tokenizer.vocab_size = 128_000
  config.model.update(
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14_336,
    tie_embeddings=False,
    rope_theta=500_000.0,
    # Keeps only the blocks' inputs, and computes the rest again.
    remat="full",
  )
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=128,
      updates=4_000,
      mask_rate=(0.75, 0.90),
      rehearsal=0.5,
    ),
    config_lib.stage(
      name="II structural",
      unit="pairs",
      min_words=15,
      max_words=100,
      easiest=2 / 3,
      length=256,
      updates=8_000,
      mask_rate=(0.40, 0.60),
      rehearsal=0.5,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=4096,
      updates=100_000,
      mask_rate=(0.05, 0.20),
      rehearsal=0.5,
    ),
  )
  config.optimizer.update(
    learning_rate=2e-4,
    warmup_steps=2_000,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    accumulation=8,
  )
  config.train.checkpoint_every = 2_000
  config.eval.update(every=2_000, rows=512, final_rows=4096)
  config.sample.update(num_steps=25, temperature=0.6, top_k=20, top_p=0.85)
  return config_lib.apply_arg(config, arg)
