"""Runs with LoRA: what they train, save, resume and are used as."""

import dataclasses
import json
import re
import shutil
import signal

import faults_harness
import huggingface_harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax import export, export_adapter, imported_model, plan
from mdm_jax.blueprint import make_trainer
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import trees
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.data.config import DataConfig, StageConfig, TokenizerConfig
from mdm_jax.data.prepared import prepare
from mdm_jax.model.config import LoraConfig, ModelConfig
from mdm_jax.trained_model import load_model
from mdm_jax.training.config import OptimizerConfig
from mdm_jax.weights import start_params, write_base
from mdm_jax.workdir import Workdir

BASE_STEP, STEPS = 7, 3


def _save(workdir, config, tokenizer, step, state):
  workdir.create()
  workdir.write_config(config, tokenizer.sha256)
  tokenizer.save(workdir.path)
  with Checkpoints(workdir.path) as checkpoints:
    checkpoints.save(step, state, {})


def _host(tree):
  return jax.tree.map(np.array, trees.by_path(jax.device_get(tree)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A base, and a run that made some updates of additions to it."""
  folder = tmp_path_factory.mktemp("lora")
  base, run = Workdir(folder / "base"), Workdir(folder / "run")
  config = Config(
    data=DataConfig(
      corpus="python_docs",
      batch_size=4,
      max_documents=12,
      cache_dir=str(folder / "cache"),
    ),
    tokenizer=TokenizerConfig(kind="byte"),
    model=ModelConfig(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2),
    stages=(StageConfig(length=32, updates=STEPS),),
    optimizer=OptimizerConfig(warmup_steps=1, weight_decay=0.1),
  )
  mesh = make_mesh("1x1")
  with jax.set_mesh(mesh):
    data = prepare(config.rows)
    params = make_trainer(config, data, mesh).init().params
    _save(base, config, data.tokenizer, BASE_STEP, {"ema_params": params})
    config = dataclasses.replace(
      config,
      init_from=str(base.path),
      tokenizer=TokenizerConfig(),
      model=dataclasses.replace(config.model, lora=LoraConfig(rank=2)),
    )
    data = prepare(config.rows)
    trainer = make_trainer(config, data, mesh)
    source = str(base.path)
    _, trainer.base = start_params(source, trainer.plain, data.tokenizer)
    before = _host(trainer.base)
    state = trainer.init()
    for update in range(STEPS):
      state, _ = trainer.update(state, update)
    _save(run, config, data.tokenizer, STEPS, state)
    write_base(run, trainer.base, source)
    yield base, run, trainer, state, before


def test_only_the_additions_are_in_the_optimizer_and_the_checkpoint(trained):
  base, run, _, state, _ = trained
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  leaves = jax.tree.leaves(state.params)
  assert len(leaves) == 2 * 7
  assert sorted(m.shape for m in moments) == sorted(
    2 * [leaf.shape for leaf in leaves]
  )
  saved = faults_harness.state_hash(run.path, STEPS)
  arrays = [path for path in saved if "param" in path]
  assert len(arrays) == 2 * len(leaves)
  assert all("_lora" in path for path in arrays)


def test_the_model_beside_them_keeps_every_bit(trained):
  _, _, trainer, state, before = trained
  for path, value in _host(trainer.base).items():
    np.testing.assert_array_equal(value, before[path], strict=True)
  whole = _host(trainer.whole(state.params))
  changed = {path for path in whole if np.any(whole[path] != before[path])}
  products = {
    path.replace("_lora/a", "") for path in trees.by_path(state.params)
  }
  assert changed == {path for path in products if "_lora" not in path}


def test_a_run_is_used_with_its_additions_merged(trained):
  _, run, trainer, state, _ = trained
  model = load_model(run)
  assert model.step == STEPS and not model.config.model.lora.rank
  wanted = _host(trainer.whole(state.ema_params))
  for path, value in _host(model.params).items():
    # On the mesh of its use, which may have more devices.
    np.testing.assert_allclose(value, wanted[path], rtol=1e-5, atol=1e-9)
  # And another run may start from it.
  source = str(run.path)
  said, again = start_params(source, trainer.plain, trainer.data.tokenizer)
  assert said == f"the parameters of {source}, update {STEPS}"
  for path, value in _host(again).items():
    np.testing.assert_array_equal(value, wanted[path])


def test_the_model_that_it_adds_to_may_move_but_not_change(trained, tmp_path):
  base, run, trainer, _, _ = trained
  moved = tmp_path / "moved"
  shutil.copytree(base.path, moved)
  config = dataclasses.replace(run.read_config(), init_from=str(moved))
  load_model(run, config)
  with Checkpoints(moved) as checkpoints:
    other = jax.tree.map(jnp.copy, trainer.base)
    scale = other["final_norm"]["scale"].at[3].add(1e-7)
    other["final_norm"] = {"scale": scale}
    checkpoints.save(BASE_STEP + 1, {"ema_params": other}, {})
  with pytest.raises(UserError, match="has other parameters") as told:
    load_model(run, config)
  assert "\n" not in str(told.value)
  assert "--config.init_from=FOLDER" in str(told.value)


def test_its_export_is_the_merged_model(trained, tmp_path):
  _, run, _, _, _ = trained
  config = run.read_config()
  export.export_workdir(config, run, str(tmp_path / "out"), "transformers")
  found = imported_model.load_imported(f"hf:{tmp_path / 'out'}")
  jax.tree.map(
    np.testing.assert_array_equal, found.params, load_model(run).params
  )


def test_its_additions_alone_add_to_an_export_of_the_base(trained, tmp_path):
  base, run, _, _, _ = trained
  config = run.read_config()
  out = str(tmp_path / "out")
  export.export_workdir(base.read_config(), base, out, "transformers")
  alone = tmp_path / "alone"
  with console.capture() as said:
    export_adapter.export_workdir(config, run, str(alone))
  assert f"an export of {base.path}: name it in" in said.get()
  written = json.loads((alone / "adapter_config.json").read_text())
  written["base_model_name_or_path"] = out
  (alone / "adapter_config.json").write_text(json.dumps(written))
  found = imported_model.load_imported(f"hf:{alone}").params
  wanted = _host(load_model(run).params)
  for path, value in _host(found).items():
    np.testing.assert_allclose(value, wanted[path], rtol=1e-5, atol=1e-7)
  with pytest.raises(UserError, match="has none; nearest: --format=trans"):
    export_adapter.export_workdir(base.read_config(), base, f"{out}2")


def test_the_plan_compares_it_with_training_all(trained):
  _, _, trainer, state, before = trained
  (line,) = plan._lora(trainer)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  beside = sum(x.size for x in before.values())
  assert line.startswith(
    f"LoRA of rank 2: {count:,} parameters are trained beside {beside:,}; "
  )
  found = [
    float(x) for x in re.findall(r"([0-9.]+)(?: GiB| of the FLOPs)", line)
  ]
  assert len(found) == 3 and found[0] <= found[1] and 0.5 < found[2] < 1
  full = trainer.without_lora()
  whole = sum(x.size for x in jax.tree.leaves(full.abstract().params))
  assert whole == beside


def test_there_has_to_be_a_model_to_add_to():
  model = ModelConfig(lora=LoraConfig(rank=4))
  with pytest.raises(UserError, match="needs init_from.*lora.rank=0"):
    Config(model=model)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path_factory):
  folder = tmp_path_factory.mktemp("killed")
  place = faults_harness.make_place(folder, tmp_path_factory.mktemp("cache"))
  huggingface_harness.save(folder / "model", huggingface_harness.QWEN3)
  args = (
    *("--config.init_from=hf:model", "--config.model.dtype=float32"),
    *("--config.model.lora.rank=2", "--config.model.lora.dropout=0.1"),
  )
  whole = place.run("whole", *args)
  assert whole.code == 0, whole.err
  said = "LoRA adds to the weights of hf:model, which stay as they are"
  assert said in whole.said
  patch = faults_harness.SLOW_UPDATES.format(seconds=0.05)
  process = place.start("hurt", *args, patch=patch)
  process.wait_for_checkpoint(20)
  assert process.kill().code == -signal.SIGKILL
  resumed = place.run("hurt", *args)
  assert resumed.code == 0, resumed.err
  hashes = [
    faults_harness.state_hash(ended.workdir, faults_harness.UPDATES)
    for ended in (whole, resumed)
  ]
  assert hashes[0] == hashes[1]
  results = [
    json.loads((ended.workdir / "results.json").read_text())["measured"]
    for ended in (whole, resumed)
  ]
  assert results[0] == results[1]
