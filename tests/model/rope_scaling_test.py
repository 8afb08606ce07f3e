"""Rotary frequencies, scaled: which are kept, and which are divided."""

import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.core.fields import check
from mdm_jax.model import layers
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.rope_scaling import RopeScaling, frequencies

THETA, SIZE = 100.0, 8
PLAIN = THETA ** -(np.arange(0, SIZE, 2) / SIZE)  # 6 to 200 tokens a rotation
KINDS = {
  "linear": (RopeScaling(kind="linear", factor=3.0), [3, 3, 3, 3], 1.0),
  # 32 tokens are 5.1, 1.6, 0.5 and 0.16 rotations.
  "llama3": (
    RopeScaling(kind="llama3", factor=3.0, original_length=32),
    [1, None, 3, 3],
    1.0,
  ),
  "yarn": (
    RopeScaling(
      kind="yarn", factor=3.0, original_length=32, beta_fast=5.0, beta_slow=0.2
    ),
    [1, None, None, None],
    0.1 * np.log(3) + 1,
  ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_high_frequencies_are_kept_and_low_ones_divided(kind):
  scaling, divided, size = KINDS[kind]
  found, factor = frequencies(scaling, SIZE, THETA)
  ratio = PLAIN / found
  assert factor == pytest.approx(size)
  assert (np.diff(ratio) > -1e-6).all()
  for at, wanted in enumerate(divided):
    assert (
      1 < ratio[at] < 3
      if wanted is None
      else ratio[at] == pytest.approx(wanted)
    )


def test_rotations_have_these_angles_and_the_factor():
  scaling = KINDS["yarn"][0]
  wanted, size = frequencies(scaling, SIZE, THETA)
  cos, sin = layers.rotary(jnp.array([[7]]), SIZE, THETA, scaling)
  np.testing.assert_allclose(cos[0, 0, :4], size * np.cos(7 * wanted), 1e-5)
  np.testing.assert_allclose(sin[0, 0, 4:], size * np.sin(7 * wanted), 1e-5)


def test_a_range_without_frequencies_is_refused():
  with pytest.raises(UserError, match="m.beta_fast=1 must exceed 1"):
    check(RopeScaling(beta_fast=1.0), "m")
  model = ModelConfig(rope_theta=1.0, rope_scaling=RopeScaling(kind="yarn"))
  with pytest.raises(UserError, match="m.rope_theta=1 must exceed 1"):
    check(model, "m")
