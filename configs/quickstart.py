"""The recipe scaled down to two CPU cores and ten minutes, on real text.

python -m mdm_jax.main --config=configs/quickstart.py
"""

from mdm_jax.core import config as config_lib


def get_config(arg: str = ""):
  """`:quick` scales down further, to about a minute."""
  config = config_lib.default_config()
  config.name = "quickstart"
  config.data.update(corpus="sotu", batch_size=8)
  config.tokenizer.vocab_size = 4096
  config.model.update(num_layers=4, embed_dim=256, num_heads=4)
  config.objective.label_smoothing = 0.0
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=64,
      updates=600,
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
      updates=600,
      mask_rate=(0.40, 0.60),
      rehearsal=0.5,
      lr_factor=0.8,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=128,
      updates=1800,
      mask_rate=(0.05, 0.20),
      rehearsal=0.8,
      lr_factor=0.8,
    ),
  )
  config.optimizer.update(
    learning_rate=2e-3, warmup_steps=100, min_lr_ratio=0.05, accumulation=2
  )
  config.optimizer.update(weight_decay=0.01, ema_decay=0.995)
  config.eval.update(every=600, rows=64, final_rows=256)
  config.sample.update(num_steps=25, temperature=0.6, top_k=20, top_p=0.85)
  return config_lib.apply_arg(config, arg)
