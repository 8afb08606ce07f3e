"""Small, fast runs of the program into which faults are injected.

A run is the program itself in a process of its own. What a fault needs inside
it, a callback that raises or a loss that is not a number, is patched in by a
few lines that are run before; the product knows nothing of faults.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import command_harness
import jax
import numpy as np
from command_harness import Command

UPDATES = 40
_NUMBERS = itertools.count()
CONFIG = """
from mdm_jax import config as config_lib


def get_config(arg=""):
  c = config_lib.default_config()
  c.name = "tiny"
  c.data.update(corpus="text:" + __file__.replace("tiny.py", "text/*.txt"))
  c.data.update(batch_size=4, eval_fraction=0.3)
  c.tokenizer.kind = "byte"
  c.model.update(num_layers=1, embed_dim=16, num_heads=2, dtype="float32")
  c.stages = (
    config_lib.stage(name="one", length=32, updates=16, mask_rate=(0.4, 0.9)),
    config_lib.stage(name="two", length=32, updates=24, mask_rate=None),
  )
  c.optimizer.update(learning_rate=3e-3, warmup_steps=4, ema_decay=0.9)
  c.train.update(log_every=1, checkpoint_every=10)
  c.eval.update(every=20, rows=4, final_rows=4, masks_per_row=4)
  c.eval.update(batch_size=16, samples=0)
  c.sample.update(num_samples=1, num_steps=4)
  return c.lock()
"""
MAIN = """
{patch}
from mdm_jax import main
from mdm_jax import command_line
from mdm_jax.core import log_lines
log_lines.run(main.main, flags_parser=command_line.parse)
"""
# Not of the numbers: when things happened, and how long they took.
TIMINGS = ("perf/", "goodput/", "memory/", "health/")
TIMED = {"train/tokens_per_second", "train/update_seconds"}

SLOW_UPDATES = """
import time
from mdm_jax.training.trainer import Trainer
_update = Trainer.update
def update(self, *args):
  time.sleep({seconds})
  return _update(self, *args)
Trainer.update = update
"""


def exact() -> list[str]:
  """Returns what a run needs whose bits are compared: on a CPU nothing."""
  if jax.default_backend() != "gpu":
    return []
  return ["--config.train.deterministic=true"]


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder with a config and some text, and an environment."""

  folder: pathlib.Path
  env: dict[str, str]

  def workdir(self, name: str) -> pathlib.Path:
    return self.folder / name

  def start(self, name: str, *args, patch: str = "", **env) -> "Process":
    """Starts a training whose workdir has a name."""
    module = f"patched_{next(_NUMBERS)}"
    (self.folder / f"{module}.py").write_text(MAIN.format(patch=patch))
    process = Command(
      *(self.folder, self.env | env, module),
      *("--config=tiny.py", f"--workdir={name}", *exact(), *args),
    )
    return Process(process, self.workdir(name))

  def run(self, name: str, *args, patch: str = "", **env) -> "Ended":
    """Runs a training to its end, whatever that is."""
    return self.start(name, *args, patch=patch, **env).end()


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended, and what it said."""

  code: int
  out: str
  err: str
  workdir: pathlib.Path

  @property
  def said(self) -> str:
    """All it said, with line breaks of the terminal's width undone."""
    return " ".join((self.out + self.err).split())

  @property
  def exit(self) -> dict:
    return json.loads((self.workdir / "exit.json").read_text())


class Process:
  """A training that is going on."""

  def __init__(self, process: Command, workdir: pathlib.Path):
    self._process, self.workdir = process, workdir
    self.pid = process.pid

  def wait_for(self, ready: Callable[[], object], seconds: float = 90) -> None:
    """Waits until something is true, or the process is gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and self._process.poll() is None:
      if ready():
        return
      time.sleep(0.005)
    out = self.end() if self._process.poll() is not None else "nothing happened"
    raise AssertionError(out)

  def wait_for_update(self, update: int) -> None:
    self.wait_for(lambda: last_update(self.workdir) >= update)

  def wait_for_checkpoint(self, step: int) -> None:
    path = self.workdir / "checkpoints" / str(step) / "manifest.json"
    self.wait_for(path.exists)

  def signal(self, number: int = signal.SIGTERM) -> None:
    self._process.send_signal(number)

  def end(self, seconds: float = 120) -> Ended:
    """Waits for the end; nothing is left running."""
    try:
      out, err = self._process.communicate(timeout=seconds)
    finally:
      self._process.kill()
    return Ended(self._process.returncode, out, err, self.workdir)

  def kill(self) -> Ended:
    self.signal(signal.SIGKILL)
    return self.end()


def make_place(folder: pathlib.Path, cache: pathlib.Path) -> Place:
  """Writes the config and the text, which is this machine's Python's own."""
  (folder / "tiny.py").write_text(CONFIG)
  (folder / "text").mkdir()
  for name in ("signal", "json", "os", "csv", "ast", "io", "re", "copy"):
    source = pathlib.Path(json.__file__).parents[1]
    path = source / f"{name}.py"
    path = path if path.exists() else source / name / "__init__.py"
    text = path.read_text()[:6000]
    (folder / "text" / f"{name}.txt").write_text(text)
  return Place(folder, command_harness.environment(cache))


def lines(workdir: pathlib.Path) -> Iterator[dict]:
  """Yields what metrics.jsonl holds so far, but a line being written."""
  path = workdir / "metrics.jsonl"
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      yield json.loads(line)
    except ValueError:
      return


def last_update(workdir: pathlib.Path) -> int:
  """Returns the last update that was logged."""
  steps = [x["step"] for x in lines(workdir) if "train/loss" in x]
  return max(steps, default=0)


def numbers(workdir: pathlib.Path) -> list[dict]:
  """Returns every line that was logged, floats by their bits, without times."""
  kept = []
  for line in lines(workdir):
    told = {
      name: value.hex() if isinstance(value, float) else value
      for name, value in line.items()
      if not name.startswith(TIMINGS) and name not in TIMED
    }
    if "config_changes" not in told:
      kept.append(told)
  return kept


def state_hash(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """Returns a hash of every array of a checkpoint, by its path."""
  import orbax.checkpoint as ocp

  folder = workdir / "checkpoints" / str(step) / "state"
  reader = ocp.PyTreeCheckpointer()
  saved = reader.metadata(folder).item_metadata.tree
  # As plain arrays: the devices they were saved from need not be here.
  args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), saved)
  tree = reader.restore(folder, restore_args=args)
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path): hashlib.sha256(
      np.asarray(leaf).tobytes()
    ).hexdigest()
    for path, leaf in flat
  }


def steps(workdir: pathlib.Path) -> list[int]:
  """Returns the checkpoints that are there, damaged or not."""
  folder = workdir / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file that holds most of a checkpoint's arrays."""
  found = [p for p in folder.rglob("*") if p.is_file()]
  return max(found, key=lambda path: path.stat().st_size)


def flip_a_bit(path: pathlib.Path) -> None:
  """Changes one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(bytes(content))
