"""Interactive sampling: a text for every prompt typed in the terminal."""

import contextlib
import dataclasses
import json
import sys
import time
from typing import Any

from mdm_jax import sample
from mdm_jax.config import Config
from mdm_jax.core import distributed
from mdm_jax.core.errors import UserError, nearest
from mdm_jax.core.progress import console
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import effective
from mdm_jax.workdir import Workdir

_HELP = """\
Type the beginning of a text. [MASK] in it is filled with one token, [MASK:5]
with five, [MASK:1-8] with one to eight. An empty line samples a text without a
prompt.
/temperature 0.7  change a setting; without a value, show it
/settings         show all settings
/quit             quit, as does Ctrl-D
Changes of seed, temperature, min_p, top_p and schedule take effect at once;
others compile a new program first, which takes some seconds."""


def converse(config: Config, workdir: Workdir) -> list[str]:
  """Reads prompts until the end of the input; returns the texts drawn.

  The model is loaded once. A mistake is reported in one line, and the next
  prompt is read.

  Raises:
    UserError: there are several processes, or no model to load.
  """
  if distributed.count() > 1:
    raise UserError(
      "--interactive needs a single process; with several, use --prompt"
    )
  model = sample.load(workdir, config=config)
  _edit_lines()
  console.print(f"{workdir.path}: type a prompt, or /help")
  talk = _Talk(model, dataclasses.replace(config.sample, num_samples=1))
  for line in _lines():
    try:
      if not talk.take(line):
        break
    # The session continues: loading and compiling a model takes long.
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
  return talk.texts


class _Talk:
  """A session: its current settings and the texts so far."""

  def __init__(self, model: sample.Model, settings: SampleConfig):
    self.texts: list[str] = []
    self._model, self._settings = model, settings
    self._turn = 0

  def take(self, line: str) -> bool:
    """Handles a line of input; returns False if it ends the session."""
    name, _, value = line[1:].partition(" ")
    if not line.startswith("/"):
      self._draw(line)
    elif name in ("quit", "exit"):
      return False
    elif name == "help":
      console.print(_HELP)
    elif name == "settings":
      found = effective(self._settings, self._model.method.unused)
      for name, value in found.items():
        console.print(f"  {name} {value}")
    else:
      self._set(name, value.strip())
    return True

  def _draw(self, prompt: str) -> None:
    start = time.perf_counter()
    # Each turn adds 1 to the seed, so that the same prompt gives a new text.
    fields = dataclasses.asdict(self._settings)
    fields["seed"] = (fields["seed"] + self._turn) % 2**32
    drawn = self._model.generate(prompt, **fields)
    self._turn += 1
    self.texts += drawn.texts
    seconds = time.perf_counter() - start
    for text in drawn.texts:
      console.print(text, soft_wrap=True)
    cost = f"{drawn.calls.max()} denoiser calls, {seconds:.1f} s"
    console.print(cost, style="dim")

  def _set(self, name: str, value: str) -> None:
    names = [field.name for field in dataclasses.fields(SampleConfig)]
    if name not in names:
      raise UserError(f"unknown setting /{name}; {nearest(name, names)}")
    if value:
      fields = dataclasses.asdict(self._settings) | {name: _parsed(value)}
      self._settings = self._model.settings(**fields)
      # A seed that is set starts the same sequence of texts again.
      self._turn = 0 if name == "seed" else self._turn
    console.print(f"  {name} {getattr(self._settings, name)}")


def _parsed(value: str) -> Any:
  """Parses JSON numbers, lists and null, and None; other text stays text."""
  try:
    return json.loads({"None": "null"}.get(value, value))
  except (ValueError, RecursionError):
    return value


def _lines():
  while True:
    try:
      yield input("> " if sys.stdin.isatty() else "")
    except EOFError:
      return


def _edit_lines() -> None:
  """Enables line editing and history, where Python has readline."""
  # `input` uses readline once it is imported.
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401
