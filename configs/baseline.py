"""The guide's "current" column: 12 layers, 768 wide, length 512.

  python -m mdm_jax.main --config=configs/baseline.py

It follows the guide exactly: there is no rehearsal, so half of all mask rates
are never trained, and the plan warns about it. To train a good model, start
from `configs/recommended.py`.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to a CPU and about a minute."""
  config = config_lib.default_config()
  config.name = "baseline"
  config.data.update(corpus="sotu", batch_size=16)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=12, embed_dim=768, num_heads=12, dropout=0.1)
  config.objective.update(weighting="masked_ce", label_smoothing=0.0)
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=64,
      epochs=50,
      mask_rate=(0.75, 0.90),
      lr_factor=1.0,
    ),
    config_lib.stage(
      name="II structural",
      unit="pairs",
      min_words=15,
      max_words=100,
      easiest=2 / 3,
      length=128,
      epochs=100,
      mask_rate=(0.40, 0.60),
      lr_factor=0.8,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=512,
      epochs=150,
      mask_rate=(0.10, 0.30),
      lr_factor=0.6,
    ),
  )
  config.optimizer.update(
    learning_rate=2e-4,
    warmup_steps=1000,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    clip_norm=1.0,
    accumulation=1,
    b2=0.95,
  )
  config.sample.update(
    num_steps=20,
    temperature=0.8,
    temperature_range=(0.3, 0.8),
    top_k=50,
    top_p=0.9,
  )
  return config_lib.apply_arg(config, arg)
