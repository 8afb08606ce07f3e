"""Compares ways to draw masks: the variance of the bound and of its gradient.

  python -m mdm_jax.studies.variance --workdir=runs/quickstart

Every way estimates the bound (NELBO) of the same rows without bias, with two
denoiser calls of each row, so at the same cost. What differs is the variance:
of the estimate, in an evaluation, and of its gradient, in training with
`objective.weighting=nelbo`. Masks are drawn for the same rows ("masks alone"),
or for other rows each time, as in an update: then a way with one call a row has
twice as many rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int, Key, Shaped

from mdm_jax import command_line
from mdm_jax.core import compilation_cache, log_lines, rng, strict_json, tables
from mdm_jax.core.errors import Exit, Failure, UserError
from mdm_jax.core.progress import console, progress_bar, with_error
from mdm_jax.core.sharding import RULES
from mdm_jax.core.standard_errors import mean
from mdm_jax.data import splits
from mdm_jax.data.rows import Rows
from mdm_jax.measured_text import describe, open_rows
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Examples, score
from mdm_jax.studies.mask_ways import LIBRARY, WAYS, Way
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

CALLS = 2  # of the denoiser, for each row
_SAME, _OTHER = "same", "other"
COLUMNS = (
  *("masks", "std, same rows", "gradient"),
  *("std, other rows", "gradient"),
)


# MARK: variances


@dataclasses.dataclass(frozen=True)
class Moments:
  """What some independent estimates of the bound have in common.

  Attributes:
    estimate: mean of the estimates, nats per token.
    variance: of one estimate.
    noise: sum over parameters of the variance of one gradient.
    signal: squared norm of the mean gradient, without the noise left in it.
  """

  estimate: float
  variance: float
  noise: float
  signal: float


@dataclasses.dataclass(frozen=True)
class Size:
  """How much is measured.

  Attributes:
    rows: rows of an estimate, if each is read by two calls.
    draws: estimates per repeat.
    repeats: each with rows and keys of its own, for standard errors.
  """

  rows: int
  draws: int
  repeats: int

  def check(self, held: int) -> None:
    """Raises UserError if there are too few held-out rows."""
    if self.rows * CALLS > held:
      raise UserError(
        f"--rows={self.rows} needs {self.rows * CALLS} validation rows, but"
        f" there are {held}; set --rows={held // CALLS}"
      )


def estimate(
  denoiser: Denoiser,
  mask: int,
  way: Way,
  params: Params,
  key: Key[Array, ""],
  tokens: Int[Array, "R L"],
  segments: Int[Array, "R L"],
) -> Float[Array, ""]:
  """Returns one estimate of the rows' bound, in nats per token.

  Args:
    denoiser: the model.
    mask: id of the mask token.
    way: how masks are drawn.
    params: the model's parameters.
    key: draws the masks.
    tokens: rows; each is read by `way.calls` denoiser calls.
    segments: which text of the row a token is of; 0 is padding.
  """
  real = segments > 0
  drawn = way.draw(key, real)
  again = lambda x: jnp.tile(x, (way.calls, 1))
  masked = drawn.masked.reshape(-1, tokens.shape[1])
  targets = again(tokens)
  share = drawn.masked.sum(axis=-1) / jnp.maximum(real.sum(axis=-1)[None], 1)
  weight = drawn.weight.reshape(-1, 1) / real.sum().astype(jnp.float32)
  # What meets the model must be sharded like a batch, also on one device.
  place = lambda x: jax.reshard(x, RULES.spec("batch"))
  examples = Examples(
    tokens=place(jnp.where(masked, mask, targets)),
    context=row_context(
      place(again(segments)), condition=place(share.reshape(-1))
    ),
    targets=place(targets),
    asked=place(masked),
    weights=place(jnp.broadcast_to(weight, masked.shape)),
    capacity=masked.size,
  )
  hidden = denoiser.hidden(params, examples.tokens, examples.context)
  return score(denoiser, params, examples, hidden)[0]


def moments(
  one: Callable[[Params, Any, Any, Any], Float[Array, ""]],
  params: Params,
  keys: Shaped[Array, "D"],
  rows: tuple[Int[Array, "D R L"], Int[Array, "D R L"]],
) -> tuple[Float[Array, ""], ...]:
  """Returns the moments of D estimates, in the order of `Moments`.

  Only sums over the draws are kept: a gradient is as large as the model.
  """
  squared = lambda tree: sum((x * x).sum() for x in jax.tree.leaves(tree))

  def add(total: tuple, drawn: tuple) -> tuple[tuple, Float[Array, ""]]:
    gradients, squares = total
    key, tokens, segments = drawn
    value, gradient = jax.value_and_grad(one)(params, key, tokens, segments)
    gradients = jax.tree.map(jnp.add, gradients, gradient)
    return (gradients, squares + squared(gradient)), value

  start = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
  (gradients, squares), values = jax.lax.scan(add, start, (keys, *rows))
  n = len(keys)
  noise = (squares - squared(gradients) / n) / (n - 1)
  signal = squared(gradients) / n**2 - noise / n
  return values.mean(), values.var(ddof=1), noise, signal


def measure(
  way: Way,
  denoiser: Denoiser,
  mask: int,
  params: Params,
  rows: Rows,
  size: Size,
) -> dict[str, list[Moments]]:
  """Returns the moments of a way's estimates, for each repeat.

  Args:
    way: how masks are drawn.
    denoiser: the model.
    mask: id of the mask token.
    params: the model's parameters.
    rows: what to draw rows from.
    size: how many of what.

  Returns:
    Of estimates from the same rows, and from other rows each time.
  """
  one = functools.partial(estimate, denoiser, mask, way)
  run = jax.jit(functools.partial(moments, one))
  fields = rows.tokens[:], rows.segments[:]
  found: dict[str, list[Moments]] = {_SAME: [], _OTHER: []}
  for repeat in range(size.repeats):
    keys = jax.random.split(rng.stream(repeat, "masks"), size.draws)
    for kind in found:
      chosen = _choose(len(rows), size, way.calls, kind, repeat)
      drawn = tuple(jnp.asarray(x[chosen], jnp.int32) for x in fields)
      values = run(params, keys, drawn)
      found[kind].append(Moments(*(float(value) for value in values)))
  return found


def _choose(
  total: int, size: Size, calls: int, kind: str, repeat: int
) -> Int[np.ndarray, "D R"]:
  """Returns the rows of each estimate; a repeat's are the same for all ways."""
  draw = np.random.default_rng(repeat)
  number = size.rows * CALLS // calls
  if kind == _SAME:
    few = draw.permutation(total)[: size.rows]
    return np.tile(few, (size.draws, CALLS // calls))
  shuffled = [draw.permutation(total)[:number] for _ in range(size.draws)]
  return np.stack(shuffled)


# MARK: the table


def cells(found: dict[str, dict[str, list[Moments]]]) -> list[list[str]]:
  """Returns the table's rows, with standard errors over repeats.

  The standard deviation is of an estimate, in nats per token. The variance of a
  gradient is shown as a multiple of the library's for the same rows.
  """
  library = found[LIBRARY]
  lines = []
  for name, kinds in found.items():
    line = [name]
    for kind, repeats in kinds.items():
      variance = mean([m.variance for m in repeats])
      std = variance.value**0.5
      line.append(with_error(std, variance.stderr / (2 * std)))
      pairs = zip(repeats, library[kind], strict=True)
      ratio = mean([a.noise / b.noise for a, b in pairs])
      line.append(with_error(ratio.value, ratio.stderr, ".2f"))
    lines.append(line)
  return lines


def measure_workdir(workdir: Workdir, size: Size) -> None:
  """Measures every way with a run's best checkpoint and its validation text.

  Writes variance.json and variance.md, and prints the table.

  Raises:
    UserError: there is no run, its model has no mask, or several devices.
  """
  config = workdir.read_config()
  data, config = open_rows(config, workdir)
  model = load_model(workdir, config)
  if model.mesh.size > 1:
    raise UserError(
      f"this study runs on one device, but there are {model.mesh.size}; for"
      " example, set CUDA_VISIBLE_DEVICES=0"
    )
  rows = data.validation.rows
  size.check(len(rows))
  mask = model.tokenizer.vocab.need("mask")
  found = {}
  with progress_bar("ways") as bar, jax.set_mesh(model.mesh):
    task = bar.add_task("variance", total=len(WAYS))
    for name, way in WAYS.items():
      found[name] = measure(way, model.denoiser, mask, model.params, rows, size)
      bar.advance(task)
  lines = cells(found)
  plain = {
    name: {k: [dataclasses.asdict(m) for m in ms] for k, ms in kinds.items()}
    for name, kinds in found.items()
  }
  what = {
    "checkpoint": model.step,
    "text": describe(data, config, splits.VALIDATION),
    "size": dataclasses.asdict(size),
    "ways": plain,
  }
  workdir.write("variance.json", strict_json.plain(what))
  workdir.write("variance.md", tables.as_markdown(COLUMNS, lines))
  signal = np.mean([m.signal for m in found[LIBRARY][_OTHER]])
  noise = np.mean([m.noise for m in found[LIBRARY][_OTHER]])
  console.print(
    f"{size.rows} rows in {CALLS} calls each, {size.draws} estimates in each of"
    f" {size.repeats} repeats; the gradient of {LIBRARY!r} with other"
    f" rows has a variance of {noise / signal:.1f} times its squared mean",
    soft_wrap=True,
  )
  console.print(
    tables.for_terminal(COLUMNS, lines, "variance by way of masking")
  )


def main(_: list[str]) -> int:
  """Measures the ways, and returns the exit code."""
  options = flags.FLAGS
  try:
    if not options.workdir:
      raise UserError("no run is named; give --workdir=FOLDER")
    compilation_cache.turn_on()
    size = Size(options.rows, options.draws, options.repeats)
    measure_workdir(Workdir(options.workdir), size)
  except Failure as error:
    return command_line.fail(error)
  except KeyboardInterrupt:
    print("interrupted; nothing was written")
    return Exit.STOPPED
  return Exit.DONE


def _define_flags() -> None:
  """Called by the program alone: main.py has flags of the same names."""
  flags.DEFINE_string("workdir", None, "Folder of the run.")
  flags.DEFINE_integer("rows", 8, "Rows of an estimate.", lower_bound=1)
  flags.DEFINE_integer("draws", 16, "Estimates per repeat.", lower_bound=2)
  flags.DEFINE_integer("repeats", 8, "Repeats, for errors.", lower_bound=2)


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main, flags_parser=command_line.parse_plain)
