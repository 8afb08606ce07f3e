"""Prompts with answers: a task that can be checked, on two cores.

  python -m mdm_jax.main --config=configs/sft.py

It trains on sudokus of 4 x 4 and tells which share of held-out ones it solves.
`--config.data.corpus=task:sorting` (or `addition`, `brackets`) is another task,
`chat:PATH` your own prompts and answers: see docs/finetuning.md.
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; `:quick` scales it down to seconds."""
  config = config_lib.default_config()
  config.name = "sft"
  config.data.update(corpus="task:sudoku", batch_size=24)
  config.tokenizer.kind = "char"
  config.model.update(num_layers=3, embed_dim=64, num_heads=4)
  config.model.update(qkv_bias=True, rope_theta=100.0)
  config.stages = (
    config_lib.stage(
      name="answers",
      unit="conversations",
      length=136,
      updates=600,
    ),
  )
  config.optimizer.update(
    learning_rate=3e-3,
    warmup_steps=100,
    min_lr_ratio=0.05,
    weight_decay=0.01,
    ema_decay=0.99,
  )
  config.train.checkpoint_every = 200
  config.eval.update(every=200, rows=16, final_rows=128, samples=500)
  # One token per step: the most certain first.
  config.sample.update(
    num_steps=17,
    order="confidence",
    temperature=1.0,
    temperature_range=None,
    top_k=None,
    top_p=None,
  )
  config = config_lib.apply_arg(config, arg)
  if arg:  # problems are shorter than most documents
    config.data.max_documents = 200
  return config
