"""Compares ranges of mask rates for a run: how noisy its updates would be.

  python -m mdm_jax.studies.clipped --workdir=runs/block --clips=0:1,0.3:0.8

Every clip draws the mask rates of updates from its range alone
(`stages[i].mask_rate`), with the run's objective, weighting, block length and
rows per update. BD3-LM chooses its range so, by the variance of the loss
(Arriola et al. 2025, arXiv 2503.09573, section 4). Here the variance of the
gradient stands beside it, as a multiple of the first clip's: it is what an
update feels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int

from mdm_jax import command_line
from mdm_jax.config import Config
from mdm_jax.core import compilation_cache, log_lines, strict_json, tables
from mdm_jax.core.errors import Exit, Failure, UserError
from mdm_jax.core.progress import console, with_error
from mdm_jax.core.sharding import RULES
from mdm_jax.core.standard_errors import mean
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.measured_text import open_rows
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Objective
from mdm_jax.objectives.config import MaskedStage, build
from mdm_jax.objectives.draws import Draws, Plan
from mdm_jax.studies.variance import Moments, moments
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

Clip = tuple[float, float]
CLIPS = ((0.0, 1.0), (0.3, 0.8), (0.45, 0.95), (0.5, 1.0), (0.0, 0.5))
COLUMNS = "mask rates", "loss", "its std", "variance of the gradient"


def clipped(
  config: Config, vocab: Vocabulary, clip: Clip
) -> tuple[Objective, Plan]:
  """Returns the last stage's objective with other mask rates, and its plan.

  Args:
    config: of a masked or block run.
    vocab: the special ids.
    clip: lowest and highest mask rate; nothing is rehearsed.

  Raises:
    UserError: the objective has no mask rates, or the range is too narrow.
  """
  stage = config.stages[-1]
  own = stage.objective
  if not isinstance(own, MaskedStage):
    raise UserError(
      f"objective.name={config.objective.name} has no mask rates to clip; give"
      " the run of a masked or block model"
    )
  told = dataclasses.replace(own, mask_rate=clip, rehearsal=0.0)
  told.check("--clips")
  plan = Plan(
    accumulation=1,
    batch=config.rows_per_update,
    length=stage.length,
    shards=1,
    most_asked=stage.length,
    most_segments=stage.length,
  )
  made = build(config.objective, told, config.noise, vocab, plan)
  return made, plan


def loss(
  objective: Objective,
  plan: Plan,
  denoiser: Denoiser,
  params: Params,
  step: Int[Array, ""],
  tokens: Int[Array, "B L"],
  segments: Int[Array, "B L"],
) -> Float[Array, ""]:
  """Returns the loss of an update.

  Args:
    objective: draws the masks.
    plan: sizes of the update.
    denoiser: the model, without dropout.
    params: its parameters.
    step: number of the update; masks depend on it.
    tokens: the update's rows.
    segments: which text of the row a token is of; 0 is padding.
  """
  place = lambda x: jax.reshard(x[None], RULES.spec(None, "batch", None))
  batch = Batch(tokens=place(tokens), segments=place(segments))
  examples = objective.examples(batch, Draws(0, step, plan, plan.batch))
  part = jax.tree.map(lambda x: x[0], examples)
  return objective.loss(denoiser, params, part)[0]


def measure(
  config: Config,
  denoiser: Denoiser,
  params: Params,
  rows: Any,
  clips: tuple[Clip, ...],
  draws: int,
  repeats: int,
) -> dict[Clip, list[Moments]]:
  """Returns the moments of updates, for each clip and repeat.

  Args:
    config: of the run.
    denoiser: the model.
    params: its parameters.
    rows: what updates are drawn from; the same for all clips.
    clips: ranges of mask rates.
    draws: updates in a repeat, each with rows of its own.
    repeats: for standard errors.

  Raises:
    UserError: there are fewer rows than an update has, or see `clipped`.
  """
  fields = rows.tokens[:], rows.segments[:]
  if len(fields[0]) < config.rows_per_update:
    raise UserError(
      f"an update has {config.rows_per_update} rows, and the validation text"
      f" {len(fields[0])}; give a run with more text"
    )
  found = {}
  for clip in clips:
    objective, plan = clipped(config, denoiser.vocab, clip)
    one = functools.partial(loss, objective, plan, denoiser)
    run = jax.jit(functools.partial(moments, one))
    found[clip] = [
      _moments(run, params, fields, plan.batch, draws, repeat)
      for repeat in range(repeats)
    ]
  return found


def _moments(
  run: Callable[..., tuple[Float[Array, ""], ...]],
  params: Params,
  fields: tuple[np.ndarray, ...],
  batch: int,
  draws: int,
  repeat: int,
) -> Moments:
  draw = np.random.default_rng(repeat)
  total = len(fields[0])
  chosen = np.stack([draw.permutation(total)[:batch] for _ in range(draws)])
  steps = repeat * draws + jnp.arange(draws)
  rows = tuple(jnp.asarray(x[chosen], jnp.int32) for x in fields)
  return Moments(*map(float, run(params, steps, rows)))


def cells(found: dict[Clip, list[Moments]]) -> list[list[str]]:
  """Returns the rows of a table with `COLUMNS`; errors are over repeats.

  The variance of a gradient is shown as a multiple of the first clip's.
  """
  lines = []
  for (low, high), repeats in found.items():
    value = mean([m.estimate for m in repeats])
    spread = mean([m.variance**0.5 for m in repeats])
    pairs = zip(repeats, next(iter(found.values())), strict=True)
    ratio = mean([a.noise / b.noise for a, b in pairs])
    lines.append(
      [
        f"{low:g} to {high:g}",
        with_error(value.value, value.stderr),
        with_error(spread.value, spread.stderr),
        with_error(ratio.value, ratio.stderr, ".2f"),
      ]
    )
  return lines


def measure_workdir(
  workdir: Workdir, clips: tuple[Clip, ...], draws: int, repeats: int
) -> None:
  """Measures clips with a run's best checkpoint and its validation text.

  Writes clipped.json and clipped.md, and prints the table.

  Raises:
    UserError: see `measure`, or there is no run or several devices.
  """
  config = workdir.read_config()
  data, config = open_rows(config, workdir)
  model = load_model(workdir, config)
  if model.mesh.size > 1:
    raise UserError(
      f"this study runs on one device, but there are {model.mesh.size}; for"
      " example, set CUDA_VISIBLE_DEVICES=0"
    )
  plain = dataclasses.replace(model.config.model, dropout=0.0)
  denoiser = Denoiser(plain, model.tokenizer.vocab)
  with jax.set_mesh(model.mesh):
    found = measure(
      *(config, denoiser, model.params, data.validation.rows),
      *(clips, draws, repeats),
    )
  lines = cells(found)
  plain_found = [
    {"clip": clip, "repeats": [dataclasses.asdict(m) for m in repeats]}
    for clip, repeats in found.items()
  ]
  what = {"checkpoint": model.step, "draws": draws, "clips": plain_found}
  workdir.write("clipped.json", strict_json.plain(what))
  workdir.write("clipped.md", tables.as_markdown(COLUMNS, lines))
  title = f"{draws} updates in each of {repeats} repeats, update {model.step}"
  console.print(tables.for_terminal(COLUMNS, lines, title))


def parsed(words: list[str]) -> tuple[Clip, ...]:
  """Returns ranges such as 0.3:0.8.

  Raises:
    UserError: a word is no such range.
  """
  found = []
  for word in words:
    try:
      low, high = map(float, word.split(":"))
    except ValueError:
      low = high = -1.0
    if not 0 <= low < high <= 1:
      raise UserError(
        f"--clips: {word!r} is no range of mask rates; write it as 0.3:0.8"
      )
    found.append((low, high))
  return tuple(found)


def main(_: list[str]) -> int:
  """Measures the clips, and returns the exit code."""
  options = flags.FLAGS
  try:
    if not options.workdir:
      raise UserError("no run is named; give --workdir=FOLDER")
    compilation_cache.turn_on()
    measure_workdir(
      Workdir(options.workdir),
      *(parsed(options.clips), options.draws, options.repeats),
    )
  except Failure as error:
    return command_line.fail(error)
  except KeyboardInterrupt:
    print("interrupted; nothing was written")
    return Exit.STOPPED
  return Exit.DONE


def _define_flags() -> None:
  """Called by the program alone: main.py has flags of the same names."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_list(
    "clips",
    [f"{low:g}:{high:g}" for low, high in CLIPS],
    "Ranges of mask rates.",
  )
  flags.DEFINE_integer("draws", 16, "Updates in a repeat.", lower_bound=2)
  flags.DEFINE_integer("repeats", 4, "Repeats, for errors.", lower_bound=2)


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
