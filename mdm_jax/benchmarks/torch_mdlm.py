"""Times a PyTorch model of MDLM's form (`torch_model.py`).

  python -m mdm_jax.benchmarks.torch_mdlm --preset=gpt2 --batch=64 --compile
  python -m mdm_jax.benchmarks.train_step --preset=gpt2 --batch=64 \\
    --against=torch

The first command prints milliseconds a step, tokens a second and peak memory.
The second times it in turn with the library's own step: `Peer` runs this
program in a process of its own, where PyTorch has its memory on the same
device, and tells it by lines on its standard input when to take its turns.

Needs PyTorch: pip install -e '.[torch]'.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

import jax
from absl import flags

from mdm_jax.benchmarks import timing
from mdm_jax.benchmarks.workload import PRESETS, Preset
from mdm_jax.core import log_lines
from mdm_jax.core.errors import Failure, UserError
from mdm_jax.core.progress import console

_TURN = 0.2  # seconds
_STEP, _WAIT = "step", "wait"  # what a peer is told
_PROGRAM = sys.executable, "-m", "mdm_jax.benchmarks.torch_mdlm"


def check() -> None:
  """Raises UserError if PyTorch is missing."""
  if importlib.util.find_spec("torch") is None:
    raise UserError(
      "this benchmark needs the Python package 'torch'; run: pip install -e"
      " '.[torch]'"
    )


def update_flops(preset: Preset) -> float:
  """Returns the FLOPs of an update, counted as in `model/flops.py`."""
  width, length = preset.embed_dim, preset.length
  # Four products D x D and two D x 4 D; scores and weighted values.
  layer = 2 * 12 * width**2 + 4 * length * width
  head = 2 * width * (preset.vocab + 1)
  return 3.0 * preset.batch * length * (preset.num_layers * layer + head)


# MARK: in turn with another program


class Peer:
  """The PyTorch model's updates, in another process.

  A call queues an update there and does not wait for it; `block_until_ready`
  does, so `timing.interleave` times a peer as it times a JAX program. To be
  used as a context manager: at its end the process is ended.

  Attributes:
    flops: of an update.
    facts: about its first update: its loss, the seconds until it was done, and
      bytes, by the names that `timing.Program` has for them.
  """

  def __init__(self, preset: Preset, compiled: bool = True):
    check()
    self.flops = update_flops(preset)
    told = json.dumps(dataclasses.asdict(preset))
    self._process = subprocess.Popen(
      (*_PROGRAM, f"--peer={told}", f"--compile={compiled}"),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.facts: dict[str, float] = json.loads(self._read())

  def __call__(self) -> "Peer":
    self._tell(_STEP)
    return self

  def block_until_ready(self) -> None:
    """Waits until all updates are done."""
    self._tell(_WAIT)
    self._read()

  def _tell(self, what: str) -> None:
    # A process that has ended is found by `_read`.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(f"{what}\n")
      self._process.stdin.flush()

  def _read(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      raise UserError(
        f"the PyTorch peer ended with exit code {code}; its own error is above"
      )
    return line

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *_: Any) -> None:
    # It ends by itself at the end of its input.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def _serve(preset: Preset, compiled: bool) -> None:
  # What else is printed here must not be taken for an answer.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  update, facts = _first(preset, compiled)
  print(json.dumps(facts), file=answers, flush=True)
  for line in sys.stdin:
    if line.strip() == _STEP:
      update()
    else:
      update.block_until_ready()
      print(file=answers, flush=True)


def _first(preset: Preset, compiled: bool):
  """Returns an update that was made twice, and the facts about it."""
  from mdm_jax.benchmarks import torch_model

  update = torch_model.Update(preset, compiled)
  start = time.perf_counter()
  update().block_until_ready()
  seconds = time.perf_counter() - start
  loss = update.loss.item()
  # Not of the first one, in which the compiler uses memory, too.
  temporary, peak = _step_bytes(update)
  return update, {
    "first_loss": loss,
    "lower_seconds": 0.0,
    "compile_seconds": seconds,
    "temporary_bytes": temporary,
    "peak_bytes": peak,
  }


def _step_bytes(update: timing.Timed) -> tuple[int, int]:
  """Returns the bytes that come and go in an update, and all at its peak.

  On a CPU, where PyTorch counts nothing, both are the process's peak.
  """
  import torch

  if not torch.cuda.is_available():
    update()
    return (timing.resident_peak_bytes(),) * 2
  torch.cuda.reset_peak_memory_stats()
  update().block_until_ready()
  peak = torch.cuda.max_memory_allocated()
  return peak - torch.cuda.memory_allocated(), peak


# MARK: alone


def measure(preset: Preset, compiled: bool, repeats: int) -> dict[str, Any]:
  """Measures updates.

  Args:
    preset: the model and the batch.
    compiled: by `torch.compile`, or as PyTorch runs it without.
    repeats: turns.
  """
  update, facts = _first(preset, compiled)
  seconds = timing.interleave({"step": update}, repeats, _TURN)["step"]
  times, tokens = timing.spread(seconds), preset.batch * preset.length
  count = update_flops(preset)
  way = "torch, compiled" if compiled else "torch"
  return {
    "facts": _machine(),
    "preset": dataclasses.asdict(preset),
    "compiled": compiled,
    "seconds": times,
    "tokens_per_second": tokens / times["median"],
    "flops": count,
    "flops_per_second": count / times["median"],
    "parameters": sum(p.numel() for p in update.model.parameters()),
    **facts,
    "headline": {
      f"{way}: tokens/s": tokens / times["median"],
      f"{way}: ms a step": 1e3 * times["median"],
      f"{way}: MiB peak": facts["peak_bytes"] / 2**20,
      f"{way}: s of the first step": facts["compile_seconds"],
    },
  }


def _machine() -> dict[str, Any]:
  import torch

  on_gpu = torch.cuda.is_available()
  return {
    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    "cores": timing.cores(),
    "load": os.getloadavg()[0],
    "python": platform.python_version(),
    "torch": torch.__version__,
  }


def _show(name: str, results: dict[str, Any]) -> None:
  times, head = results["seconds"], results["headline"]
  console.print(
    f"{name}, {results['facts']['device']}, torch {results['facts']['torch']},"
    f" {results['parameters'] / 1e6:.1f}M parameters"
  )
  for what, number in head.items():
    console.print(f"{what} {number:,.1f}")
  low, high = 1e3 * times["low"], 1e3 * times["high"]
  console.print(f"quartiles {low:.1f} - {high:.1f} ms")
  tera = results["flops_per_second"] / 1e12
  console.print(f"{tera:,.1f} TFLOP/s counted")


def main(_: list[str]) -> int:
  values = flags.FLAGS
  # The presets' module needs JAX, which would take the device's memory.
  jax.config.update("jax_platforms", "cpu")
  try:
    check()
  except Failure as error:
    print(error, file=sys.stderr)
    return error.code
  if values.peer:
    return _serve(Preset(**json.loads(values.peer)), values.compile)
  preset = PRESETS[values.preset]
  for name in ("batch", "dropout"):
    if values[name].value is not None:
      preset = dataclasses.replace(preset, **{name: values[name].value})
  results = measure(preset, values.compile, values.repeats)
  _show(values.preset, results)
  if values.json:
    print(json.dumps(results))
  return 0


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "char", list(PRESETS), "Which model and batch.")
  flags.DEFINE_integer("batch", None, "Rows, in place of the preset's.", 1)
  flags.DEFINE_bool("compile", False, "Compile it with torch.compile.")
  flags.DEFINE_float("dropout", None, "In place of the preset's.", 0.0, 0.99)
  flags.DEFINE_integer("repeats", 10, "Turns.", 1)
  flags.DEFINE_string("peer", "", "For Peer: a preset, as JSON.")
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
