"""The guide's recommended recipe: 12 layers, 768 wide, length 512.

  python -m mdm_jax.main --config=configs/recommended.py

Beside the guide's values, a share of every batch is masked at any rate
(`rehearsal`), so that the denoiser also learns the states that sampling starts
from; see docs/objective.md.
"""

from mdm_jax.core import config as config_lib


def get_config(arg: str = ""):
  """`:quick` scales down to a CPU and about a minute."""
  config = config_lib.default_config()
  config.name = "recommended"
  config.data.update(corpus="sotu", batch_size=8)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=12, embed_dim=768, num_heads=12, dropout=0.1)
  config.model.remat = "dots"
  config.objective.update(weighting="masked_ce", label_smoothing=0.1)
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=64,
      epochs=75,
      mask_rate=(0.75, 0.90),
      rehearsal=0.25,
      lr_factor=1.0,
    ),
    config_lib.stage(
      name="II structural",
      unit="pairs",
      min_words=15,
      max_words=100,
      easiest=2 / 3,
      length=128,
      epochs=150,
      mask_rate=(0.40, 0.60),
      rehearsal=0.25,
      lr_factor=0.8,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=512,
      epochs=300,
      mask_rate=(0.05, 0.20),
      rehearsal=0.25,
      lr_factor=0.5,
    ),
  )
  config.optimizer.update(
    learning_rate=1e-4,
    warmup_steps=1500,
    min_lr_ratio=0.05,
    weight_decay=0.01,
    clip_norm=1.0,
    accumulation=2,
  )
  config.sample.update(
    num_steps=25,
    temperature=0.6,
    temperature_range=(0.3, 0.8),
    top_k=20,
    top_p=0.85,
  )
  return config_lib.apply_arg(config, arg)
