"""Scaled rotary frequencies (`model.rope_scaling`), for long contexts.

They are those that transformers computes for the same settings.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import SIZE, fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies differ from those of `model.rope_theta`."""

  kind: Literal["default", "linear", "llama3", "yarn"] = fixed(
    "default",
    "default: not at all; linear: all divided by factor; llama3 and yarn: the"
    " low ones divided, the high ones kept",
  )
  factor: float = fixed(1.0, "what frequencies are divided by", "[1, 1e6]")
  original_length: int = fixed(
    8192, "tokens that llama3 and yarn were trained on before", SIZE
  )
  low_freq_factor: float = fixed(
    1.0,
    "llama3: divided from fewer rotations in original_length on",
    "(0, 1e6]",
  )
  high_freq_factor: float = fixed(
    4.0, "llama3: kept from more rotations in original_length on", "(0, 1e6]"
  )
  beta_fast: float = fixed(
    32.0, "yarn: kept from more rotations in original_length on", "(0, 1e6]"
  )
  beta_slow: float = fixed(
    1.0, "yarn: divided from fewer rotations in original_length on", "(0, 1e6]"
  )
  attention_factor: float | None = fixed(
    None,
    "yarn: factor on queries and keys (None: 0.1 ln(factor) + 1)",
    "(0, 1e6]",
  )
  truncate: bool = fixed(True, "yarn: round the range between both to entries")

  def check(self, path: str) -> None:
    """Raises UserError if the range of frequencies between is empty."""
    for name, low, high in (
      ("high_freq_factor", self.low_freq_factor, self.high_freq_factor),
      ("beta_fast", self.beta_slow, self.beta_fast),
    ):
      if low >= high:
        raise UserError(
          f"{path}.{name}={high:g} must exceed {low:g}; nearest: {low * 4:g}"
        )


UNSCALED = RopeScaling()


def frequencies(
  scaling: RopeScaling, head_size: int, theta: float
) -> tuple[Float32[np.ndarray, "H"], float]:
  """Returns the frequency of each pair of entries, and a factor on rotations.

  Args:
    scaling: how they are scaled.
    head_size: K, even; there are K / 2 frequencies.
    theta: base of the frequencies, above 1.
  """
  plain = float(theta) ** -(np.arange(0, head_size, 2) / head_size)
  if scaling.kind == "llama3":
    kept, size = _kept_by_llama3(scaling, plain), 1.0
  elif scaling.kind == "yarn":
    kept, size = _kept_by_yarn(scaling, head_size, theta), _size(scaling)
  else:
    kept, size = np.zeros_like(plain), 1.0
  mixed = plain * (kept + (1 - kept) / scaling.factor)
  return mixed.astype(np.float32), size


def _kept_by_llama3(
  scaling: RopeScaling, plain: Float64[np.ndarray, "H"]
) -> Float64[np.ndarray, "H"]:
  """Returns the share of each frequency that is kept (arXiv 2407.21783)."""
  rotations = scaling.original_length * plain / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  return np.clip((rotations - low) / (high - low), 0, 1)


def _kept_by_yarn(
  scaling: RopeScaling, head_size: int, theta: float
) -> Float64[np.ndarray, "H"]:
  """Returns the share of each frequency that is kept (arXiv 2309.00071)."""

  def entry(rotations: float) -> float:
    """Returns which entry of a head makes so many rotations."""
    wavelength = scaling.original_length / (rotations * 2 * math.pi)
    return head_size * math.log(wavelength) / (2 * math.log(theta))

  first, past = entry(scaling.beta_fast), entry(scaling.beta_slow)
  if scaling.truncate:
    first, past = math.floor(first), math.ceil(past)
  first, past = max(first, 0), min(past, head_size - 1)
  # As in transformers, where both are the same.
  width = past - first or 0.001
  return 1 - np.clip((np.arange(head_size // 2) - first) / width, 0, 1)


def _size(scaling: RopeScaling) -> float:
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  return grown(scaling.factor)


def grown(factor: float, scale: float = 1.0) -> float:
  """Returns YaRN's factor on rotations, for a context that grows by `factor`.

  Args:
    factor: of the frequencies.
    scale: of the factor's logarithm; `mscale` in config.json.
  """
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1
