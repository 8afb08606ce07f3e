"""Reading a program that was compiled for TPUs."""

from paths import GOLDEN

from mdm_jax.benchmarks import tpu_program

# As libtpu prints a loop over 12 layers that keeps what a kernel returns.
TEXT = (GOLDEN / "tpu_loop.txt").read_text()


def test_the_largest_arrays_come_first():
  found = tpu_program.arrays(TEXT)
  assert [(a.shape, a.bytes, a.places) for a in found] == [
    ("f32[8,512]", 8 * 512 * 4, 1),
    ("bf16[12,8,4]", 12 * 8 * 4 * 2, 2),
    ("bf16[8,4]", 8 * 4 * 2, 1),
  ]
  # Not every instruction has a source.
  assert found[0].source == "jit(step)/while/attend/fwd"
  assert found[1].source == "jit(step)/broadcast"


def test_a_kernel_in_a_loop_runs_as_often_as_it_goes_around():
  assert tpu_program.kernels(TEXT) == {"fwd_kernel": 12}
