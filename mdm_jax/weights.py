"""Reads a model's parameters: of a run, of hf:FOLDER, or a base with LoRA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core import coercion
from mdm_jax.core.errors import UserError
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.huggingface import folder as folders
from mdm_jax.huggingface.families import Architecture, architecture
from mdm_jax.huggingface.folder import Folder, open_folder
from mdm_jax.huggingface.parameters import read_params
from mdm_jax.huggingface.sizes import differences
from mdm_jax.model import lora
from mdm_jax.model.config import LoraConfig, ModelConfig
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.workdir import Workdir

BASE = "base.json"  # of a run with LoRA: which parameters it adds to


def start_params(
  source: str, denoiser: Denoiser, tokenizer: Tokenizer
) -> tuple[str, Params]:
  """Reads the parameters that a run starts from onto the current mesh.

  Args:
    source: `init_from`: a run's folder, or hf:FOLDER.
    denoiser: the model, without LoRA.
    tokenizer: the run's.

  Returns:
    What they are, in words; and the parameters.

  Raises:
    UserError: there is no such model, or it has other sizes.
    StorageError: what was saved is damaged.
  """
  if folders.is_named(source):
    params = imported_params(source, denoiser, tokenizer.fresh)
    return f"the weights of {source}", params
  # Its averaged parameters: those that it was evaluated with.
  step, params = run_params(Workdir(source), denoiser, tokenizer)
  return f"the parameters of {source}, update {step}", params


def run_params(
  workdir: Workdir,
  denoiser: Denoiser,
  tokenizer: Tokenizer,
  step: int | None = None,
  checkpoints: Checkpoints | None = None,
  base: str | None = None,
) -> tuple[int, Params]:
  """Reads a run's averaged parameters, with LoRA merged into its base.

  Args:
    workdir: the run's folder.
    denoiser: the model, without LoRA.
    tokenizer: the run's.
    step: update of the checkpoint (None: the best checkpoint).
    checkpoints: the run's checkpoints, if they are open already.
    base: where the model that LoRA adds to is now (None: where it was).

  Returns:
    The update of the checkpoint, and its averaged parameters.

  Raises:
    UserError: there is no such checkpoint, or its model is another.
    StorageError: what was saved is damaged.
  """
  adapters, source = _lora_of(workdir)
  model = dataclasses.replace(denoiser.config, lora=adapters)
  trained = dataclasses.replace(denoiser, config=model)
  if checkpoints is None:
    with Checkpoints(workdir.path) as checkpoints:
      step, params = averaged_params(checkpoints, trained, step)
  else:
    step, params = averaged_params(checkpoints, trained, step)
  if not adapters.rank:
    return step, params
  _, beside = start_params(base or source, denoiser, tokenizer)
  check_base(workdir, beside, base or source)
  return step, lora.merged(adapters, beside, params)


def _lora_of(workdir: Workdir) -> tuple[LoraConfig, str]:
  """Returns a run's LoRA, and the `init_from` that it was started with."""
  # Not `read_config`: that needs the run's own modules, which parameters don't.
  saved = workdir.read("config.json") or {}
  raw = saved.get("model", {}).get("lora", {})
  adapters = coercion.coerce(raw, LoraConfig, "model.lora")
  return adapters, saved.get("init_from", "")


def averaged_params(
  checkpoints: Checkpoints, denoiser: Denoiser, step: int | None = None
) -> tuple[int, Params]:
  """Reads averaged parameters (EMA) onto the current mesh.

  Args:
    checkpoints: the run's checkpoints.
    denoiser: the model that the parameters belong to.
    step: update of the checkpoint (None: the best checkpoint).

  Returns:
    The update of the checkpoint, and its averaged parameters; with LoRA, the
    additions only.

  Raises:
    UserError: there is no such checkpoint, or its model is another.
    StorageError: what was saved is damaged.
  """
  # A partial restore: the raw parameters and the optimizer's state are not
  # read.
  trained, _ = lora.split(jax.eval_shape(denoiser.init, jax.random.key(0)))
  like = {"ema_params": trained}
  if step is None:
    step, found = checkpoints.restore_best_part(like)
  else:
    checkpoints.check_has(step)
    found = checkpoints.restore(step, like, partial=True)
  return step, found["ema_params"]


# MARK: the base of LoRA


def write_base(workdir: Workdir, base: Params, source: str) -> None:
  """Records which parameters a run adds to."""
  workdir.write(BASE, {"init_from": source, "fingerprint": _digest(base)})


def check_base(workdir: Workdir, base: Params, source: str) -> None:
  """Raises UserError if a run was started with other parameters."""
  saved = workdir.read(BASE) or {}
  found = _digest(base)
  if (wanted := saved.get("fingerprint")) != found:
    raise UserError(
      f"init_from={source!r} has other parameters (fingerprint {found}) than"
      f" those that LoRA was trained beside in {workdir.path} ({wanted}, of"
      f" {saved.get('init_from')!r} at the time): give --config.init_from="
      "FOLDER of those"
    )


def _digest(params: Params) -> str:
  sums = np.stack(jax.device_get(jax.tree.leaves(_sums(params))))
  return "".join(f"{word:08x}" for word in np.bitwise_xor.reduce(sums, axis=0))


@jax.jit
def _sums(params: Params):
  return jax.tree.map(_sum, params)


def _sum(values: Array) -> UInt32[Array, "4"]:
  """Returns sums of an array's bits, the same however it is split."""
  bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
  # Integers, whose sum doesn't depend on the order. Each entry is weighted by
  # its place.
  place = jnp.zeros_like(bits)
  for axis, size in enumerate(values.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
    along = jax.reshard(along, jax.typeof(values).sharding)
    place = place * jnp.uint32(size) + along
  weights = [
    jnp.uint32(1),
    place * jnp.uint32(2) + jnp.uint32(1),
    (place ^ (place >> 15)) * jnp.uint32(0x85EBCA6B) | jnp.uint32(1),
    (place ^ (place >> 13)) * jnp.uint32(0xC2B2AE35) | jnp.uint32(1),
  ]
  return jnp.stack([(bits * w).sum(dtype=jnp.uint32) for w in weights])


# MARK: models of other libraries


def imported_params(
  source: str, denoiser: Denoiser, fresh: tuple[int, ...]
) -> Params:
  """Returns a folder's weights as float32 parameters on the current mesh.

  Args:
    source: hf:FOLDER.
    denoiser: the model to read them for.
    fresh: ids that the weights were not trained with.

  Raises:
    UserError: the model has other sizes, or the folder is damaged.
  """
  folder = open_folder(source)
  found = architecture_of(folder)
  if differs := _difference(denoiser.config, found.model):
    name, ours, theirs = differs
    raise UserError(
      f"model.{name}={ours!r}, but {source} has {theirs!r}; set"
      f" model.{name}={theirs!r}"
    )
  return read_params(folder.tensors(), found, denoiser, fresh)


def architecture_of(folder: Folder) -> Architecture:
  """Returns what a folder's config.json describes."""
  return architecture(folder.config, str(folder.path / "config.json"))


def _difference(ours: ModelConfig, theirs: ModelConfig):
  """Returns (field, ours, theirs) of the first size that differs, or None."""
  for name, a, b in differences(ours, theirs):
    # Outputs of any model may be shifted: see `imported_model.with_sizes`.
    if (name, b) != ("shift_outputs", False):
      return name, a, b
  return None
