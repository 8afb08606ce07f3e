"""Gradients, written by hand or not, against JAX's own of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array
from mesh_harness import make_mesh

from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES, MeshConfig, planned_mesh
from mdm_jax.model import cpu_gradients, layers
from mdm_jax.model.kernels import Reference

B, L, D, G, R, K, F = 8, 6, 8, 4, 2, 4, 24

# Equation, axes of x, of the weight and of the result; D into F and back, so
# that either factor is the smaller one.
PRODUCTS = {
  "into heads": (
    *("bld,dgrk->bgrlk", (B, L, D), (D, G, R, K)),
    *(("embed", "heads", None, None), ("batch", "heads", None, "length", None)),
  ),
  "out of heads": (
    *("bgrlk,grkd->bld", (B, G, R, L, K), (G, R, K, D)),
    *(("heads", None, None, "embed"), ("batch", "length", None)),
  ),
  "wider": (
    *("bld,df->blf", (B, L, D), (D, F)),
    *(("embed", "mlp"), ("batch", "length", "mlp")),
  ),
  "narrower": (
    *("blf,fd->bld", (B, L, F), (F, D)),
    *(("mlp", "embed"), ("batch", "length", None)),
  ),
}


def draw(name: str, shape: tuple[int, ...], *axes: str | None) -> Array:
  x = jax.random.normal(rng.stream(0, name), shape)
  return jax.device_put(x, RULES.spec(*axes))


def axes_of(letters: str) -> tuple[str | None, ...]:
  names = {"b": "batch", "g": "heads", "f": "mlp"}
  return tuple(names.get(letter) for letter in letters)


def assert_close(got, want, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want
  )


@pytest.fixture(params=["by hand", "plain"])
def written(request, monkeypatch):
  """As on a CPU, then as anywhere else."""
  by_hand = request.param == "by hand"
  monkeypatch.setattr(cpu_gradients, "wanted", lambda: by_hand)


def test_only_what_runs_on_cpus_has_gradients_written_by_hand(any_mesh):
  def program():
    shape = lambda sizes, *axes: jax.ShapeDtypeStruct(
      sizes,
      jnp.float32,
      sharding=NamedSharding(
        jax.sharding.get_abstract_mesh(), RULES.spec(*axes)
      ),
    )
    loss = lambda x, weight: layers.project(
      "y", "blf,fd->bld", x, nnx.Param(weight), "batch", "length", None
    ).sum()
    x = shape((B, L, F), "batch", "length", "mlp")
    weight = shape((F, D), "mlp", "embed")
    return str(jax.make_jaxpr(jax.grad(loss, argnums=1))(x, weight))

  assert "optimization_barrier" in program()
  sizes = MeshConfig(**any_mesh.shape)
  with jax.sharding.use_abstract_mesh(planned_mesh(sizes)):
    assert not cpu_gradients.wanted()
    assert "optimization_barrier" not in program()


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_products_gradients_are_jaxs_own(any_mesh, written, name):
  equation, x_shape, weight_shape, weight_axes, axes = PRODUCTS[name]
  x = draw("x", x_shape, *axes_of(equation.split(",")[0]))
  weight = draw("weight", weight_shape, *weight_axes)

  def ours(x, weight):
    y = layers.project("y", equation, x, nnx.Param(weight), *axes)
    return (y * jnp.sin(y)).sum()

  def plain(x, weight):
    y = jnp.einsum(equation, x, weight, out_sharding=RULES.spec(*axes))
    return (y * jnp.sin(y)).sum()

  gradient = lambda f: jax.jit(jax.grad(f, argnums=(0, 1)))(x, weight)
  got = gradient(ours)
  assert_close(got, gradient(plain), rtol=1e-4, atol=1e-4)
  assert got[1].sharding.spec == weight.sharding.spec


def test_a_weights_gradient_is_summed_in_the_weights_dtype(mesh, written):
  """65,536 ones: bfloat16 has no number between 256 and 258."""
  x = draw("x", (8, 8192, 1), "batch", None, None)
  ones = jnp.ones_like(x).astype(jnp.bfloat16)
  weight = draw("weight", (1, 1), "embed", "mlp")

  def total(weight):
    y = layers.project(
      "y", "bld,df->blf", ones, nnx.Param(weight), "batch", "length", "mlp"
    )
    return y.astype(jnp.float32).sum()

  grad = jax.jit(jax.grad(total))(weight)
  assert grad.dtype == jnp.float32 and grad[0, 0] == 65_536


def test_swiglu_and_its_gradient_are_the_formulas(any_mesh, written):
  x = draw("x", (B, L, D), "batch", "length", None)
  gate, up = (
    0.5 * draw(name, (D, F), "embed", "mlp") for name in ("gate", "up")
  )
  ours = lambda *args: jnp.sin(layers.swiglu(*args)).sum()

  split = RULES.spec("batch", "length", "mlp")

  def plain(x, gate, up):
    g, u = (
      jnp.einsum("bld,df->blf", x, w, out_sharding=split) for w in (gate, up)
    )
    return jnp.sin(g / (1 + jnp.exp(-g)) * u).sum()

  both = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(
    x, gate, up
  )
  assert_close(both(ours), both(plain), rtol=1e-4, atol=1e-4)


# MARK: attention


def softmax_attention(query, key, value, visible):
  """As in a textbook, one query head after the other."""
  scores = jnp.einsum("bgrlk,bgmk->bgrlm", query, key) / K**0.5
  scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1)
  return jnp.einsum("bgrlm,bgmk->bgrlk", weights, value)


def attention_inputs(repeats: int):
  heads = "batch", "heads"
  query = 2 * draw("query", (B, G, repeats, L, K), *heads, None, None, None)
  key, value = (
    draw(name, (B, G, L, K), *heads, None, None) for name in ("key", "value")
  )
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]] * (B // 2))
  visible = segments[:, :, None] == segments[:, None, :]
  return query, key, value, jax.device_put(visible, RULES.spec("batch"))


@pytest.mark.parametrize("repeats", [1, 3])
def test_attention_and_its_gradient_are_the_textbooks(
  any_mesh, written, repeats
):
  *inputs, visible = attention_inputs(repeats)

  def both(attend):
    loss = lambda *qkv: jnp.sin(attend(*qkv, visible)).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)

  got, want = both(Reference().attend), both(softmax_attention)
  assert_close(got, want, rtol=2e-4, atol=1e-5)


def test_nothing_flows_between_positions_that_do_not_see_each_other(
  mesh, written
):
  query, key, value, visible = attention_inputs(1)
  here = np.zeros(query.shape, np.float32)
  here[0, :, :, :3] = 1  # segment 1 of the first row
  here = jax.device_put(here, query.sharding)

  def first(*qkv):
    return (here * Reference().attend(*qkv, visible)).sum()

  grads = jax.jit(jax.grad(first, argnums=(0, 1, 2)))(query, key, value)
  for grad in grads:
    grad = np.asarray(grad).reshape(B, G, L, K)
    assert np.abs(grad[0, :, :3]).max() > 0
    assert (grad[0, :, 3:] == 0).all() and (grad[1:] == 0).all()


def test_large_scores_overflow_nothing(mesh, written):
  query, key, value, visible = attention_inputs(1)
  loss = lambda q: Reference().attend(q, key, value, visible).sum()
  grad = jax.jit(jax.grad(loss))(1e4 * query)
  assert np.isfinite(grad).all()


def test_no_layers_attention_weights_are_kept():
  """Memory grows with a layer's hidden states, not with L x L weights."""
  length, layers_ = 256, 4
  with jax.set_mesh(make_mesh("1x1")):
    query, key, value = (
      jnp.ones((1, 1, *repeats, length, K)) for repeats in ((1,), (), ())
    )
    visible = jnp.ones((1, length, length), bool)

    def loss(query):
      def body(query, _):
        return Reference().attend(query, key, value, visible), None

      return jax.lax.scan(body, query, length=layers_)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(query).compile()
  weights = 4 * length**2
  assert program.memory_analysis().temp_size_in_bytes < layers_ * weights


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_is_the_formula_with_its_scale_and_epsilon(dtype, eps):
  x = jax.random.normal(jax.random.key(0), (3, 5, 8)).astype(dtype)
  scale = jnp.linspace(-1.0, 2.0, 8)
  exact = np.asarray(x, np.float64)
  exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + eps)
  found = layers.rms_norm(x, scale, eps)
  assert found.dtype == dtype
  tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
  np.testing.assert_allclose(
    np.asarray(found, np.float64), exact * np.asarray(scale), rtol=tolerance
  )
