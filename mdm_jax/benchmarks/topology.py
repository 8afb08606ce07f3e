"""TPUs and GPUs to compile for, described without having any.

Their compilers need a description of the device, not the device: libtpu has
those of TPUs, those of GPUs are here.
"""

import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from mdm_jax.benchmarks.gpu_program import Rates
from mdm_jax.core.errors import UserError

_FORM = "it is written as v5e:16x16 (TPUs) or h100:8, h200:8 (GPUs)"
_GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU as XLA's compiler has to know it, and how fast it is.

  Attributes:
    kind: JAX's `device_kind`.
    memory: in bytes.
    bandwidth: of its memory, in bytes per second, from the data sheet.
    rates: what it sustains.
  """

  kind: str
  memory: int
  bandwidth: int
  rates: Rates

  def description(self) -> str:
    """Returns XLA's GpuTargetConfigProto, as text."""
    return _HOPPER.format(gpu=self)


# Both GPUs have the same chip, GH100 with 132 multiprocessors.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.bandwidth}
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{gpu.kind}"
"""
# Measured on one H100 80GB: a copy, products of 8192 x 8192, and kernels in the
# profile of a training step (docs/performance.md).
_H100 = Gpu(
  kind="NVIDIA H100 80GB HBM3",
  memory=84_929_347_584,
  bandwidth=3_352_320_000_000,
  rates=Rates(memory=2.9e12, half=755e12, float32=250e12, attention=220e12),
)
# Not measured: the rate of its memory is that of the H100, times the ratio of
# the data sheets' bandwidths.
_H200 = Gpu(
  kind="NVIDIA H200",
  memory=151_397_597_184,
  bandwidth=4_800_000_000_000,
  rates=dataclasses.replace(_H100.rates, memory=2.9e12 * 4.8 / 3.35),
)
GPUS = {"h100": _H100, "h200": _H200}


def gpu(topology: str) -> Gpu | None:
  """Returns the GPU that a topology is of; None if it is of TPUs."""
  return GPUS.get(topology.partition(":")[0])


def devices(topology: str) -> list[jax.Device]:
  """Returns the devices of a topology, on which nothing can be run.

  Args:
    topology: v5e:16x16, TPUs as libtpu calls them; or h100:8, a number of GPUs.

  Raises:
    UserError: no such devices, or their compiler is not installed.
  """
  found = _gpus(topology) if gpu(topology) else _tpus(topology)
  return list(found.devices)


def _tpus(topology: str) -> topologies.TopologyDescription:
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server here
  try:
    return topologies.get_topology_desc(topology, platform="tpu")
  except (RuntimeError, NotImplementedError) as error:
    raise _refused(topology, error, "TPUs need libtpu", "tpu") from error


def _gpus(topology: str) -> topologies.TopologyDescription:
  count = re.fullmatch(r"\w+:([1-9]\d*)", topology)
  count = int(count.group(1)) if count else 0
  hosts, rest = divmod(count, min(count, _GPUS_A_HOST) or 1)
  if not count or rest:
    raise UserError(
      f"topology {topology!r}: {_FORM}, with at most {_GPUS_A_HOST} GPUs or a"
      f" multiple of {_GPUS_A_HOST}"
    )
  # The plugin looks for GPUs when it is loaded: it must neither find one, whose
  # properties it would take, nor complain about a missing driver.
  os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
  try:
    return topologies.get_topology_desc(
      platform="cuda",
      topology_name=topology,
      topology=f"1x{hosts}x{count // hosts}",
      target_config=gpu(topology).description(),
    )
  except (RuntimeError, NotImplementedError) as error:
    raise _refused(
      topology, error, "GPUs need XLA's compiler for them", "cuda13"
    ) from error


def _refused(topology, error, needs: str, extra: str) -> UserError:
  reason = str(error).splitlines()[0]
  return UserError(
    f"topology {topology!r}: {reason}; {_FORM}; {needs}: pip install -e"
    f" '.[{extra}]'"
  )
