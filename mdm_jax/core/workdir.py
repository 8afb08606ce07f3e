"""The files of a run's folder, beside checkpoints and metrics.

config.json     the run's config; what eval, sample and a resume read
versions.json   the packages it was started with
results.json    the last evaluation
"""

import importlib.metadata
import json
import os
from typing import Any

from etils import epath

from mdm_jax.core import config as config_lib
from mdm_jax.core.config import Config
from mdm_jax.core.errors import UserError

_PACKAGES = (
  "mdm_jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
) + ("grain", "numpy", "sentencepiece", "sentencex")


class Workdir:
  """A run's folder."""

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path)

  def create(self) -> None:
    """Makes the folder; raises UserError where that can't be."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"workdir {self.path}: {error.strerror}") from error

  def has_config(self) -> bool:
    """Whether a run was started here."""
    return (self.path / "config.json").exists()

  def read_config_dict(self) -> dict[str, Any]:
    """Returns the saved config as plain values; no code is run."""
    try:
      return json.loads((self.path / "config.json").read_text())
    except FileNotFoundError:
      raise UserError(
        f"workdir {self.path} has no config.json: no run was started there"
      ) from None
    except ValueError as error:
      raise UserError(f"{self.path / 'config.json'}: {error}") from None

  def write_config(self, config: Config, tokenizer_sha256: str) -> None:
    """Stores what a resume, an evaluation or a sample has to know."""
    self._write("config.json", config_lib.to_dict(config))
    packages = {p: importlib.metadata.version(p) for p in _PACKAGES}
    self._write(
      "versions.json",
      {"packages": packages, "tokenizer_sha256": tokenizer_sha256},
    )

  def tokenizer_sha256(self) -> str | None:
    """Returns the hash of the tokenizer the run was started with."""
    path = self.path / "versions.json"
    if not path.exists():
      return None
    return json.loads(path.read_text())["tokenizer_sha256"]

  def check_tokenizer(self, sha256: str) -> None:
    """Raises UserError if the run was started with another tokenizer."""
    saved = self.tokenizer_sha256()
    if saved not in (None, sha256):
      raise UserError(
        f"workdir {self.path} was started with another tokenizer (sha256"
        f" {saved[:12]}, now {sha256[:12]}): the text or the tokenizer's config"
        " has changed; use another workdir"
      )

  def write_results(self, results: dict[str, Any]) -> None:
    """Stores the last evaluation."""
    self._write("results.json", results)

  def read_results(self) -> dict[str, Any] | None:
    """Returns the last evaluation, or None."""
    path = self.path / "results.json"
    return json.loads(path.read_text()) if path.exists() else None

  def _write(self, name: str, values: dict[str, Any]) -> None:
    """Writes JSON so that a crash leaves the old file or the new one."""
    partial = self.path / f".{name}.{os.getpid()}"
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(self.path / name)
