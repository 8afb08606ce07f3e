"""Sampling settings that `--mode=tune` chose: sampling.json of a run's folder.

config = applied(config, workdir, Which.AUTO)
"""

import dataclasses
import enum
from typing import Any

from mdm_jax import config as config_lib
from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import effective
from mdm_jax.workdir import Workdir

FILE = "sampling.json"
# Not part of a setting's quality: how many texts, how long, which draws; and
# what does nothing without a prompt.
_NOT_TUNED = frozenset(
  {"num_samples", "length", "seed", "guidance", "hole_length", "hole_rule"}
)
FIELDS = tuple(
  f.name for f in dataclasses.fields(SampleConfig) if f.name not in _NOT_TUNED
)


class Which(enum.StrEnum):
  """Which sampling settings to use."""

  AUTO = "auto"  # the tuned ones, if there are any
  CONFIG = "config"
  TUNED = "tuned"


def values(settings: SampleConfig) -> dict[str, Any]:
  """Returns the tuned fields of some settings as plain values."""
  return {name: getattr(settings, name) for name in FIELDS}


def in_words(settings: SampleConfig) -> str:
  """Returns the settings that take effect, on one line."""
  used = effective(settings)
  return ", ".join(f"{k} {v}" for k, v in used.items() if k in FIELDS)


def read(workdir: Workdir, config: Config) -> SampleConfig | None:
  """Returns a config's sampling settings with the tuned ones in their place.

  Returns:
    The settings, or None if the run was not tuned.

  Raises:
    UserError: the file can't be read.
  """
  found = _read_file(workdir)
  return found and _replaced(config, found["settings"])


def applied(config: Config, workdir: Workdir, which: str) -> Config:
  """Returns a config with the sampling settings to use, and prints which.

  A setting that differs from the run's own was asked for, for example by a
  flag: it is kept.

  Args:
    config: the run's config, perhaps with other settings.
    workdir: the run's folder.
    which: a value of `Which`.

  Raises:
    UserError: tuned settings are asked for but there are none, they can't be
      read, or one contradicts another that was asked for.
  """
  if which == Which.CONFIG:
    return config
  found = _read_file(workdir)
  if found is None:
    if which == Which.TUNED:
      raise UserError(
        f"--sampling=tuned: {workdir.path} has no {FILE}; run --mode=tune first"
      )
    return config
  own = workdir.read_config().sample
  asked = [n for n in FIELDS if getattr(config.sample, n) != getattr(own, n)]
  chosen = {n: v for n, v in found["settings"].items() if n not in asked}
  sample = _replaced(config, chosen)
  console.print(
    f"sampling with tuned settings ({FILE}, update {found['checkpoint']:,}):"
    f" {in_words(sample)}; --sampling=config takes the run's own",
    soft_wrap=True,
  )
  return dataclasses.replace(config, sample=sample)


def _read_file(workdir: Workdir) -> dict[str, Any] | None:
  again = "run --mode=tune again, or use --sampling=config"
  try:
    found = workdir.read(FILE)
  except ValueError as error:
    raise UserError(f"{workdir.path / FILE}: {error}; {again}") from None
  if found is None:
    return None
  settings = found.get("settings")
  known = isinstance(settings, dict) and set(settings) <= set(FIELDS)
  if not known or not isinstance(found.get("checkpoint"), int):
    raise UserError(
      f"{workdir.path / FILE} has other sampling settings than this version of"
      f" mdm_jax: {again}"
    )
  return found


def _replaced(config: Config, settings: dict[str, Any]) -> SampleConfig:
  # Through `from_dict`, for the same checks as in a config file.
  raw = config_lib.to_dict(config)
  raw["sample"] |= settings
  return config_lib.from_dict(raw).sample
