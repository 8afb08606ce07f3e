"""The guide's recommended recipe: 12 layers, 768 wide, length 512.

  python -m mdm_jax.main --config=configs/recommended.py

One thing is added to the guide's values: a share of every batch draws its mask
rate from all of (0, 1) (`rehearsal`), so that the denoiser also learns the
heavily masked states that sampling starts from. Words after a colon, separated
by commas, choose something else:

  recommended.py:strict       the guide's values and nothing else: no rehearsal
  recommended.py:high         the baseline with the high priorities changed
  recommended.py:high,medium  and the medium ones, or any of high, medium, low
  recommended.py:quick        any of these on a CPU in about a minute

See docs/recipe.md.
"""

from ml_collections.config_flags import config_path

from mdm_jax import config as config_lib
from mdm_jax.core.errors import UserError

PRIORITIES = ("high", "medium", "low")

# The baseline's values of the fields below, by the priority that the guide
# gives to changing them. To those under `full` it gives none: only the whole
# recipe changes them.
BASELINE = {
  "high": {
    "stages[2].epochs": 150.0,
    "objective.label_smoothing": 0.0,
    "sample.temperature": 0.8,
    "optimizer.learning_rate": 2e-4,
  },
  "medium": {
    "data.batch_size": 16,
    "stages[2].mask_rate": (0.10, 0.30),
    "optimizer.accumulation": 1,
    "optimizer.warmup_steps": 1000,
  },
  "low": {
    "sample.top_k": 50,
    "sample.top_p": 0.9,
    "optimizer.min_lr_ratio": 0.1,
    "sample.num_steps": 20,
  },
  "full": {
    "stages[0].epochs": 50.0,
    "stages[1].epochs": 100.0,
    "stages[2].lr_factor": 0.6,
    "optimizer.weight_decay": 0.1,
  },
}


def get_config(arg: str = ""):
  """Returns the config; takes `:quick`, `:strict` or `:high,medium,low`."""
  config = config_lib.default_config()
  config.name = "recommended"
  config.data.update(corpus="sotu", batch_size=8)
  config.tokenizer.vocab_size = 8192
  config.model.update(num_layers=12, embed_dim=768, num_heads=12, dropout=0.1)
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
      # The least that was tried, and enough (docs/results.md).
      rehearsal=0.1,
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
      rehearsal=0.1,
      lr_factor=0.8,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=512,
      epochs=300,
      mask_rate=(0.05, 0.20),
      rehearsal=0.1,
      lr_factor=0.5,
    ),
  )
  config.optimizer.update(
    learning_rate=1e-4,
    warmup_steps=1500,
    min_lr_ratio=0.05,
    weight_decay=0.01,
    clip_norm=1.0,
    b2=0.95,
    # 8 x 2 rows: the baseline's 16 per update.
    accumulation=2,
  )
  config.sample.update(
    num_steps=25,
    temperature=0.6,
    temperature_range=(0.3, 0.8),
    top_k=20,
    top_p=0.85,
  )
  words = arg.split(",")
  changed = [priority for priority in PRIORITIES if priority in words]
  if changed and "strict" in words:
    raise UserError(
      f"config argument {arg!r}: strict is the whole recipe and"
      f" {changed[0]} a part of it; give one of the two"
    )
  if changed:
    _undo_all_but(config, changed)
    config.name += "_" + "_".join(changed)
  if "strict" in words:
    _leave_out_rehearsal(config)
    config.name += "_strict"
  return config_lib.apply_arg(config, arg, "strict", *PRIORITIES)


def _undo_all_but(config, changed: list[str]):
  """Restores the baseline in every field of another priority."""
  for priority, values in BASELINE.items():
    if priority not in changed:
      for path, value in values.items():
        config_path.set_value(path, config, value)
  # The guide has no rehearsal: what is built on its baseline has none.
  _leave_out_rehearsal(config)


def _leave_out_rehearsal(config):
  for stage in config.stages:
    stage.rehearsal = 0.0
