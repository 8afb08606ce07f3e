"""An exported model is read back bit by bit, or one line says why not."""

import dataclasses
import json

import command_harness as commands
import huggingface_harness as harness
import jax
import numpy as np
import pytest
from export_harness import TINY, check_same, model_of

from mdm_jax import imported_model
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core.errors import StorageError, UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig, make_mesh
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.export import export_model
from mdm_jax.huggingface import safetensors, written
from mdm_jax.model.rope_scaling import RopeScaling, frequencies
from mdm_jax.objectives.config import AutoregressiveConfig
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.trained_model import load_model
from mdm_jax.workdir import Workdir

PLAIN = dataclasses.replace(TINY, qk_norm=False)


def read(folder):
  return imported_model.load_imported(f"hf:{folder}")


SHIFTED = dataclasses.replace(PLAIN, shift_outputs=True, qkv_bias=True)
GROUPED = dataclasses.replace(TINY, num_kv_heads=2, head_dim=6)
UNTIED = dataclasses.replace(PLAIN, tie_embeddings=False, rope_theta=500.0)
SCALED = [
  RopeScaling(kind="linear", factor=2.0),
  RopeScaling(
    kind="llama3", factor=4.0, original_length=8, low_freq_factor=2.0
  ),
  RopeScaling(kind="yarn", factor=2.0, original_length=6, truncate=False),
]
FAMILIES = {
  "qwen3": (GROUPED, "Qwen3ForCausalLM"),
  "qwen3 with biases": (
    dataclasses.replace(TINY, qkv_bias=True),
    "Qwen3ForCausalLM",
  ),
  "llama": (UNTIED, "LlamaForCausalLM"),
  "qwen2, shifted": (SHIFTED, "Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_from_shards(tmp_path, any_mesh, name):
  sizes, kind = FAMILIES[name]
  model = model_of(sizes)
  done = export_model(model, str(tmp_path / "out"), most=9000)
  assert done["architecture"] == kind
  index = json.loads((tmp_path / "out" / safetensors.INDEX).read_text())
  assert len({*index["weight_map"].values()}) > 2
  again = read(tmp_path / "out")
  check_same(model, again)
  assert again.config.stages[-1].length == 12
  ids = ("end", "separator", "pad", "mask", "size", "predictable")
  for field in ids:
    wanted = getattr(model.tokenizer.vocab, field)
    assert getattr(again.tokenizer.vocab, field) == wanted
  assert again.tokenizer.fresh == ()


def test_a_runs_checkpoint_starts_another_run_bit_by_bit(tmp_path):
  """All that a Qwen3 can hold, from eight devices' shards to those of a run."""
  sizes = dataclasses.replace(
    GROUPED,
    qkv_bias=True,
    tie_embeddings=False,
    rope_theta=500.0,
    rope_scaling=SCALED[-1],
  )
  mesh = MeshConfig(fsdp=4, tensor=2)
  with jax.set_mesh(make_mesh(mesh)):
    model = model_of(sizes, mesh=mesh)
    trained = load_model(save_run(tmp_path / "run", model))
    export_model(trained, str(tmp_path / "out"))
    source = f"hf:{tmp_path / 'out'}"
    found = imported_model.imported_params(source, trained.denoiser, fresh=())
  check_same(model, read(tmp_path / "out"))
  pairs = zip(
    jax.tree.leaves(model.params), jax.tree.leaves(found), strict=True
  )
  for one, other in pairs:
    assert one.sharding == other.sharding and other.dtype == np.float32
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scaling", SCALED, ids=lambda s: s.kind)
def test_scaled_positions_are_described(scaling):
  sizes = dataclasses.replace(PLAIN, rope_scaling=scaling)
  _, found = written.describe(sizes, 128, 12, True, "transformers")
  assert (
    frequencies(found.model.rope_scaling, 4, 1e4)[1]
    == (frequencies(scaling, 4, 1e4)[1])
  )
  with pytest.raises(UserError, match="model.rope_scaling.kind='.*='default'"):
    written.describe(sizes, 128, 12, False, "llada")


FOLDERS = {
  "llama": {},
  "qwen2": harness.QWEN2,
  "qwen3": harness.QWEN3,
  "Dream": harness.QWEN2 | {"model_type": "Dream"},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_imported_goes_out_and_comes_back(tmp_path, name):
  harness.save(tmp_path / "in", FOLDERS[name])
  first = read(tmp_path / "in")
  export_model(first, str(tmp_path / "out"))
  check_same(first, read(tmp_path / "out"))
  file = lambda folder: (tmp_path / folder / "tokenizer.json").read_bytes()
  assert file("in") == file("out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["is_causal"] == (name in ("llama", "qwen2"))
  assert config["mask_token_id"] == first.tokenizer.vocab.mask
  sampler = tmp_path / "out" / "custom_generate" / "generate.py"
  assert sampler.exists() != config["is_causal"]


def test_llada_has_its_own_names(tmp_path, mesh):
  model = model_of(UNTIED)
  export_model(model, str(tmp_path / "out"), "llada")
  names = set(safetensors.read(tmp_path / "out"))
  assert "model.transformer.blocks.1.ff_proj.weight" in names
  check_same(model, read(tmp_path / "out"))


CAUSAL = {"objective": AutoregressiveConfig(name="autoregressive")}
REFUSED = {
  "time": (
    {"sizes": dataclasses.replace(TINY, time_conditioning=True)},
    "transformers",
    "model.time_conditioning=True can't be exported with --format=transformers;"
    " nearest: model.time_conditioning=False",
  ),
  "norms": (
    {"sizes": TINY},
    "llada",
    "model.qk_norm=True can't be exported with --format=llada; nearest:"
    " model.qk_norm=False",
  ),
  "shifted": (
    {"sizes": dataclasses.replace(PLAIN, shift_outputs=True)},
    "llada",
    "model.shift_outputs=True can't be",
  ),
  "causal": ({"sizes": PLAIN} | CAUSAL, "llada", "can't hold a causal model"),
  "format": ({}, "lada", "did you mean 'llada'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_family_holds_is_named(tmp_path, mesh, what):
  fields, kind, message = REFUSED[what]
  with pytest.raises(UserError, match=message) as error:
    export_model(model_of(**fields), str(tmp_path / "out"), kind)
  assert "\n" not in str(error.value)
  assert not any(tmp_path.iterdir())


def test_a_folder_is_whole_or_not_there(tmp_path, mesh, monkeypatch):
  model, out = model_of(), tmp_path / "out"
  out.mkdir()  # an empty one is no obstacle
  wrote = safetensors.write

  def full(path, tensors):
    wrote(path, tensors)
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors, "write", full)
  with pytest.raises(StorageError, match="can't be written: No space left"):
    export_model(model, str(out))
  assert [p.name for p in tmp_path.rglob("*")] == ["out"]
  monkeypatch.setattr(safetensors, "write", wrote)
  # What a killed export leaves.
  left = tmp_path / ".out.partial"
  left.mkdir()
  (left / "config.json").touch()
  export_model(model, str(out))
  assert not left.exists()
  with pytest.raises(UserError, match="exists already"):
    export_model(model, str(out))


def test_the_weights_are_moved_one_tensor_at_a_time(
  tmp_path, mesh, monkeypatch
):
  most, fetch = [], jax.device_get

  def seen(tree):
    most.append(tree.nbytes)
    return fetch(tree)

  monkeypatch.setattr(jax, "device_get", seen)
  model = model_of()
  export_model(model, str(tmp_path / "out"))
  leaves = {leaf.nbytes for leaf in jax.tree.leaves(model.params["blocks"])}
  assert len(most) == 2 + 2 * 11 and max(most) == 16 * 384 * 4
  # A layer of a stacked parameter, not all of them.
  assert sorted(most)[-2] < max(leaves)


def test_the_card_says_what_to_beware_of(tmp_path, mesh):
  settings = SampleConfig(guidance=1.0, order="margin", temperature=0.5)
  model = model_of(sample=settings)
  with console.capture() as said:
    export_model(model, str(tmp_path / "out"))
  assert "custom_generate does not have sample.guidance=1.0" in said.get()
  card = (tmp_path / "out" / "README.md").read_text()
  for text in (
    "transformers 5.2 or newer",
    "`generate()` is not the sampler",
    "rows of up to 12 tokens",
    "id 259",
    "They are 258 to 383",
    "temperature=0.5",
    "License",
  ):
    assert text in card
  suppressed = json.loads(
    (tmp_path / "out" / "generation_config.json").read_text()
  )["suppress_tokens"]
  possible = model.tokenizer.vocab.is_predictable(np.arange(384))
  assert suppressed == np.flatnonzero(~possible).tolist()


def test_a_setting_that_the_sampler_lacks_is_replaced_and_said(tmp_path, mesh):
  settings = SampleConfig(schedule="optimal", remasking="cap")
  with console.capture() as said:
    export_model(model_of(sample=settings), str(tmp_path / "out"))
  assert "sample.schedule=optimal" in said.get()
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["mdm_jax"]["sampler"]["schedule"] == "linear"


def test_a_causal_models_card_has_no_sampler(tmp_path, mesh):
  export_model(model_of(**CAUSAL), str(tmp_path / "out"))
  card = (tmp_path / "out" / "README.md").read_text()
  assert "custom_generate" not in card and "id 256 in front" in card


def test_a_tokenizer_without_a_counterpart_has_a_file_of_its_own(
  tmp_path, mesh, monkeypatch
):
  model = model_of(kind="char")
  monkeypatch.setattr(model.tokenizer, "kind", "mine")
  with console.capture() as said:
    export_model(model, str(tmp_path / "out"))
  assert "no tokenizer.json: tokenizer.kind=mine has no" in said.get()
  again = tokenizers.load_tokenizer(tmp_path / "out" / "mdm_jax_tokenizer")
  assert again.sha256 == model.tokenizer.sha256


def save_run(folder, model):
  """Saves a model as the averaged parameters of a run."""
  workdir = Workdir(folder)
  workdir.create()
  workdir.write_config(model.config, model.tokenizer.sha256)
  model.tokenizer.save(workdir.path)
  raw = jax.tree.map(lambda x: x + 1, model.params)
  with Checkpoints(workdir.path) as checkpoints:
    state = {"params": raw, "ema_params": model.params}
    checkpoints.save(7, state, {})
  return workdir


def test_the_command_writes_the_runs_averaged_weights(tmp_path):
  with jax.set_mesh(make_mesh(MeshConfig())):
    model = model_of(kind="char")
    save_run(tmp_path / "run", model)
  env = commands.environment(tmp_path / "cache")
  call = lambda *args: commands.call(
    tmp_path, env, "--mode=export", "--workdir=run", *args
  )
  done = call("--out=out")
  assert done.returncode == 0, done.stderr
  assert "exported update 7 to" in done.stdout
  check_same(model, read(tmp_path / "out"))
  commands.check_mistake(call("--out=out"), "--out=out exists already")
  commands.check_mistake(call(), "--out=FOLDER")
