"""The guide's quick quality fix: retrains the baseline's last stage, longer.

  python -m mdm_jax.main --config=configs/baseline.py
  python -m mdm_jax.main --config=configs/quick_fix.py

It starts from the parameters of a finished run, runs/baseline or the folder
that --config.init_from names, with a new optimizer. Of the recommended values
it takes the four of high priority: 300 epochs instead of 150, learning rate
1e-4, label smoothing 0.1 and temperature 0.6. See docs/recipe.md.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` takes a minute, from runs/baseline_quick."""
  config = config_lib.default_config()
  config.name = "quick_fix"
  config.data.update(corpus="sotu", batch_size=16)
  config.model.update(num_layers=12, embed_dim=768, num_heads=12, dropout=0.1)
  config.objective.update(weighting="masked_ce", label_smoothing=0.1)
  config.stages = (
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=512,
      epochs=300,
      mask_rate=(0.10, 0.30),
      lr_factor=0.6,
    ),
  )
  config.optimizer.update(
    learning_rate=1e-4,
    warmup_steps=1000,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    clip_norm=1.0,
    accumulation=1,
    b2=0.95,
  )
  config.sample.update(
    num_steps=20,
    temperature=0.6,
    temperature_range=(0.3, 0.8),
    top_k=50,
    top_p=0.9,
  )
  quick = "quick" in arg.split(",")
  # A scaled-down model can only start from a scaled-down model's parameters.
  config.init_from = "runs/baseline_quick" if quick else "runs/baseline"
  return config_lib.apply_arg(config, arg)
