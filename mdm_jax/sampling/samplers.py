"""The samplers, by the order in which a model can draw: `SAMPLERS`.

An objective names the order (`objectives.base.Decoding.order`); `generate.py`
looks the sampler up.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mdm_jax.core.errors import UserError
from mdm_jax.core.registry import Registry
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import approximate_cache, blocks, left_to_right, sampler
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.sampler import Sampler, Watch
from mdm_jax.sampling.template import Candidates, PromptError

_Make = Callable[
  [SampleConfig, Denoiser, Vocabulary, Decoding, Watch | None], Sampler
]


@dataclasses.dataclass(frozen=True)
class Method:
  """A sampler, and which settings and prompts it can follow.

  Attributes:
    make: returns the jitted sampler for a config's static settings.
    steps: (config, tokens per text, decoding) -> the largest number of steps of
      a text.
    unused: fields of `SampleConfig` that have no effect.
    draws: how it draws, for messages.
    block: decoding -> the tokens of a block: given tokens may follow free ones
      in the same block only; None if they may everywhere.
  """

  make: _Make
  steps: Callable[[SampleConfig, int, Decoding], int]
  unused: tuple[str, ...] = ()
  draws: str = ""
  block: Callable[[Decoding], int] | None = None

  def check(self, config: SampleConfig) -> None:
    """Raises UserError if a setting has no effect but is not the default."""
    plain = SampleConfig()
    for name in self.unused:
      value, default = getattr(config, name), getattr(plain, name)
      # The name of what happens anyway is no contradiction.
      if value not in (default, "left_to_right"):
        raise UserError(
          f"sample.{name}={value!r} has no effect: this model draws"
          f" {self.draws}; set sample.{name}={default!r}"
        )

  def check_canvas(self, canvas: Canvas, decoding: Decoding) -> None:
    """Raises PromptError if a prompt has text behind a hole, out of sight."""
    if self.block is None:
      return
    length = canvas.tokens.shape[1]
    places = np.arange(length)[None]
    block = places // self.block(decoding)
    given = ~canvas.free & (places < canvas.lengths[:, None])
    hole = np.where(canvas.free, block, length).min(axis=1, keepdims=True)
    before = np.cumsum(canvas.free, axis=1) > 0
    # Blocks of one token are single tokens, from left to right.
    for row in np.flatnonzero((given & before & (block > hole)).any(axis=1)):
      raise PromptError(
        int(row) + 1,
        len(given),
        f"there is text behind a hole, but this model draws {self.draws}; end"
        " the prompt at its first [MASK]",
      )

  def check_lengths(self, found: Candidates) -> None:
    """Raises PromptError if a length isn't told, and can't be decided."""
    if self.draws:
      for text in np.flatnonzero(found.counts > 1):
        raise PromptError(
          int(text) + 1,
          len(found.counts),
          "the length of a hole is not told, but this model draws"
          f" {self.draws}; tell it, as in [MASK:5], or write [MASK:*] at the"
          " end",
        )


SAMPLERS: Registry[Method] = Registry("order of drawing", "Decoding.order")


def _any_order(config, model, vocab, decoding, watch) -> Sampler:
  del decoding
  room = sampler if config.cache == "none" else approximate_cache
  return room.make_sampler(config, model, vocab, watch)


SAMPLERS.register(
  "any_order",
  Method(
    make=_any_order,
    steps=lambda config, length, decoding: config.num_steps,
  ),
)
SAMPLERS.register(
  "left_to_right",
  Method(
    make=lambda config, *args: left_to_right.make_sampler(*args),
    steps=lambda config, length, decoding: length,
    unused=(
      *("num_steps", "order", "end_last", "block_length", "schedule"),
      *("entropy_bound", "threshold"),
      *("remasking", "remasking_rate", "guidance"),
      *("cache", "cache_refresh", "hole_length", "hole_rule"),
    ),
    draws="one token per step, from left to right",
    block=lambda decoding: 1,
  ),
)
SAMPLERS.register(
  "blocks",
  Method(
    make=blocks.make_sampler,
    steps=blocks.most_steps,
    # Without the prompt, blocks before the current one would be masked, which a
    # model never reads in training.
    unused=(
      *("guidance", "cache", "cache_refresh"),
      *("hole_length", "hole_rule"),
    ),
    draws="block by block, each from the clean text before it",
    block=lambda decoding: decoding.block,
  ),
)
