"""Reading the collectives of a partitioned program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from mesh_harness import make_mesh

from mdm_jax.benchmarks import collectives
from mdm_jax.core.sharding import MeshConfig, planned_mesh

MESH = planned_mesh(MeshConfig(replica=2, fsdp=3, tensor=4))


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1,2,3},{4,5,6,7}}", ("tensor",)),
    ("{{0},{1}}", ()),
    ("[6,4]<=[24]", ("tensor",)),
    ("[8,3]<=[2,3,4]T(0,2,1)", ("fsdp",)),
    ("[12,2]<=[2,12]T(1,0)", ("replica",)),
    ("[4,6]<=[6,4]T(1,0)", ("replica", "fsdp")),
    ("mesh['a'=2,'b'=3,'c'=4] {'b'}", ("fsdp",)),
    ("mesh['a'=6,'b'=4] {'a'}", ("replica", "fsdp")),
    ("mesh['a'=4,'b'=6], device_ids=([6,4]T(1,0)) {'b'}", ("replica", "fsdp")),
    ("mesh['a'=4,'b'=6], device_ids=([6,4]T(1,0)) {'a'}", ("tensor",)),
  ],
)
def test_groups_of_devices_are_along_mesh_axes(groups, axes):
  line = (
    f"  %x = f32[8,2]{{1,0}} all-reduce(%y), replica_groups={groups}, a={{0}}"
  )
  text = "\n".join(["ENTRY %main (p: f32[8]) -> f32[8] {", line, "}"])
  (found,) = collectives.read(text, MESH)
  assert found.axes == axes
  assert found.kind == "all-reduce" and found.shape == "f32[8,2]"
  assert found.bytes == found.total == 64


def measured(function, *args):
  """Returns the collectives of a function of arrays on 4 x 2 devices."""
  mesh = make_mesh("4x2")
  with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
    args = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in args]
    return collectives.collectives(jax.jit(function).lower(*args), mesh)


def test_a_loops_collectives_are_counted_as_often_as_it_goes_around():
  def product(x, w):
    step = lambda x, _: (
      jnp.einsum("bd,de->be", x, w, out_sharding=P("fsdp", None)),
      None,
    )
    return jax.lax.scan(step, x, None, length=5)[0]

  (found,) = measured(
    product,
    (jnp.ones((8, 16), jnp.bfloat16), P("fsdp", None)),
    (jnp.ones((16, 16), jnp.bfloat16), P("fsdp", None)),
  )
  assert (found.kind, found.axes) == ("all-gather", ("fsdp",))
  assert found.times == 5 and found.total == 5 * 16 * 16 * 2
  assert "dot_general" in found.source


def test_a_sum_that_is_cut_counts_what_goes_in():
  def scattered(x):
    add = lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True)
    return jax.shard_map(
      add, in_specs=P("fsdp", None), out_specs=P(("fsdp", "tensor"))
    )(x)

  (found,) = measured(scattered, (jnp.ones((32, 6)), P("fsdp", None)))
  assert (found.kind, found.axes) == ("reduce-scatter", ("tensor",))
  assert found.bytes == 8 * 6 * 4


def test_a_program_without_any_has_none():
  assert measured(jnp.sin, (jnp.ones((8, 2)), P("fsdp", None))) == []
