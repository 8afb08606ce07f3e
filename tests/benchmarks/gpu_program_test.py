"""Reading the kernels of a program that was compiled for a GPU."""

import dataclasses

import pytest
from paths import GOLDEN

from mdm_jax.benchmarks import gpu_program, hlo
from mdm_jax.benchmarks.gpu_program import Rates

RATES = Rates(memory=1e9, half=100e9, float32=50e9, attention=5e9)

# As XLA prints a loop over 12 layers for an H100, with less of everything: it
# takes a layer's slice of the weights, multiplies, and puts the result into an
# array over all layers.
LOOP = (GOLDEN / "gpu_loop.txt").read_text()


def found(text=LOOP):
  """Returns the kernels by name."""
  kernels = gpu_program.kernels(text, RATES)
  assert kernels == sorted(kernels, key=lambda k: -k.seconds)
  return {kernel.name: kernel for kernel in kernels}


def only(name, *lines):
  """Returns a kernel of a program of these lines."""
  body = "\n".join(f"  {line}" for line in lines)
  return found(f"ENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}")[name]


# MARK: loops and fusions


def test_a_loops_kernels_run_as_often_as_it_goes_around():
  kernels = found()
  assert {name: kernel.times for name, kernel in kernels.items()} == {
    "next": 12,
    "weight": 12,
    "product": 12,
    "stacked": 12,
    "copy": 1,
  }


def test_without_a_known_count_the_condition_has_it():
  text = LOOP.replace(
    ', backend_config={"known_trip_count":{"n":"12"}}', ""
  ).replace("constant(12)", "constant(7)")
  assert found(text)["product"].times == 7
  text = text.replace("constant(7)", "parameter(1)")
  assert found(text)["product"].times == 1


def test_of_a_slice_only_the_slice_is_read():
  weight = found()["weight"]
  assert weight.kind == "loop fusion"
  # Read and written; and the 4 bytes of the index.
  assert weight.bytes == 12 * (2 * 64 * 32 * 2 + 4)


def test_of_an_update_in_place_only_the_update_is_written():
  written, read, index = 16 * 32 * 4, 16 * 32 * 2, 4
  assert found()["stacked"].bytes == 12 * (written + read + index)


def test_a_value_that_is_also_read_whole_counts_once():
  text = LOOP.replace(
    "ROOT %bitcast.1 = bf16[64,32]{1,0} bitcast(%slice.1)",
    "ROOT %sum.1 = bf16[64,32]{1,0} custom(%param_0.1, %slice.1)",
  )
  assert found(text)["weight"].bytes == 12 * (13 * 64 * 32 * 2 + 4)


def test_a_value_that_is_only_cast_is_read():
  text = LOOP.replace(
    "ROOT %bitcast.1 = bf16[64,32]{1,0} bitcast(%slice.1)",
    "ROOT %cast.1 = bf16[12,64,32]{2,1,0} convert(%param_0.1)",
  )
  assert found(text)["weight"].bytes == 12 * (2 * 12 * 64 * 32 * 2 + 4)


def test_a_fusion_with_a_product_is_a_product():
  product = found()["product"]
  assert product.kind == "product of bf16"
  assert product.operations == 12 * 2 * 16 * 64 * 32
  assert product.bytes == 12 * 2 * (16 * 64 + 64 * 32 + 16 * 32)
  assert product.source == "jit(step)/while/body/dot_general"


def test_time_is_the_longer_of_memory_and_products():
  kernels = found()
  copy, product = kernels["copy"], kernels["product"]
  assert copy.bytes == 2 * 12 * 16 * 32 * 4 and copy.operations == 0
  assert copy.seconds == copy.bytes / 1e9
  assert product.seconds == product.bytes / 1e9
  fast = Rates(memory=1e15, half=100e9, float32=50e9, attention=5e9)
  (product,) = (
    k for k in gpu_program.kernels(LOOP, fast) if k.name == "product"
  )
  assert product.seconds == pytest.approx(product.operations / 100e9)


def test_kinds_are_summed():
  kinds = gpu_program.sums(found().values(), lambda kernel: kernel.kind)
  assert set(kinds) == {"product of bf16", "loop fusion", "copy"}
  assert kinds["loop fusion"]["times"] == 36
  total = sum(kernel.seconds for kernel in found().values())
  assert sum(kind["seconds"] for kind in kinds.values()) == pytest.approx(total)


def test_kernels_of_unrolled_layers_are_one_line():
  product = found()["product"]
  twice = [product, dataclasses.replace(product, name="other")]
  (group,) = gpu_program.sums(twice, str).items()
  name, total = group
  assert name == "product of bf16: jit(step)/dot_general"
  assert total["times"] == 24 and total["bytes"] == 2 * product.bytes


# MARK: library calls and single operations


def test_a_batched_product_of_float32_runs_at_its_rate():
  dot = only(
    "dot",
    "%left = f32[8,16,64]{2,1,0} parameter(0)",
    "%right = f32[8,32,64]{2,1,0} parameter(1)",
    "ROOT %dot = f32[8,16,32]{2,1,0} dot(%left, %right), lhs_batch_dims={0},"
    " lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={2}",
  )
  assert dot.kind == "product of f32"
  assert dot.operations == 2 * 8 * 16 * 32 * 64
  assert dot.bytes == 4 * 8 * (16 * 64 + 32 * 64 + 16 * 32)


def test_a_product_by_cublas_counts_without_its_scratch_space():
  gemm = only(
    "gemm",
    "%x = bf16[16,64]{1,0} parameter(0)",
    "%y = bf16[64,32]{1,0} parameter(1)",
    "%gemm = (bf16[16,32]{1,0}, s8[4194304]{0}) custom-call(%x, %y),"
    ' custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config"'
    ':{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"]}}}',
  )
  assert gemm.kind == "product of bf16"
  assert gemm.operations == 2 * 16 * 64 * 32
  assert gemm.bytes == 2 * (16 * 64 + 64 * 32 + 16 * 32)


@pytest.mark.parametrize("gradient", [False, True])
def test_cudnns_attention_counts_its_products(gradient):
  target = "__cudnn$fmhaSoftmax" + "Backward" * gradient
  attention = only(
    "mixed",
    "%q = bf16[2,16,4,8]{3,2,1,0} parameter(0)",
    "%k = bf16[2,32,4,8]{3,2,1,0} parameter(1)",
    "%mixed = (bf16[2,4,16,8]{3,1,2,0}, f32[2,4,16]{2,1,0}, u8[0]{0})"
    f' custom-call(%q, %k, %k), custom_call_target="{target}"',
  )
  products = 2 * 2 * 2 * 4 * 16 * 32 * 8
  assert attention.operations == products * (2.5 if gradient else 1)
  kind = "backward" if gradient else "forward"
  assert attention.kind == f"attention, {kind}"
  assert attention.seconds == attention.operations / 5e9


def test_another_library_call_is_its_bytes():
  call = only(
    "norm",
    "%x = bf16[16,64]{1,0} parameter(0)",
    "%norm = bf16[16,64]{1,0} custom-call(%x),"
    ' custom_call_target="__gpu$xla.gpu.triton"',
  )
  assert call.kind == "Triton kernel"
  assert call.bytes == 2 * 2 * 16 * 64 and call.operations == 0


@pytest.mark.parametrize(
  "result, op, size",
  [
    ("((f32[8]{0}), (f32[64]{0}))", "all-gather", 64 * 4),
    ("((f32[8]{0}), (f32[1]{0}))", "reduce-scatter", 8 * 4),
    ("f32[8]{0}", "all-reduce", 8 * 4),
  ],
)
def test_what_gpus_exchange_has_bytes_but_no_time(result, op, size):
  exchanged = only(
    "started",
    "%x = f32[8]{0} parameter(0)",
    f"%started = {result} {op}-start(%x), replica_groups=[1,8]<=[8]",
    f"ROOT %done = f32[8]{{0}} {op}-done(%started)",
  )
  assert exchanged.kind == op
  assert exchanged.bytes == size and exchanged.seconds == 0


# MARK: shapes


@pytest.mark.parametrize(
  "shape, size",
  [
    ("f32[]", 4),
    ("pred[3,5]{1,0}", 15),
    ("bf16[8,4]{1,0:T(8,128)(2,1)}", 64),
    ("f8e4m3fn[10]", 10),
    ("c64[2]", 16),
    ("s4[8]", 8),
    ("token[]", 0),
    ("(bf16[8], /*index=1*/(s64[2], u8[0]))", 32),
  ],
)
def test_bytes_of_a_shape(shape, size):
  assert hlo.size_of(shape) == size
