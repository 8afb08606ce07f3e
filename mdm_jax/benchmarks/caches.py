"""Measures approximate caches of a trained model: how far off, and how fast.

  python -m mdm_jax.benchmarks.caches --workdir=runs/quickstart
  python -m mdm_jax.benchmarks.caches --workdir=hf:FOLDER --length=256 --json

Texts are drawn with each cache (`sample.cache`) at temperature 1 and without
filters. Then an exact call at the same state of the text gives the probability
of each token that was drawn. The mean of

  log p(token | cached keys and values) - log p(token | the whole row)

over drawn tokens is the divergence of the cached sampler from the exact one,
KL(cached || exact), in nats per token. Errors are standard errors over texts.
All are timed in turn, in one process.
"""

import dataclasses
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich import box
from rich.table import Table

from mdm_jax import command_line, sample
from mdm_jax.benchmarks import timing
from mdm_jax.core import log_lines
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import batch_sharding, padded_rows, put
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.model.inference import pick
from mdm_jax.sampling.call import Call, Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.samples import Samples

# Steps between two whole calls; None: at the start of a block only.
REFRESH = None, 8, 4, 2
_PLAIN = {
  "schedule": "linear",
  "remasking": "none",  # of a token drawn twice, only the second draw is known
  "threshold": None,
  "entropy_bound": None,
}


@dataclasses.dataclass(frozen=True)
class Found:
  """What was measured of a cache.

  Attributes:
    cache: `sample.cache`.
    refresh: `sample.cache_refresh`.
    nats: divergence from the exact sampler, per drawn token.
    error: its standard error over texts.
    seconds: median time of a call.
    times_faster: the exact sampler's time, divided by this one's.
  """

  cache: str
  refresh: int | None
  nats: float
  error: float
  seconds: float
  times_faster: float


def measure(
  model: sample.Model,
  texts: int = 16,
  block: int = 32,
  repeats: int = 3,
  refresh: tuple[int | None, ...] = REFRESH,
  **settings: Any,
) -> list[Found]:
  """Returns what was measured, the exact sampler first.

  Args:
    model: a masked model.
    texts: number of texts.
    block: tokens per block.
    repeats: how often each is timed.
    refresh: values of `sample.cache_refresh`.
    **settings: other fields of `SampleConfig`.

  Raises:
    UserError: the model draws block by block or from left to right, or a
      setting is invalid.
  """
  if "cache" in model.method.unused:
    raise UserError(
      f"this model draws {model.method.draws}, and has an exact cache; give a"
      " masked model"
    )
  plain = dataclasses.asdict(model.settings().untruncated())
  given = plain | dict(_PLAIN, block_length=block) | settings
  given.pop("num_samples")
  ways = [("none", None)]
  ways += [(name, n) for name in ("prefix", "dual") for n in refresh]
  draw = lambda cache, n: model.generate(
    *("", texts), **given | {"cache": cache, "cache_refresh": n}
  )
  drawn = {way: draw(*way) for way in ways}  # compiles
  runs = {str(way): lambda way=way: draw(*way).path for way in ways}
  seconds = timing.interleave(runs, repeats)
  took = {way: statistics.median(seconds[str(way)]) for way in ways}
  return [
    Found(*way, *divergence(model, one), took[way], took[ways[0]] / took[way])
    for way, one in drawn.items()
  ]


def divergence(model: sample.Model, drawn: Samples) -> tuple[float, float]:
  """Returns nats per drawn token, and their standard error over texts.

  Args:
    model: the model that drew them, without a prompt, guidance or remasking.
    drawn: the texts; their temperature must have been 1, without filters.
  """
  trained = model._model
  new = drawn.step >= 0
  exact = np.zeros(drawn.step.shape)
  log_p = _log_p(trained.denoiser)
  texts = len(exact)
  rows = np.arange(padded_rows(texts, trained.mesh)) % texts
  place = lambda x: put(x[rows], batch_sharding(trained.mesh, 2))
  with jax.set_mesh(trained.mesh):
    for i, x in enumerate(drawn.path[:-1]):
      if (now := drawn.step == i).any():
        found = log_p(trained.params, place(x), place(drawn.path[-1]))
        exact[now] = np.asarray(found)[:texts][now]
  cached = np.log(np.where(new, drawn.confidence, 1.0))
  off = (cached - exact).sum(axis=1)
  mean = off.sum() / new.sum()
  residual = off - mean * new.sum(axis=1)
  spread = residual.std(ddof=1) if texts > 1 else np.nan
  return float(mean), float(spread * np.sqrt(texts) / new.sum())


def _log_p(denoiser: Denoiser):
  """Returns a (params, x, tokens) -> log p of tokens at their places in x."""
  vocab = denoiser.vocab

  def log_p(params, x, tokens):
    masked, end = x == vocab.mask, (x != vocab.pad).sum(axis=1)
    canvas = Canvas(x, jnp.ones_like(masked), end)
    call = Call(SampleConfig(), denoiser, vocab, params, canvas, x, masked, end)
    length = x.shape[1]
    where = jnp.arange(length)[None] + 0 * x  # sharded as the rows are

    def body(slots, kept, found):
      new = jax.nn.log_softmax(call.logits(slots))
      new = jnp.take_along_axis(new, pick(tokens, slots)[..., None], axis=2)
      at = jnp.where(kept, slots, length)
      write = lambda row, at, new: row.at[at].set(new, mode="drop")
      return jax.vmap(write)(found, at, new[..., 0])

    count = jnp.full_like(end, length)
    nothing = jnp.zeros_like(x, jnp.float32)
    return call.in_chunks(where, count, length, body, nothing)

  return jax.jit(log_p)


def _show(found: list[Found]) -> None:
  table = Table(title="approximate caches", box=box.SIMPLE_HEAD)
  for column in ("cache", "refreshed", "nats per token", "seconds", "faster"):
    table.add_column(column, justify="right" if table.columns else "left")
  for one in found:
    every = f"every {one.refresh} steps" if one.refresh else "by block"
    table.add_row(
      one.cache,
      "" if one.cache == "none" else every,
      f"{one.nats:.4f} ± {one.error:.4f}",
      f"{one.seconds:.3f}",
      f"{one.times_faster:.2f} x",
    )
  console.print(table)


def main(_: list[str]) -> int:
  values = flags.FLAGS
  try:
    found = measure(
      sample.load(values.workdir),
      *(values.texts, values.block, values.repeats),
      length=values.length,
      refresh=tuple(int(n) or None for n in values.refresh),
      num_steps=values.num_steps,
      order=values.order,
    )
  except UserError as error:
    return command_line.fail(error)
  _show(found)
  if values.json:
    print(json.dumps([dataclasses.asdict(one) for one in found]))
  return 0


def _define_flags() -> None:
  flags.DEFINE_string("workdir", "runs/quickstart", "A run, or hf:FOLDER.")
  flags.DEFINE_integer("texts", 16, "How many texts are drawn.", 2)
  flags.DEFINE_integer("block", 32, "Tokens per block.", 1)
  flags.DEFINE_integer("length", 128, "Tokens per text.", 1)
  flags.DEFINE_integer("num_steps", 32, "Steps per text.", 1)
  flags.DEFINE_list(
    "refresh",
    [str(n or 0) for n in REFRESH],
    "Steps between calls over whole rows; 0: only where a block begins.",
  )
  flags.DEFINE_string("order", "confidence", "Order, as in sample.order.")
  flags.DEFINE_integer("repeats", 3, "Timed calls of each.", 1)
  flags.DEFINE_bool("json", False, "Print JSON on the last line.")


if __name__ == "__main__":
  _define_flags()
  log_lines.run(main)
