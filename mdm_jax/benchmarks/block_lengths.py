"""Bits per byte and speed by block length, beside both other objectives.

  python -m mdm_jax.benchmarks.block_lengths --out=runs/block_lengths

Trains one small model for each block length, an autoregressive and a masked
one, all of the same size, on the same rows and with as many updates. Measures
test text, then times how each draws (`block_speed.py`): with the exact cache,
and by calls over whole rows. The same on long rows, with random weights, where
the cache has most to gain: the factor that the matrix products give stands
beside the measured one.

Stop it at any time: the same command resumes, and trains no finished run again.
Writes block_lengths.json, .md and, with matplotlib, .svg.
"""

import dataclasses
import json
import pathlib
import resource
from typing import Any

import jax
from absl import flags
from ml_collections import config_dict

from mdm_jax import command_line
from mdm_jax import config as config_lib
from mdm_jax.benchmarks import block_report as report
from mdm_jax.benchmarks import block_speed, timing
from mdm_jax.benchmarks.block_report import AR, MASKED
from mdm_jax.blueprint import held_out_objective
from mdm_jax.core import (
  compilation_cache,
  log_lines,
  modules,
  rng,
  strict_json,
  tables,
)
from mdm_jax.core.errors import Exit, Failure, Stopped
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.data.prepared import prepare
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.objectives.measured import BITS
from mdm_jax.start import open_run
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.training_loop import train
from mdm_jax.workdir import Workdir

_MEASURED, _SPENT = "block_lengths.json", "cpu_seconds.json"
# Fields of a preset that a run depends on.
_OF_A_RUN = (
  *("length", "layers", "width", "heads", "vocab", "batch", "updates", "rate"),
  *("documents", "rows"),
)


@dataclasses.dataclass(frozen=True)
class Preset:
  """What is trained, and how it is timed.

  Attributes:
    blocks: block lengths; the last is a whole row.
    length: tokens per row.
    layers: of the model.
    width: of the model.
    heads: of the model.
    vocab: SentencePiece pieces.
    batch: rows of an update.
    updates: of each run.
    rate: peak learning rate.
    documents: of the corpus; None for all.
    rows: test rows.
    long: tokens of a long row.
    long_blocks: block lengths on long rows.
    long_steps: steps of a block there.
  """

  blocks: tuple[int, ...] = (1, 4, 8, 16, 32, 128)
  length: int = 128
  layers: int = 2
  width: int = 64
  heads: int = 2
  vocab: int = 512
  batch: int = 8
  updates: int = 1500
  rate: float = 5e-3
  documents: int | None = None
  rows: int = 128
  long: int = 1024
  long_blocks: tuple[int, ...] = (16, 64, 256)
  long_steps: int = 4


PRESETS = {
  "small": Preset(),
  "tiny": Preset(
    *((1, 4, 16), 16, 1, 16, 2, 320, 4, 4),
    documents=20,
    rows=8,
    long=32,
    long_blocks=(4,),
    long_steps=2,
  ),
}


# MARK: runs


def names(preset: Preset) -> tuple[str, ...]:
  """Returns the runs: both other objectives, then the block lengths."""
  return AR, MASKED, *(f"block_{size}" for size in preset.blocks)


def config_of(name: str, preset: Preset) -> config_dict.ConfigDict:
  """Returns the config of a run; all differ in the objective alone."""
  config = config_lib.default_config()
  config.name = name
  config.data.update(
    corpus="sotu", batch_size=preset.batch, max_documents=preset.documents
  )
  if preset.documents:  # few: enough of them must be held out
    config.data.update(eval_fraction=0.2, test_fraction=0.2)
  config.tokenizer.vocab_size = preset.vocab
  config.model.update(
    num_layers=preset.layers,
    embed_dim=preset.width,
    num_heads=preset.heads,
    qkv_bias=True,
    rope_theta=100.0,
  )
  config.stages = (
    config_lib.stage(length=preset.length, updates=preset.updates),
  )
  kind, _, size = name.partition("_")
  config.objective.name = kind
  if size:
    config.objective.block_length = int(size)
  config.optimizer.update(
    learning_rate=preset.rate,
    warmup_steps=max(preset.updates // 20, 1),
    min_lr_ratio=0.05,
    weight_decay=0.01,
    ema_decay=0.99,
  )
  every = max(preset.updates // 4, 1)
  config.train.update(log_every=max(every // 5, 1), checkpoint_every=every)
  # The last state is measured: no run chooses its best.
  config.eval.update(every=0, rows=16, masks_per_row=8, samples=0)
  if kind != AR:
    config.sample.update(num_steps=int(size or 16), temperature_range=None)
  return config


def trained(name: str, preset: Preset, folder: pathlib.Path) -> dict[str, Any]:
  """Trains and measures a run, or what is left of it.

  Args:
    name: one of `names`.
    preset: the sizes.
    folder: of all runs.

  Returns:
    Bits per byte of test text and their error, whether they are a bound, the
    rows and the CPU seconds, those of earlier attempts included.

  Raises:
    UserError: the folder has a run of other settings.
    Stopped: a signal came; the next call resumes.
  """
  workdir = Workdir(folder / name)
  config = config_lib.from_config_dict(config_of(name, preset))
  what = {"run": {n: getattr(preset, n) for n in _OF_A_RUN}}
  found = workdir.read(_MEASURED)
  if found and found["run"] == what["run"]:
    return found
  before = (workdir.read(_SPENT) or {"seconds": 0.0})["seconds"]
  start = cpu_seconds() - before
  try:
    _train(config, workdir)
    found = what | _measured(config, workdir, preset)
  finally:
    if workdir.path.is_dir():
      workdir.write(_SPENT, {"seconds": cpu_seconds() - start})
  found["cpu_seconds"] = round(cpu_seconds() - start, 1)
  workdir.write(_MEASURED, strict_json.plain(found))
  return found


def _train(config: config_lib.Config, workdir: Workdir) -> None:
  """As `train_and_evaluate`, without its tables of samples and baselines."""
  with open_run(config, workdir) as run:
    if run.is_finished:
      return
    state = run.restore_or_init()
    with run.subscribed() as (hooks, saving):
      hooks.on_start(state)
      if run.is_evaluated_late:
        hooks.on_evaluate(run.origin.done, state)
      train(run.trainer, state, run.updates, hooks, saving)


def _measured(
  config: config_lib.Config, workdir: Workdir, preset: Preset
) -> dict[str, Any]:
  data = prepare(config.rows, workdir.path, for_training=False)
  model = load_model(workdir, config)
  held = data.test.subset(preset.rows)
  with jax.set_mesh(model.mesh):
    vocab = model.tokenizer.vocab
    objective = held_out_objective(config, vocab, model.mesh)
    evaluator = Evaluator(config.eval, objective, model.denoiser, model.mesh)
    measured = evaluator.measure(model.params, held)
  bits = next(iter(measured.with_role(BITS).values()))
  single = getattr(config.objective, "block_length", 0) == 1
  return {
    "bits_per_byte": {"value": bits.value, "stderr": bits.error},
    # With blocks of one token the bound is the likelihood.
    "is_bound": bits.bound and not single,
    "rows": len(held),
    "documents": held.documents,
    "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
  }


def cpu_seconds() -> float:
  """Returns the CPU seconds of this process."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


# MARK: speed


def drawn_from(
  preset: Preset, folder: pathlib.Path
) -> dict[str, block_speed.Loop]:
  """Returns what is timed: each run, drawing alone or by a threshold.

  Args:
    preset: the sizes.
    folder: of all runs.
  """
  loops = {}
  for name in names(preset):
    config = config_lib.from_config_dict(config_of(name, preset))
    loop = _loop(config, preset.length, load_model(Workdir(folder / name)))
    # As many steps as tokens: one token a step.
    steps = {"num_steps": loop.block}
    ways = {f"{report.title(name)}, one token a step": steps}
    if name not in (AR, "block_1"):
      ways |= {
        f"{report.title(name)}, threshold {at}": steps
        | {"order": "confidence", "threshold": at}
        for at in report.THRESHOLDS
      }
    loops |= {
      way: dataclasses.replace(loop, fields=fields)
      for way, fields in ways.items()
    }
  return loops


def long_rows(
  preset: Preset, folder: pathlib.Path
) -> dict[str, block_speed.Loop]:
  """Returns models of long rows, with random weights of the runs' size.

  Args:
    preset: the sizes.
    folder: of all runs, whose tokenizer is used.
  """
  model, loops = load_model(Workdir(folder / AR)), {}
  with jax.set_mesh(model.mesh):
    params = jax.jit(model.denoiser.init)(rng.stream(0, "init"))
  model = dataclasses.replace(model, params=params)
  for size in preset.long_blocks:
    config = config_lib.from_config_dict(config_of(f"block_{size}", preset))
    steps = min(preset.long_steps, size)
    loops[f"blocks of {size}, {steps} steps each"] = dataclasses.replace(
      _loop(config, preset.long, model), fields={"num_steps": steps}
    )
  return loops


def _loop(
  config: config_lib.Config, length: int, model: TrainedModel
) -> block_speed.Loop:
  with jax.set_mesh(model.mesh):
    objective = held_out_objective(config, model.tokenizer.vocab, model.mesh)
  given = model.denoiser, model.params, objective.decoding(), length
  return block_speed.Loop(*given, fields={})


# MARK: what is printed


def measure(
  preset: Preset, folder: pathlib.Path, repeats: int
) -> dict[str, Any]:
  """Trains what is left, and returns everything that was measured.

  Args:
    preset: the sizes.
    folder: of all runs.
    repeats: turns of the timing.
  """
  runs = {}
  for name in names(preset):
    runs[name] = trained(name, preset, folder)
  loops, long = drawn_from(preset, folder), long_rows(preset, folder)
  with jax.set_mesh(make_mesh(MeshConfig())):
    speed = block_speed.measure(loops, repeats)
    of_long = block_speed.measure(long, repeats)
  return {
    "facts": timing.facts(),
    "preset": dataclasses.asdict(preset),
    "runs": runs,
    "speed": speed,
    "long_rows": of_long,
    "cpu_seconds": round(cpu_seconds(), 1),
  }


def main(_: list[str]) -> int:
  """Measures and writes everything; returns the exit code."""
  options = flags.FLAGS
  folder = pathlib.Path(options.out).expanduser()
  compilation_cache.turn_on()
  try:
    found = measure(PRESETS[options.preset], folder, options.repeats)
  except Stopped as stopped:
    console.print(stopped, soft_wrap=True)
    return Exit.STOPPED
  except Failure as error:
    return command_line.fail(error)
  except KeyboardInterrupt:
    print("interrupted; the same command resumes")
    return Exit.STOPPED
  console.print(
    tables.for_terminal(report.COLUMNS, report.cells(found["runs"]))
  )
  for key in ("speed", "long_rows"):
    lines = block_speed.cells(found[key])
    console.print(tables.for_terminal(block_speed.COLUMNS, lines))
  write = lambda kind, content: (folder / f"block_lengths.{kind}").write_bytes(
    content
  )
  found = strict_json.plain(found)
  write("json", f"{strict_json.dumps(found)}\n".encode())
  write("md", report.as_markdown(found).encode())
  if modules.has("matplotlib"):
    write("svg", report.as_svg(found))
  if options.json:
    print(json.dumps(found))
  return Exit.DONE


def _define_flags() -> None:
  flags.DEFINE_enum("preset", "small", list(PRESETS), "Which sizes.")
  flags.DEFINE_string("out", "runs/block_lengths", "Folder of runs and tables.")
  flags.DEFINE_integer("repeats", 3, "Timed calls of each.", 1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
