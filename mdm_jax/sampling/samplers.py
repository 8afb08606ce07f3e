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
from mdm_jax.sampling import left_to_right, sampler
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.sampler import Sampler, Watch
from mdm_jax.sampling.template import PromptError

_Make = Callable[
  [SampleConfig, Denoiser, Vocabulary, Decoding, Watch | None], Sampler
]


@dataclasses.dataclass(frozen=True)
class Method:
  """A sampler, and which settings and prompts it can follow.

  Attributes:
    make: returns the jitted sampler for a config's static settings.
    steps: (config, tokens per text) -> the largest number of steps of a text.
    unused: fields of `SampleConfig` that have no effect.
    any_hole: whether given tokens may follow free ones.
  """

  make: _Make
  steps: Callable[[SampleConfig, int], int]
  unused: tuple[str, ...] = ()
  any_hole: bool = True

  def check(self, config: SampleConfig) -> None:
    """Raises UserError if a setting has no effect but is not the default."""
    plain = SampleConfig()
    for name in self.unused:
      value, default = getattr(config, name), getattr(plain, name)
      # The name of what happens anyway is no contradiction.
      if value not in (default, "left_to_right"):
        raise UserError(
          f"sample.{name}={value!r} has no effect: this model draws one token"
          f" per step, from left to right; set sample.{name}={default!r}"
        )

  def check_canvas(self, canvas: Canvas) -> None:
    """Raises PromptError if a prompt has text behind a hole."""
    if self.any_hole:
      return
    places = np.arange(canvas.tokens.shape[1])[None]
    given = ~canvas.free & (places < canvas.lengths[:, None])
    before = np.cumsum(canvas.free, axis=1) > 0
    for row in np.flatnonzero((given & before).any(axis=1)):
      raise PromptError(
        int(row) + 1,
        len(given),
        "there is text behind a hole, but this model draws from left to right;"
        " end the prompt at its first [MASK]",
      )


SAMPLERS: Registry[Method] = Registry("order of drawing", "Decoding.order")

SAMPLERS.register(
  "any_order",
  Method(
    make=lambda config, model, vocab, decoding, watch: sampler.make_sampler(
      config, model, vocab, watch
    ),
    steps=lambda config, length: config.num_steps,
  ),
)
SAMPLERS.register(
  "left_to_right",
  Method(
    make=lambda config, *args: left_to_right.make_sampler(*args),
    steps=lambda config, length: length,
    unused=(
      *("num_steps", "order", "end_last", "block_length", "schedule"),
      *("entropy_bound", "threshold"),
      *("remasking", "remasking_rate", "guidance"),
    ),
    any_hole=False,
  ),
)
