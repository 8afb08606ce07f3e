"""Looking up ids in an embedding table that is split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core.sharding import RULES
from mdm_jax.model.embedding import look_up

V, D = 24, 8
F32, BF16 = np.dtype(np.float32), jnp.dtype(jnp.bfloat16)
IDS = np.random.default_rng(0).integers(0, V, (8, 5))


@pytest.fixture
def case(any_mesh):
  """A table and ids, as a step on some mesh has them."""
  draw = np.random.default_rng(1)
  table = draw.normal(size=(V, D)).astype(np.float32)
  put = lambda x, *names: jax.device_put(
    x, jax.NamedSharding(any_mesh, RULES.spec(*names))
  )
  return (
    put(table, "vocab", "embed"),
    put(IDS.astype(np.int32), "batch", "length"),
  )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_it_gives_the_tables_rows(case, dtype):
  table, ids = case
  found = jax.jit(look_up, static_argnums=0)(dtype, table, ids)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, np.asarray(table.astype(dtype))[IDS])


def test_its_gradient_adds_up_by_id(case):
  table, ids = case
  weight = np.random.default_rng(2).normal(size=(*IDS.shape, D))

  def loss(table):
    return (look_up(F32, table, ids) * weight.astype(np.float32)).sum()

  grad = jax.jit(jax.grad(loss))(table)
  expected = np.zeros((V, D))
  np.add.at(expected, IDS, weight)
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
  assert jax.typeof(grad).sharding.spec == RULES.spec("vocab", "embed")


def test_one_id_for_all_tokens_loses_nothing_in_bfloat16(case):
  """In bfloat16, 256 and 1 are 256: so many masks would count as half."""
  table, _ = case
  rows = RULES.spec("batch", None)
  ids = jnp.full((8, 64), 3, jnp.int32, out_sharding=rows)
  loss = lambda table: look_up(BF16, table, ids).sum()
  grad = jax.jit(jax.grad(loss))(table)
  np.testing.assert_array_equal(np.asarray(grad)[3], 512.0)
