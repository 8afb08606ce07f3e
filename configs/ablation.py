"""Tests the recipe's claims one change at a time, on two CPU cores.

  python -m mdm_jax.studies.ablate --config=configs/ablation.py

The base is `configs/recommended.py` with more rehearsal, a smaller model
without dropout, shorter rows, fewer documents, and a learning rate for few
updates. Each variant changes one thing; all make the same number of updates of
the same number of rows. See docs/results.md for what came out.
"""

from mdm_jax import config as config_lib

VARIANTS = {
  "base": "rehearsal 0.25, label smoothing 0.1, weight decay 0.01",
  "strict": "the guide's: no rehearsal",
  "rehearsal_0.1": "rehearsal 0.1",
  "rehearsal_0.5": "rehearsal 0.5",
  "uniform": "every rate in every stage, weighted as the bound",
  "uniform_ce": "every rate in every stage, all masked tokens equal",
  "reversed": "low mask rates first",
  "no_smoothing": "label smoothing 0",
  "decay_0.1": "weight decay 0.1",
  "plain": "a plain MDM: one stage of all text, uniform, no smoothing",
}


def get_config(arg: str = ""):
  """Returns the config of `:VARIANT`, one of `VARIANTS` (none: the base).

  `:VARIANT,quick` takes half a minute.
  """
  config = config_lib.default_config()
  config.name = "ablation"
  config.data.update(corpus="sotu", batch_size=8)
  config.data.update(max_documents=40, eval_fraction=0.15, test_fraction=0.15)
  config.tokenizer.vocab_size = 512
  config.model.update(num_layers=2, embed_dim=128, num_heads=4)
  config.objective.update(weighting="masked_ce", label_smoothing=0.1)
  config.stages = (
    config_lib.stage(
      name="I foundational",
      unit="sentences",
      min_words=10,
      max_words=50,
      easiest=1 / 3,
      length=64,
      updates=100,
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
      updates=200,
      mask_rate=(0.40, 0.60),
      rehearsal=0.25,
      lr_factor=0.8,
    ),
    config_lib.stage(
      name="III refinement",
      unit="paragraphs",
      length=128,
      updates=500,
      mask_rate=(0.05, 0.20),
      rehearsal=0.25,
      lr_factor=0.5,
    ),
  )
  config.optimizer.update(
    # Learning rate and warm-up fit 800 updates; they were chosen for the base
    # and are the same in all variants.
    learning_rate=5e-3,
    warmup_steps=40,
    min_lr_ratio=0.05,
    weight_decay=0.01,
    accumulation=1,
    ema_decay=0.99,
  )
  config.train.checkpoint_every = 200
  # Variants are compared after their last update: none may choose its best.
  config.eval.update(every=0, final_rows=128)
  config.sample.update(
    order="random",
    num_steps=25,
    temperature=0.6,
    top_k=20,
    top_p=0.85,
  )
  chosen = [word for word in arg.split(",") if word in VARIANTS]
  for variant in chosen or ["base"]:
    _change(config, variant)
    config.name += f"_{variant}"
  return config_lib.apply_arg(config, arg, *VARIANTS)


def _change(config, variant: str):
  """Makes the one change of a variant."""
  match variant:
    case "base":
      pass
    case "strict":
      _set_rehearsal(config, 0.0)
    case "rehearsal_0.1":
      _set_rehearsal(config, 0.1)
    case "rehearsal_0.5":
      _set_rehearsal(config, 0.5)
    case "uniform":
      _make_uniform(config)
    case "uniform_ce":
      _make_uniform(config)
      config.objective.weighting = "masked_ce"
    case "reversed":
      rates = [stage.mask_rate for stage in config.stages]
      for stage, rate in zip(config.stages, reversed(rates), strict=True):
        stage.mask_rate = rate
    case "no_smoothing":
      config.objective.label_smoothing = 0.0
    case "decay_0.1":
      config.optimizer.weight_decay = 0.1
    case "plain":
      _make_uniform(config)
      config.objective.label_smoothing = 0.0
      updates = sum(stage.updates for stage in config.stages)
      # The last stage reads all text; it gets the updates of all three.
      config.stages = config.stages[-1:]
      config.stages[0].update(name="all", updates=updates, lr_factor=1.0)


def _set_rehearsal(config, share: float):
  for stage in config.stages:
    stage.rehearsal = share


def _make_uniform(config):
  config.objective.weighting = "nelbo"
  for stage in config.stages:
    stage.update(mask_rate=None, rehearsal=0.0)
