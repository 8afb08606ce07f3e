"""The quickstart with block diffusion: same model, text and mask rates.

  python -m mdm_jax.main --config=configs/block.py

Blocks of 16 tokens follow each other from left to right, and are drawn one
after the other with the keys and values of those before kept. With
`--config.objective.block_length=1` it is autoregressive, and with 128, the
length of a row, the quickstart itself. docs/blocks.md says more.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to about a minute."""
  config = config_lib.default_config()
  config.name = "block"
  config.data.update(corpus="sotu", batch_size=8)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=2, embed_dim=192, num_heads=3)
  config.model.update(qkv_bias=True, rope_theta=100.0)
  config.objective.name = "block"
  config.objective.block_length = 16
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=64,
      updates=300,
      mask_rate=(0.75, 0.90),
      rehearsal=0.5,
      lr_factor=1.0,
    ),
    config_lib.stage(
      name="II structural",
      unit="pairs",
      min_words=15,
      max_words=100,
      easiest=2 / 3,
      length=128,
      updates=250,
      mask_rate=(0.40, 0.60),
      rehearsal=0.5,
      lr_factor=1.0,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=128,
      updates=2450,
      mask_rate=(0.05, 0.20),
      rehearsal=0.8,
      lr_factor=1.0,
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
    num_steps=8,  # of a block
    order="random",
    temperature=0.9,
    temperature_range=None,  # the recipe's is 0.3 to 0.8
    top_k=None,
    top_p=0.95,
  )
  return config_lib.apply_arg(config, arg)
