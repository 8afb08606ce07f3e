"""Infilling: spans of text are hidden, and both sides kept, on two cores.

  python -m mdm_jax.main --config=configs/infill.py \\
    --config.init_from=runs/quickstart

It goes on from the quickstart's model, whose size and tokenizer it has. Of half
the texts, the hidden spans are filled up with blanks, so that the model learns
how long they are. Then

  python -m mdm_jax.main --mode=infill --workdir=runs/infill

fills holes in test text whose lengths are told and not told, and

  python -m mdm_jax.main --mode=sample --workdir=runs/infill \\
    --prompt="The [MASK:1-8] of the union"

any other: see docs/finetuning.md.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to seconds."""
  config = config_lib.default_config()
  config.name = "infill"
  config.data.update(corpus="infill:sotu", batch_size=8)
  # Four holes a row: the loss is of these tokens alone.
  config.data.update(holes=4, hole_length=8, untold_holes=0.5)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=2, embed_dim=192, num_heads=3)
  config.model.update(qkv_bias=True, rope_theta=100.0)
  config.stages = (
    config_lib.stage(
      name="holes",
      unit="paragraphs",
      length=128,
      updates=1200,
    ),
  )
  config.optimizer.update(
    learning_rate=1e-3,
    warmup_steps=50,
    min_lr_ratio=0.05,
    weight_decay=0.01,
    ema_decay=0.99,
  )
  config.train.checkpoint_every = 400
  config.eval.update(every=400, rows=32, final_rows=128, samples=200)
  # Holes are short: one token per step, the most certain first.
  config.sample.update(
    num_steps=32,
    order="confidence",
    temperature=0.3,
    temperature_range=None,
    top_k=None,
    top_p=None,
  )
  return config_lib.apply_arg(config, arg)
