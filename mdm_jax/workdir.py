"""Reads and writes the files of a run's folder, except its checkpoints.

config.json     the run's config: what eval, sample and a resume read
versions.json   packages of the run's start, and the format of its files
data.json       what its stages read: counts, difficulty, examples
results.json    the last evaluation
likelihood_*.json  exact likelihoods of test text, by --likelihood
unmasking.json  one of its samples, step by step
sampling.json   sampling settings found by --mode=tune, and what was tried
report.html     all of it as a page
frontier.csv    judge's nats per byte and entropy by temperature; also .png
ways.csv        the same, and denoiser calls, by setting; also .md and .png

`runtime/attempt.py` has lock.json, attempts.jsonl and exit.json;
`checkpoints/checkpoint.py` checkpoints, checkpoints.jsonl and set_aside;
`training/writers.py` metrics.jsonl.
"""

import getpass
import importlib.metadata
import json
from typing import Any

from etils import epath

import mdm_jax
from mdm_jax import config as config_lib
from mdm_jax.config import Config
from mdm_jax.core import distributed, files
from mdm_jax.core.errors import StorageError, UserError

# Version of all file formats in a workdir; 1 until mdm_jax 0.1.
FORMAT = 2
_PACKAGES = (
  *("mdm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
  *("grain", "numpy", "sentencepiece", "sentencex"),
)


class Workdir:
  """A run's folder. Only process 0 writes."""

  def __init__(self, path: epath.PathLike):
    self.path = epath.Path(path).expanduser()

  def create(self) -> None:
    """Makes the folder and checks that it can be written.

    Raises:
      StorageError: it can't.
      UserError: it is in a bucket, and the package for that is not installed.
    """
    try:
      files.make_folder(self.path)
      # By trying: permissions do not tell of a read-only disk or bucket. A name
      # per process, as several may try at once.
      probe = self.path / f".writable.{distributed.index()}"
      files.write(probe, b"")
      files.delete(probe)
    except OSError as error:
      # A local path is made with its parents, but a bucket has to exist.
      missing = isinstance(error, FileNotFoundError)
      if missing and not files.is_local(self.path):
        why = f"there is no bucket {self.path.parts[2]}"
      else:
        why = f"{error.strerror} (errno {error.errno})"
      raise StorageError(
        f"workdir {self.path} can't be written by {_user()}: {why}"
      ) from error

  def check_format(self) -> None:
    """Raises UserError if the run here has files of another format."""
    saved = self.read("versions.json") or {"format": FORMAT}
    # Versions before 0.2 wrote no format.
    found = saved.get("format", 1)
    if found != FORMAT:
      by = saved["packages"]["mdm_jax"]
      raise UserError(
        f"workdir {self.path} was started by mdm_jax {by} (format {found});"
        f" this is mdm_jax {mdm_jax.__version__} (format {FORMAT}): use that"
        " version, or use another --workdir to start a new run"
      )

  def read_config(self) -> Config:
    """Returns the saved config; runs no code.

    Raises:
      UserError: there is none, it is not valid JSON, or has another format.
    """
    self.check_format()
    try:
      saved = self.read("config.json")
    except ValueError as error:
      raise UserError(f"{self.path / 'config.json'}: {error}") from None
    if saved is None:
      raise UserError(
        f"workdir {self.path} has no config.json: no run was started there"
      )
    return config_lib.from_dict(saved)

  def write_config(self, config: Config, tokenizer_sha256: str) -> None:
    """Stores what a resume, an evaluation or sampling needs to know."""
    self.write("config.json", config_lib.to_dict(config))
    versions = {
      "format": FORMAT,
      "packages": {p: importlib.metadata.version(p) for p in _PACKAGES},
      "tokenizer_sha256": tokenizer_sha256,
    }
    self.write("versions.json", versions)

  def check_tokenizer(self, sha256: str) -> None:
    """Raises UserError if the run was started with another tokenizer."""
    saved = (self.read("versions.json") or {}).get("tokenizer_sha256", sha256)
    if saved != sha256:
      raise UserError(
        f"workdir {self.path} was started with another tokenizer (sha256"
        f" {saved[:12]}, now {sha256[:12]}): the text or the tokenizer's config"
        " has changed; use another workdir"
      )

  def check_data(self, manifest: dict[str, Any], advice: str = "") -> None:
    """Raises UserError if the run was started with other rows.

    Args:
      manifest: of the rows at hand.
      advice: ends the message.
    """
    saved = (self.read("data.json") or manifest)["files"]
    changed = [n for n in saved if saved[n] != manifest["files"].get(n)]
    if changed:
      raise UserError(
        f"workdir {self.path} was started with another text: {changed[0]} has"
        f" changed since; restore the text, or use another workdir{advice}"
      )

  def check_revisions(self, manifest: dict[str, Any]) -> None:
    """Raises UserError if the run read its datasets at other revisions."""
    saved = (self.read("data.json") or {}).get("revisions", {})
    for side, before in saved.items():
      now = manifest.get("revisions", {}).get(side, before)
      # A dataset under another name, or in a folder, is compared by its rows.
      if now != before and now.partition("@")[0] == before.partition("@")[0]:
        raise UserError(
          f"workdir {self.path} was started with hf:{before}, but hf:{now} is"
          f" read now; give hf:{before} in the config, or use another workdir"
        )

  def read(self, name: str) -> dict[str, Any] | None:
    """Returns the content of a JSON file, or None if it doesn't exist."""
    try:
      return json.loads(files.read_text(self.path / name))
    except FileNotFoundError:
      return None

  def read_metrics(self) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, [] if it doesn't exist."""
    return files.read_lines(self.path / "metrics.jsonl")

  def write(self, name: str, content: dict[str, Any] | str | bytes) -> None:
    """Writes a file atomically: a dict as JSON, anything else as it is.

    Raises:
      StorageError: it can't be written.
    """
    if not distributed.is_first():
      return
    path = self.path / name
    try:
      if isinstance(content, dict):
        files.write_json(path, content)
      else:
        files.write(
          path, content.encode() if isinstance(content, str) else content
        )
    except OSError as error:
      raise StorageError(
        f"{path} can't be written by {_user()}: {error.strerror} (errno"
        f" {error.errno})"
      ) from error


def _user() -> str:
  try:
    return getpass.getuser()
  except (OSError, KeyError):
    return "this user"
