"""Arguments of config files, the part after the colon in --config=FILE:ARG."""

from ml_collections import config_dict

from mdm_jax.core.errors import UserError, nearest


def apply_arg(
  config: config_dict.ConfigDict, arg: str, *names: str
) -> config_dict.ConfigDict:
  """Applies `quick` if the argument contains it; call it last in `get_config`.

  Args:
    config: the config.
    arg: comma-separated words.
    *names: valid words that the config file handles itself.

  Returns:
    The config, locked.

  Raises:
    UserError: a word is unknown.
  """
  words = [word for word in arg.split(",") if word]
  for word in words:
    if word not in ("quick", *names):
      valid = nearest(word, ("quick", *names))
      raise UserError(f"config argument {word!r}: {valid}")
  return quick(config) if "quick" in words else config.lock()


def quick(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Scales a config down to about a minute on a CPU, keeping its stages."""
  config.name += "_quick"
  config.data.max_documents = 24
  config.data.batch_size = min(config.data.batch_size, 16)
  config.data.update(eval_fraction=0.2, test_fraction=0.1)
  config.tokenizer.vocab_size = min(config.tokenizer.vocab_size, 512)
  config.model.update(num_layers=2, embed_dim=64, num_heads=4, dtype="float32")
  # None derives them from the smaller sizes above.
  config.model.update(num_kv_heads=None, mlp_dim=None)
  for i, part in enumerate(config.stages):
    part.length = 64 * 2 ** min(i, 1)
    part.updates = 12
  config.optimizer.accumulation = min(config.optimizer.accumulation, 2)
  config.optimizer.warmup_steps = 4
  config.optimizer.learning_rate = max(config.optimizer.learning_rate, 1e-3)
  config.optimizer.ema_decay = 0.9
  config.train.update(log_every=4, checkpoint_every=12)
  config.eval.update(every=12, rows=8, final_rows=16, masks_per_row=8)
  config.eval.update(batch_size=32, samples=8)
  config.sample.length = None
  return config
