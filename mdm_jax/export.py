"""Writes a trained model as a folder that other libraries load.

  export_model(load_model(Workdir("runs/quickstart")), "quickstart_hf")

The folder has the averaged weights as safetensors, config.json, the tokenizer
and a model card; a masked model also has a sampler for transformers.
docs/huggingface.md describes them.
"""

import contextlib
import dataclasses
import importlib.resources
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax

import mdm_jax
from mdm_jax.blueprint import held_out_objective
from mdm_jax.config import Config
from mdm_jax.core import distributed
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.core.progress import console
from mdm_jax.data import tokenizer_json
from mdm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from mdm_jax.data.tokenizer_base import Tokenizer
from mdm_jax.huggingface import gguf_written, safetensors, written
from mdm_jax.huggingface.families import Architecture
from mdm_jax.model.context import CAUSAL, FULL
from mdm_jax.objectives.base import Decoding
from mdm_jax.sampling import tokens
from mdm_jax.trained_model import TrainedModel, load_model
from mdm_jax.workdir import Workdir

_MOST = 5 * 10**9  # bytes of a file, as transformers' own default
# What the exported sampler does not do, and the value that means it need not.
_LEFT_OUT = {
  "block_length": None,
  "cache": "none",
  "entropy_bound": None,
  "threshold": None,
  "remasking": "none",
  "guidance": 0.0,
}
_BIDIRECTIONAL = (
  "llama.cpp has to attend to all positions, as its diffusion example"
  " (llama-diffusion-cli) does; llama-cli and llama-server draw from left to"
  " right, which is nonsense for a masked model"
)
_ORDERS = "random", "spread", "left_to_right", "confidence", "margin", "entropy"
_SCHEDULES = "linear", "cosine"


def export_workdir(
  config: Config, workdir: Workdir, out: str | None, kind: str
) -> dict[str, Any]:
  """Exports the best checkpoint of a run, and prints what was written.

  Args:
    config: the run's config, whose sampling settings are exported too.
    workdir: the run's folder.
    out: the folder to make.
    kind: a name in `written.FORMATS`.

  Raises:
    UserError: the folder is there already, or the model can't be exported.
    StorageError: it can't be written, or what was saved is damaged.
  """
  new_folder(out)
  return export_model(load_model(workdir, config), out, kind)


def export_model(
  model: TrainedModel,
  out: str | None,
  kind: str = "transformers",
  most: int = _MOST,
) -> dict[str, Any]:
  """Writes a model as a folder; a folder that has its name is whole.

  Args:
    model: the model, with averaged weights.
    out: the folder to make.
    kind: a name in `written.FORMATS`.
    most: bytes of a file of weights.

  Returns:
    What was written.

  Raises:
    UserError: the folder is there already, or the model can't be exported.
    StorageError: it can't be written.
  """
  target = new_folder(out)
  with jax.set_mesh(model.mesh):
    content = _Content.of(model, kind)
    with filling(target) as partial:
      if distributed.is_first():
        content.write_texts(partial)
      weights = written.tensors(model.params, content.found)
      if kind == "gguf":
        names = content.write_gguf(partial, weights)
      else:
        names = safetensors.write_folder(partial, weights, most)
  size = sum(tensor.nbytes for tensor in weights.values())
  console.print(
    f"exported update {model.step:,} to {target}: {len(weights)} tensors in"
    f" {len([n for n in names if n != safetensors.INDEX])} file(s),"
    f" {size / 1e6:,.1f} MB, as {content.architecture}",
    markup=False,
    soft_wrap=True,
  )
  for line in content.notes:
    console.print(line, markup=False, soft_wrap=True)
  return {"out": str(target), "step": model.step, "bytes": size} | {
    "architecture": content.architecture,
    "notes": content.notes,
  }


def new_folder(out: str | None) -> pathlib.Path:
  """Returns the path of a folder to make; raises UserError if it is there."""
  if not out:
    raise UserError("--mode=export needs --out=FOLDER")
  if "://" in out or out.startswith("gs:"):
    raise UserError(f"--out={out} is not a folder of this machine")
  path = pathlib.Path(out).expanduser().absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(
      f"--out={out} exists already: delete it, or give another folder"
    )
  return path


@contextlib.contextmanager
def filling(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder that becomes the target when the block is left.

  Raises:
    StorageError: it can't be written.
  """
  partial = target.with_name(f".{target.name}.partial")
  try:
    if distributed.is_first():
      shutil.rmtree(partial, ignore_errors=True)  # a killed export's
      partial.mkdir(parents=True)
    yield partial
    if distributed.is_first():
      os.replace(partial, target)
  except OSError as error:
    shutil.rmtree(partial, ignore_errors=True)
    raise StorageError(
      f"--out={target} can't be written: {error.strerror} (errno {error.errno})"
    ) from error


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Writes an object as other libraries do: indented, with any letter."""
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclasses.dataclass(frozen=True)
class _Content:
  """What an exported folder says about its model.

  Attributes:
    model: the model.
    found: its architecture as it is read back.
    config: config.json.
    tokenizer: tokenizer.json, and what is inexact about it.
    left_out: sampling settings that the exported sampler does not have.
    gguf: metadata of a GGUF file, None for a folder of safetensors.
    warnings: what to know about that file, each in one line.
  """

  model: TrainedModel
  found: Architecture
  config: dict[str, Any]
  tokenizer: tokenizer_json.Written
  left_out: dict[str, Any]
  gguf: dict[str, Any] | None = None
  warnings: tuple[str, ...] = ()

  @classmethod
  def of(cls, model: TrainedModel, kind: str) -> "_Content":
    """Raises UserError if the model can't be exported in this format."""
    decoding = _decoding(model)
    vocab = model.tokenizer.vocab
    causal = decoding.visibility == CAUSAL
    length = max(stage.length for stage in model.config.stages)
    config, found = written.describe(
      model.config.model, vocab.size, length, causal, kind
    )
    ids = {
      "eos_token_id": vocab.end,
      "pad_token_id": vocab.pad,
      "mask_token_id": vocab.mask,
      "sep_token_id": vocab.separator,
      "bos_token_id": vocab.begin if decoding.begin is None else decoding.begin,
    }
    config |= {name: i for name, i in ids.items() if i is not None}
    settings = model.config.sample
    sampler = {
      "num_steps": settings.num_steps,
      "order": settings.order,
      "schedule": settings.schedule,
      "temperature": tokens.effective_temperature(settings),
      "top_k": settings.top_k,
      "min_p": settings.min_p,
      "top_p": settings.top_p,
    }
    own = {
      "version": mdm_jax.__version__,
      "forbidden": vocab.forbidden,
      "trained_length": length,
    }
    config["mdm_jax"] = own | {"length": settings.length or length}
    left_out = {} if causal else _left_out(settings, sampler)
    config["mdm_jax"]["sampler"] = sampler
    file = tokenizer_json.written(model.tokenizer)
    if kind != "gguf":
      return cls(model, found, config, file, left_out)
    fields, why = gguf_written.tokenizer(
      config, file.content, _template(model.tokenizer)
    )
    fields = gguf_written.metadata(config, model.config.name) | fields
    warnings = (why,) if why else ()
    if not causal:
      warnings += (_BIDIRECTIONAL,)
    return cls(model, found, config, file, {}, fields, warnings)

  @property
  def architecture(self) -> str:
    """What loads the weights: a class, or an architecture of llama.cpp."""
    if self.gguf:
      return f"llama.cpp's {self.gguf['general.architecture']}"
    return self.config["architectures"][0]

  @property
  def notes(self) -> list[str]:
    """What differs from the model here, each in one line."""
    notes = []
    if self.tokenizer.why:
      none = "" if self.tokenizer.content else "no tokenizer.json: "
      notes.append(
        f"{none}{self.tokenizer.why}; the exact file of this library is in the"
        " folder mdm_jax_tokenizer"
      )
    if self.left_out:
      given = ", ".join(f"sample.{k}={v}" for k, v in self.left_out.items())
      notes.append(f"custom_generate does not have {given}")
    return [*notes, *self.warnings]

  def write_texts(self, folder: pathlib.Path) -> None:
    """Writes all but the weights."""
    if not self.gguf:
      self._write_settings(folder)
    if self.tokenizer.why:
      self.model.tokenizer.save(folder / "mdm_jax_tokenizer")
    if self.tokenizer.content is not None:
      text = self.tokenizer.content.encode()
      (folder / "tokenizer.json").write_bytes(text)
      write_json(folder / "tokenizer_config.json", self._tokenizer_config())
    (folder / "README.md").write_text(self._card())

  def write_gguf(
    self, folder: pathlib.Path, weights: dict[str, safetensors.Unread]
  ) -> list[str]:
    """Writes weights and metadata as one file; returns the files' names."""
    tensors = gguf_written.tensors(weights, self.config)
    gguf_written.write(folder / gguf_written.FILE, self.gguf, tensors)
    return [gguf_written.FILE]

  def _write_settings(self, folder: pathlib.Path) -> None:
    write_json(folder / "config.json", self.config)
    write_json(folder / "generation_config.json", self._generation())
    if not self.found.causal:
      (folder / "custom_generate").mkdir()
      code = _resource("custom_generate.py")
      (folder / "custom_generate" / "generate.py").write_text(code)

  def _generation(self) -> dict[str, Any]:
    names = "eos_token_id", "pad_token_id", "bos_token_id"
    ids = {name: self.config[name] for name in names if name in self.config}
    spans = self.model.tokenizer.vocab.forbidden
    forbidden = [i for first, past in spans for i in range(first, past)]
    config = ids | {"suppress_tokens": forbidden}
    if self.found.causal:
      filters = "temperature", "top_k", "min_p", "top_p"
      sampler = self.config["mdm_jax"]["sampler"]
      config |= {"do_sample": True} | {name: sampler[name] for name in filters}
      # transformers' own default would be 50.
      config["top_k"] = config["top_k"] or 0
      config["max_length"] = self.config["mdm_jax"]["length"]
    return {name: value for name, value in config.items() if value is not None}

  def _tokenizer_config(self) -> dict[str, Any]:
    names = {"end": "eos", "begin": "bos", "pad": "pad", "mask": "mask"}
    names["separator"] = "sep"
    found = self.tokenizer.names
    config = {
      f"{there}_token": found[here]
      for here, there in names.items()
      if here in found
    }
    if template := _template(self.model.tokenizer):
      config["chat_template"] = template
    return config | {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      # The name of a special token in a text is text.
      "split_special_tokens": True,
      "model_max_length": self.config["mdm_jax"]["trained_length"],
    }

  def _card(self) -> str:
    # Late, as in `evaluation/pages`: this import takes a while.
    import jinja2

    card = jinja2.Template(
      _resource("card.md"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return card.render(
      name=self.model.config.name,
      step=self.model.step,
      config=self.config,
      causal=self.found.causal,
      shift=self.found.model.shift_outputs,
      notes=self.notes,
      tokenizer=self.tokenizer.content is not None,
      gguf=self.gguf,
      forbidden=self.model.tokenizer.vocab.forbidden,
      own=self.config["mdm_jax"],
      version=mdm_jax.__version__,
    )


def _template(tokenizer: Tokenizer) -> str:
  if isinstance(tokenizer, HuggingFaceTokenizer):
    return tokenizer.chat_template
  return ""


def _decoding(model: TrainedModel) -> Decoding:
  """Raises UserError unless the model attends to all, or to what is before."""
  objective = held_out_objective(
    model.config, model.tokenizer.vocab, model.mesh
  )
  decoding = objective.decoding()
  if decoding.visibility not in (FULL, CAUSAL) or decoding.order == "blocks":
    raise UserError(
      f"objective.name={model.config.objective.name} can't be exported: other"
      " libraries attend to all positions or to those before; nearest:"
      " objective.name=masked"
    )
  return decoding


def _left_out(settings: Any, sampler: dict[str, Any]) -> dict[str, Any]:
  """Replaces settings that the exported sampler lacks; returns them."""
  found = {
    name: getattr(settings, name)
    for name, plain in _LEFT_OUT.items()
    if getattr(settings, name) != plain
  }
  for name, known in ("order", _ORDERS), ("schedule", _SCHEDULES):
    if sampler[name] not in known:
      found[name] = sampler[name]
      sampler[name] = known[0]
  return found


def _resource(name: str) -> str:
  files = importlib.resources.files("mdm_jax.huggingface")
  return files.joinpath(name).read_text()
