"""What the benchmarks count and compare is right; no test asserts a time.

Times are never asserted: only that what is timed is what it is said to be.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from paths import ROOT

from mdm_jax import sample
from mdm_jax.benchmarks import all as all_lib
from mdm_jax.benchmarks import (
  compile_time,
  input,
  loop,
  lora,
  md4,
  optimizer,
  parts,
  plain,
  sampler,
  startup,
  timing,
  train_step,
  workload,
)
from mdm_jax.core import rng
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.batches import Batch
from mdm_jax.model import flops
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import corruption, cross_entropy
from mdm_jax.objectives.masked import row_weights
from mdm_jax.objectives.noise import RateRange
from mdm_jax.training.state import initial_state

TINY = workload.PRESETS["tiny"]
TWO_LAYERS = dataclasses.replace(TINY, num_layers=2)


@pytest.fixture(autouse=True)
def _optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


def _work(preset, rates="uniform"):
  data = workload.make_data(preset, workload.make_rows(preset, 32))
  config = workload.make_config(preset, rates)
  return workload.make_work(config, data, jax.sharding.get_mesh())


# MARK: FLOPs


def _product_flops(jaxpr, times=1):
  """Matrix products in a program, those of a scan's body every time."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      shared = math.prod(left[i] for i in contracted)
      total += times * 2 * shared * math.prod(eqn.outvars[0].aval.shape)
    inner = times * eqn.params.get("length", 1)
    for value in eqn.params.values():
      values = value if isinstance(value, tuple | list) else (value,)
      for part in values:
        part = getattr(part, "jaxpr", part)
        if hasattr(part, "eqns"):
          total += _product_flops(part, inner)
  return total


@pytest.mark.parametrize("rates", ["uniform", "stage_3"])
@pytest.mark.parametrize("name", train_step.WAYS)
def test_flops_are_those_of_the_program(mesh, name, rates):
  work = _work(TWO_LAYERS, rates)
  way = train_step.WAYS[name](work)
  count = flops.update_flops(
    work.config.model,
    TINY.batch,
    work.reads,
    way.head_positions,
    way.vocab_size,
  )
  more = _time_flops if name == "md4" else _scores_again_flops
  count += more(TWO_LAYERS)
  program = jax.make_jaxpr(way.step)(jax.eval_shape(way.init), work.batch)
  assert _product_flops(program.jaxpr) == count


def _time_flops(preset):
  """What MD4 makes of the time: an MLP, then 6 D a block and 2 D at the end."""
  size = preset.embed_dim // preset.num_heads
  modulation = size * (6 * preset.num_layers + 2) * preset.embed_dim
  # The first product's input is no parameter's: it has no gradient.
  products = 2 * 4 * size**2 + 3 * (4 * size**2 + modulation)
  return preset.batch * 2 * products


def _scores_again_flops(preset):
  """What our attention's gradient computes again, and nobody counts as work."""
  scores = 2 * preset.length**2 * preset.embed_dim
  return preset.num_layers * preset.batch * scores


def test_flops_by_hand():
  config = ModelConfig(num_layers=3, embed_dim=8, num_heads=4, num_kv_heads=2)
  config = dataclasses.replace(config, mlp_dim=24)
  query_out, key_value, mlp, attention = 2 * 64, 2 * 32, 3 * 8 * 24, 2 * 16 * 8
  token = 2 * (query_out + key_value + mlp + attention)
  assert flops.trunk_flops(config, 5, ((16, 16),)) == 3 * token * 5 * 16
  assert flops.head_flops(config, 7, 128) == 2 * 7 * 8 * 128
  whole = flops.update_flops(config, 5, ((16, 16),), 7, 128)
  assert whole == 3 * (3 * token * 5 * 16 + 2 * 7 * 8 * 128)
  # A second call whose positions also see those of the first.
  twice = flops.trunk_flops(config, 5, ((16, 16), (16, 32)))
  more = 3 * 2 * attention * 5 * 16
  assert twice == 2 * flops.trunk_flops(config, 5, ((16, 16),)) + more


def test_all_rates_have_the_heads_positions(mesh):
  # Half of the tokens, and what rounding up can add to two mirrored rows.
  half = TINY.batch * TINY.length // 2 + TINY.batch // 2
  assert _work(TINY).head_positions == half
  assert _work(TINY, "stage_3").head_positions < half
  strict = _work(TINY, "stage_3_strict").head_positions
  assert strict < _work(TINY, "stage_3").head_positions


# MARK: the plain implementation


def test_plain_loss_is_the_librarys_on_the_same_masks(any_mesh):
  model = ModelConfig(num_layers=1, embed_dim=16, num_heads=2)
  denoiser = Denoiser(model, Vocabulary(128, forbidden=((100, 128),)))
  params = jax.jit(denoiser.init)(jax.random.key(0))
  by_row = lambda x: jax.device_put(x, RULES.spec("batch"))
  x0 = by_row(jax.random.randint(jax.random.key(1), (8, 16), 0, 100))
  hidden = by_row(jax.random.normal(jax.random.key(2), (8, 16, 16)))
  keys = by_row(rng.per_row(jax.random.key(3), jnp.arange(8)))
  real = by_row(jnp.ones((8, 16), bool))
  rate = by_row((jnp.arange(8) % 4 + 1) / 4)  # of 16 tokens: whole numbers
  inverse_density = 0.5 + rate  # any
  corrupt = jax.jit(corruption.corrupt, static_argnums=4)
  masked = corrupt(keys, x0, real, rate, 102).masked

  def library(params, hidden):
    weight = row_weights("nelbo", masked, real, inverse_density)
    total, _ = cross_entropy.masked_loss(
      *(denoiser.logits, denoiser.head(params), hidden, x0, masked),
      *(jnp.broadcast_to(weight[:, None], x0.shape), x0.size),
      denoiser.vocab,
    )
    return total

  def simple(params, hidden):
    values = plain.losses(denoiser, params, hidden, x0, masked)
    return (values.sum(axis=1) * inverse_density / rate).mean() / x0.shape[1]

  ours, theirs = (
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, hidden)
    for loss in (library, simple)
  )
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("rates", ["uniform", "stage_3"])
def test_plain_weights_are_unbiased(mesh, rates):
  """A loss of 1 at every masked token is a bound of 1 a token."""
  work = _work(TINY, rates)
  draws, length = 4000, 16

  @jax.jit
  def bounds():
    u = (jnp.arange(draws) + 0.5) / draws
    rate = work.rates.rate(u)
    x0 = jnp.zeros((draws, length), jnp.int32)
    xt = plain.mask_tokens(jax.random.key(0), x0, rate, 5)
    weight = work.rates.inverse_density(u) / rate
    return (xt == 5).sum(axis=1) * weight / length

  bound = np.asarray(bounds())
  assert abs(bound.mean() - 1) < 4 * bound.std() / draws**0.5


def test_plain_step_learns(mesh):
  work = _work(TINY)
  way = train_step.WAYS["plain"](work)
  state = way.init()
  before = jax.device_get(state.params)
  for _ in range(2):
    state, metrics = way.step(state, work.batch)
  assert math.isfinite(metrics["loss"]) and int(state.step) == 2
  changed = jax.tree.map(lambda a, b: (a != b).any(), before, state.params)
  assert all(jax.tree.leaves(changed))


# MARK: MD4

_init = jax.jit(md4.init, static_argnums=(1, 2))


@pytest.mark.parametrize("preset", [TWO_LAYERS, workload.PRESETS["char"]])
def test_md4_has_the_weights_that_are_counted(preset):
  model, vocab = workload.make_config(preset).model, 29
  params = jax.eval_shape(lambda: md4.init(jax.random.key(0), model, vocab))
  size = lambda part: sum(x.size for x in jax.tree.leaves(part))
  blocks = sum(
    size(block) - size(block["modulation"]) for block in params["blocks"]
  )
  of_attention = 4 * model.num_layers * model.embed_dim  # has no weights
  assert 2 * blocks == flops.trunk_flops(model, 1, ((1, 1),)) - of_attention
  assert 2 * params["head"].size == flops.head_flops(model, 1, vocab)
  assert len(params["embedding"]) == vocab + 1  # and the mask


@pytest.mark.parametrize("rate, tolerance", [(1.0, 1e-5), (0.5, 0.1)])
def test_md4_begins_with_any_token_as_likely_as_another(mesh, rate, tolerance):
  """Whatever the rate, the bound is of all tokens; at 1 all are masked."""
  model = workload.make_config(TWO_LAYERS).model
  params = _init(jax.random.key(0), model, 29)
  x0 = jax.random.randint(jax.random.key(1), (64, 64), 0, 29)
  rates = RateRange(rate - 1e-6, rate)
  # All are arguments: with arrays that it closes over, jaxlib 0.12.0.1 compiles
  # a program now and then, one of twenty or so, that returns NaN.
  loss = jax.jit(lambda *given: md4.loss_fn(*given[:2], model, rates, given[2]))
  mean = loss(params, x0, jax.random.key(2)) * rates._density_inside()
  np.testing.assert_allclose(mean, math.log(29), rtol=tolerance)


@pytest.mark.parametrize(
  "any_mesh",
  ["1x1", pytest.param("4x2", marks=pytest.mark.slow)],
  indirect=True,
)
def test_md4_overfits_a_batch(any_mesh):
  """Every row repeats a token: what is left of it tells what is hidden."""
  work = _work(TINY)
  rows = np.broadcast_to(np.arange(8)[None, :, None], (1, 8, 16))
  tokens = jax.device_put(rows, work.batch.tokens.sharding)
  batch = Batch(tokens=tokens, segments=work.batch.segments)
  model = dataclasses.replace(work.config.model, dropout=0.02)
  rates = RateRange(0.3, 0.5)
  optimizer = optax.adamw(1e-2)
  step = md4.make_train_step(model, optimizer, lambda _: 1e-2, rates)
  state = initial_state(_init(jax.random.key(0), model, 29), optimizer)
  losses = []
  for _ in range(40):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] / 10, losses
  assert int(state.step) == 40
  copies = [shard.data for shard in state.params["head"].addressable_shards]
  assert all(np.array_equal(copy, copies[0]) for copy in copies)


# MARK: timing


def test_turns_alternate():
  called = []
  runs = {name: lambda name=name: called.append(name) for name in "ab"}
  seconds = timing.interleave(runs, 3)
  assert called == ["a", "b"] * 4  # the first warms up
  assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


def test_short_runs_are_called_several_times_a_turn():
  called = []
  timing.interleave({"a": lambda: called.append(1)}, 3, at_least=1e9)
  assert len(called) == 2 + 3 * timing._MOST_CALLS


def test_spread():
  numbers = timing.spread([4.0, 1.0, 2.0, 3.0, 9.0])
  assert numbers == {"median": 3.0, "min": 1.0, "low": 2.0, "high": 4.0}
  assert timing.spread([2.0])["high"] == 2.0


def test_the_ceiling_is_the_fastest_shape(mesh):
  products = timing.matmuls(jnp.dtype(jnp.float32), ((8, 4, 8), (2, 2, 2)))
  assert [p.flops for p in products.values()] == [2 * 2 * 8 * 4 * 8, 2 * 2 * 8]
  seconds = {name: [1.0, 3.0, 2.0] for name in products}
  found = timing.ceiling(products, seconds)
  assert found["flops_per_second"] == 1024 / 2
  assert found["shape"] == "matmul 8x4x8"


def test_memory_of_a_program(mesh):
  add = jax.jit(lambda x, y: x + y, donate_argnums=0)
  x = jnp.zeros(1000)
  assert timing.compiled(add, x, x).peak_bytes == 2 * 4000  # one is reused
  assert timing.process_peak_bytes() > 0


def test_ratios_are_those_of_a_turn():
  """The machine's pace changed between turns: no ratio of medians is 2."""
  seconds = {"library": [1.0, 9.0, 2.0, 1.0], "md4": [2.0, 18.0, 4.0, 4.0]}
  ours = {"temporary_bytes": 1, "peak_bytes": 30}
  theirs = {"temporary_bytes": 4, "peak_bytes": 40}
  result = {"library": ours, "md4": theirs}
  compared = train_step._compare(result, seconds, "md4")
  assert compared["md4_over_library"] == timing.spread([2.0, 2.0, 2.0, 4.0])
  shares = {"temporary_bytes": 0.25, "peak_bytes": 0.75}
  assert compared["memory_share_of_md4"] == shares


# MARK: the programs


@pytest.fixture
def unchecked():
  """Lowering puts descriptions in the place of arrays, which are none."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
def test_parts_are_timed(mesh, unchecked):
  pieces = parts.make_parts(_work(TINY, "stage_3"), "plain")
  seconds = timing.interleave(pieces, 1)
  names = {"trunk", "head", "optimizer", "plain head", "plain optimizer"}
  assert set(seconds) == names


@pytest.mark.slow
def test_optimizers_are_timed(mesh, unchecked):
  work = _work(TINY)
  params = work.trainer.init().params
  results = optimizer.measure(work.config.optimizer, params, 1)
  assert {"adamw", "muon", "4 gradients, MultiSteps"} < set(results)
  assert all(found["seconds"]["median"] > 0 for found in results.values())


@pytest.mark.slow
def test_lora_is_compared_with_training_all(mesh, unchecked):
  full, small = lora.measure(TINY, [2], 1)
  assert full["FLOPs"] == full["time"] == 1 and small["time"] > 0
  assert small["FLOPs"] < 1
  for name in ("trained", "state", "planned"):
    assert small[name] < full[name]


@pytest.mark.slow
def test_input_measures(mesh, unchecked):
  results = input.measure(TINY, 50, 1)
  assert json.loads(json.dumps(results)) == results
  assert results["tokens_per_second"] == 16 * results["rows_per_second"]
  assert results["waited"]["median"] < 1


def test_rows_are_read_from_files(mesh, tmp_path):
  rows = workload.make_rows(TINY, 40)
  read = workload.on_disk(rows, tmp_path)
  assert isinstance(read.tokens, np.memmap)
  np.testing.assert_array_equal(read.tokens, rows.tokens)
  trainer = _work(TINY).trainer
  assert trainer.data.stages[0].tokens.max() < TINY.vocab


@pytest.mark.slow
def test_loop_measures(mesh):
  results = loop.measure(TINY, updates=4, repeats=2, step_seconds=0.0)
  assert json.loads(json.dumps(results)) == results
  assert set(results["update_seconds"]) == {"bare", "loop", "saving"}
  state = _work(TINY).trainer.abstract()
  sizes = [s.size * s.dtype.itemsize for s in jax.tree.leaves(state)]
  assert results["checkpoint"]["bytes"] == sum(sizes)
  assert 0 < results["checkpoint"]["blocked"] <= 1


def test_a_turn_of_the_loop_is_the_runs_own(mesh):
  """It logs and saves as a run does, a checkpoint in the middle of a turn."""
  data = workload.make_data(TINY, workload.make_rows(TINY, 32))
  config = workload.make_config(TINY, checkpoint_every=20)
  trainer = loop._Sleeping(config, data, mesh, 0.0)
  with loop._Turn(trainer, 20) as turn:
    saved = []
    for _ in range(2):
      turn()
      saved.append(turn.checkpoints.latest())
    assert saved == [20, 40] and int(turn.state.step) == 50
    logged = [line["step"] for line in turn.workdir.read_metrics()]
    assert logged == [20, 40]


@pytest.mark.slow
def test_compile_time_measures(mesh, unchecked):
  results = compile_time.measure(TINY, (1, 2), 1)
  json.dumps(results)
  assert set(results["by_depth"]) == {1, 2}
  assert results["last_over_first"] > 0


@pytest.mark.slow
def test_sampler_measures(mesh, unchecked, monkeypatch):
  monkeypatch.setattr(sampler, "WAYS", {"random": {}})
  results = sampler.measure(sampler.PRESETS["tiny"], 1)
  json.dumps(results)
  assert all(value > 0 for value in results["headline"].values())


def test_startup_waits_for_the_first_text(monkeypatch, tmp_path):
  script = tmp_path / "program.py"
  script.write_text("print('--- sample 1, 3 calls ---\\nWe the')\n")
  program = sys.executable, str(script)
  first, whole = startup._first_text(program, dict(os.environ))
  assert 0 < first <= whole
  monkeypatch.setattr(startup, "_MAIN", program)
  monkeypatch.setattr(startup, "_PYTHON", (sys.executable, "-S"))
  monkeypatch.setattr(startup, "_IMPORT", "import json")
  results = startup.measure(str(tmp_path), 1)
  assert set(results["seconds"]) == {
    *("python", "help", "import", "sample", "first_text")
  }


@pytest.mark.slow
def test_startups_untrained_run_can_be_sampled(mesh, tmp_path):
  startup.make_workdir(TINY, str(tmp_path))
  model = sample.load(str(tmp_path))
  assert len(model.generate(num_steps=2, num_samples=2).texts) == 2


@pytest.mark.slow
def test_all_writes_a_table(tmp_path):
  """The programs themselves, from their flags to JSON on the last line."""
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    (
      *(sys.executable, "-m", "mdm_jax.benchmarks.all"),
      *("--suite=tiny", f"--out={tmp_path}", "--json"),
    ),
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  results = json.loads(done.stdout.splitlines()[-1])
  assert results == json.loads((tmp_path / "benchmarks.json").read_text())
  assert not [r for r in results if "error" in r]
  table = (tmp_path / "benchmarks.md").read_text()
  for result, other in zip(results, ("plain", "md4"), strict=False):
    measured = result["rates"]["uniform"]
    assert measured["tokens"] == 128 and measured["head_positions"] == 68
    for way in ("library", other):
      numbers = measured[way]
      positive = "tokens_per_second", "mfu", "temporary_bytes", "first_loss"
      assert all(numbers[key] > 0 for key in positive)
      # At first any token is as likely as another: log 29, and some noise.
      assert numbers["first_loss"] < 3 * math.log(29)
    assert f"| uniform: times as fast as {other} |" in table
    assert f"| uniform: peak memory, share of {other}'s |" in table
  assert table.count("\n| train_step --preset=tiny") == 2 * 16


SERVE = """
import json, os, sys, time
for line in sys.stdin:
  name, *rest = json.loads(line)
  if name == "fail":
    sys.exit("no such\\nthing")
  print(f"compiling {name}", flush=True)
  if name == "hang":
    time.sleep(100)
  print(json.dumps({"pid": os.getpid(), "headline": {name: 1.0}}), flush=True)
"""


@pytest.fixture
def served(monkeypatch):
  """A function that runs groups of parts by a small program."""
  command = sys.executable, "-u", "-c", SERVE
  monkeypatch.setattr(all_lib, "_SERVE", command)
  part = lambda name: all_lib.Part((name,), 1.0 if name == "hang" else None)
  return lambda *groups, **limits: all_lib.run(
    [tuple(map(part, group)) for group in groups], **limits
  )


def test_a_group_has_one_process(served):
  results = served("ab", "c")
  first, second, other = (result["pid"] for result in results)
  assert first == second != other
  assert [line[1:] for line in all_lib.rows(results)] == [
    (name, "1") for name in "abc"
  ]


def test_what_fails_or_hangs_is_in_the_table_and_the_rest_is_run(served):
  kept = []
  results = served(("a", "fail", "b", "hang", "c"), keep=kept.append)
  table = [line[1:] for line in all_lib.rows(results)]
  assert table.pop(3) == ("unfinished", results[3]["unfinished"])
  rest = [("a", "1"), ("failed", "thing"), ("b", "1"), ("c", "1")]
  assert table == rest
  how = r"not finished within 1 s; the last \d s: (begun|compiling hang)"
  assert re.fullmatch(how, results[3]["unfinished"])
  pids = [results[i]["pid"] for i in (0, 2, 4)]
  assert len(set(pids)) == 3
  # A process that was stopped is gone.
  assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids)
  assert len(kept) == 5


def test_nothing_begins_after_the_limit(served):
  results = served(("a", "hang"), "b", limit=all_lib._LEAST + 0.5)
  assert "pid" in results[0]
  told = [result.get("unfinished") for result in results[1:]]
  assert told[0].startswith("not finished within 1 s")
  assert told[1].startswith("not begun")


def test_an_unknown_benchmark_is_a_failure_in_the_table():
  results = all_lib.run(all_lib._apart(("nothing", "--json")))
  ((command, what, error),) = all_lib.rows(results)
  assert (command, what) == ("nothing --json", "failed")
  assert "mdm_jax.benchmarks.nothing" in error
  assert "failed" in all_lib.markdown(results)


def test_suites_name_programs_and_flags_that_are_there():
  """In a process of its own: other tests define flags of the same names."""
  code = """
from absl import flags
from mdm_jax.benchmarks import all as every
for groups in every.SUITES.values():
  for group in groups:
    for part in group:
      with every.program(part.command) as module:
        assert flags.FLAGS.json and callable(module.main)
assert "preset" not in flags.FLAGS
"""
  ended = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert ended.returncode == 0, ended.stderr
