"""The quickstart with an autoregressive objective: same model size, same text.

  python -m mdm_jax.main --config=configs/autoregressive.py

Stages, updates, rows and the optimizer are those of `configs/quickstart.py`, so
that its bits per byte can be compared with the masked model's: they are exact
here and an upper bound there. docs/autoregressive.md says more.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to about a minute."""
  config = config_lib.default_config()
  config.name = "autoregressive"
  config.data.update(corpus="sotu", batch_size=8)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=2, embed_dim=192, num_heads=3)
  config.model.update(qkv_bias=True, rope_theta=100.0)
  config.objective.name = "autoregressive"
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=64,
      updates=300,
    ),
    config_lib.stage(
      name="II structural",
      unit="pairs",
      min_words=15,
      max_words=100,
      easiest=2 / 3,
      length=128,
      updates=250,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=128,
      updates=2450,
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
  config.sample.update(temperature=0.6, top_k=20, top_p=0.85)
  return config_lib.apply_arg(config, arg)
