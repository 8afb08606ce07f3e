"""How fast a model of blocks draws, with its exact cache and without.

Without it, each step is a call over the whole row, of the same program: what is
drawn is the same (`block_reader.WholeRows`). All are timed in turn.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mdm_jax.benchmarks import timing
from mdm_jax.benchmarks.timing import Timed
from mdm_jax.core import rng
from mdm_jax.core.sharding import batch_sharding, padded_rows, put
from mdm_jax.model import flops
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import blocks, schedule, tokens
from mdm_jax.sampling.block_reader import WholeRows
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import rows_a_call
from mdm_jax.sampling.samplers import SAMPLERS

_PLAIN = SampleConfig(order="random").untruncated()


@dataclasses.dataclass(frozen=True)
class Loop:
  """A model to draw from.

  Attributes:
    denoiser: the model.
    params: its parameters.
    decoding: how its objective is drawn from.
    length: tokens per text.
    fields: of `SampleConfig`.
  """

  denoiser: Denoiser
  params: Params
  decoding: Decoding
  length: int
  fields: Mapping[str, Any]

  @property
  def has_cache(self) -> bool:
    """Whether it draws in several blocks, so that there is an exact cache."""
    return self.decoding.order == "blocks" and self.block < self.length

  @property
  def ways(self) -> tuple[bool, ...]:
    """With its cache (True) or by whole rows: what can be timed."""
    if self.has_cache:
      return True, False
    return (self.decoding.order == "left_to_right",)

  @property
  def block(self) -> int:
    """Tokens of a block."""
    return min(self.decoding.block or self.length, self.length)

  def flops(self, calls: float) -> tuple[float, float]:
    """Returns the FLOPs of a text with the cache and by calls of whole rows.

    Of matrix products, with an output projection of each token that is drawn.
    What a threshold needs besides, logits of all masked tokens, is left out.

    Args:
      calls: denoiser calls of the text.
    """
    config, n = self.denoiser.config, self.length
    trunk = lambda *read: flops.trunk_flops(config, 1, [read])
    head = flops.head_flops(config, n, self.denoiser.vocab.size)
    # A block's first call also reads the block before it.
    number = -(-n // self.block)
    cached = (calls + number) * trunk(self.block, n)
    return cached + head, calls * trunk(n, n) + head


def measure(loops: Mapping[str, Loop], repeats: int) -> list[dict[str, Any]]:
  """Returns what drawing takes, for each loop.

  Calls are those of a text, the mean over the texts of a call of the program.

  Args:
    loops: what to draw from, by name.
    repeats: turns of the timing.
  """
  runs, calls = {}, {}
  for name, loop in loops.items():
    for cache in loop.ways:
      runs[_key(name, cache)] = run = _run(loop, cache)
      calls[name] = float(np.asarray(run().calls).mean())
  seconds = timing.interleave(runs, repeats)
  found = []
  for name, loop in loops.items():
    drawn = loop.length * _rows(loop.length)
    one = {"name": name, "block": loop.block, "length": loop.length}
    one |= {"calls": calls[name], "calls_per_token": calls[name] / loop.length}
    for cache in (True, False):
      if taken := seconds.get(_key(name, cache)):
        spread = timing.spread(taken)
        # Of the fastest turn: what other load delays is not the program's.
        rate = {"tokens_per_second": drawn / spread["min"]}
        one["cache" if cache else "whole_rows"] = spread | rate
    if loop.has_cache:
      cached, whole = loop.flops(calls[name])
      one["flops"] = {"cache": cached, "whole_rows": whole}
      one["times_faster"] = {
        "median": one["whole_rows"]["median"] / one["cache"]["median"],
        "min": one["whole_rows"]["min"] / one["cache"]["min"],
        "arithmetic": whole / cached,
      }
    found.append(one)
  return found


def _key(name: str, cache: bool) -> str:
  return f"{name}, {'cache' if cache else 'whole rows'}"


def _rows(length: int) -> int:
  rows = rows_a_call(length, jax.default_backend())
  return padded_rows(rows, jax.sharding.get_mesh())


def _run(loop: Loop, cache: bool) -> Timed:
  """Returns a sampler call of as many rows as the program draws at once."""
  mesh, rows = jax.sharding.get_mesh(), _rows(loop.length)
  place = lambda x: put(np.asarray(x), batch_sharding(mesh, np.ndim(x)))
  # No end of text: a text that ends early would take fewer steps.
  vocab = dataclasses.replace(loop.denoiser.vocab, end=None)
  config = dataclasses.replace(_PLAIN, **loop.fields)
  static = config, loop.denoiser, vocab, loop.decoding
  if loop.has_cache and not cache:
    sample = blocks.make_sampler(*static, reader=WholeRows)
  else:
    sample = SAMPLERS[loop.decoding.order].make(*static, None)
  shape = rows, loop.length
  canvas = Canvas(
    place(np.full(shape, vocab.need("mask"), np.int32)),
    place(np.ones(shape, bool)),
    place(np.full(rows, loop.length, np.int32)),
  )
  pace = put(schedule.pace(config, loop.length), NamedSharding(mesh, P()))
  settings = tokens.effective_settings(config)
  keys = rng.per_row(rng.stream(0, "sample"), jnp.arange(rows))
  keys = jax.device_put(keys, batch_sharding(mesh, 1))
  return lambda: sample(loop.params, canvas, pace, settings, keys)


COLUMNS = (
  *("drawn from", "calls per text", "per token", "tokens/s, cache"),
  *("by whole rows", "times faster", "by the fastest", "by FLOPs"),
)


def cells(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Returns the rows of a table with `COLUMNS`."""
  lines = []
  for one in found:
    rate = lambda way: (  # noqa: B023
      f"{one[way]['tokens_per_second']:,.0f}" if way in one else ""  # noqa: B023
    )
    faster = one.get("times_faster", {})
    lines.append(
      [
        one["name"],
        f"{one['calls']:.1f}",
        f"{one['calls_per_token']:.2f}",
        rate("cache"),
        rate("whole_rows"),
        *(
          f"{faster[way]:.2f}" if faster else ""
          for way in ("median", "min", "arithmetic")
        ),
      ]
    )
  return lines
