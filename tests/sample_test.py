"""A trained model as a library: load, generate, fill."""

import contextlib
import dataclasses
import io
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_harness import call, environment
from paths import ROOT

import mdm_jax
from mdm_jax import (
  command_line,
  interactive,
  sample,
  training_loop,
  tuned_sampling,
)
from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.config import Config
from mdm_jax.core import memory, rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import AXES, make_mesh, mesh_sizes
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.model import placement
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.config import BlockConfig
from mdm_jax.objectives.measured import (
  LOSS_BY_MASKED_SHARE,
  Curve,
  Measured,
  to_json,
)
from mdm_jax.sampling import schedule
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.training.state import TrainState
from mdm_jax.workdir import Workdir

LENGTH = 24
CONFIG = Config(
  tokenizer=TokenizerConfig(kind="byte"),
  model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2),
  stages=(StageConfig(length=LENGTH),),
  sample=SampleConfig(num_steps=6, temperature=0.7),
)
# Falls fastest at first.
CURVE = Curve(
  (0.05, 0.8, 1.0),
  (2.0, 2.5, 9.0),
  "loss",
  role=LOSS_BY_MASKED_SHARE,
  split="validation",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A checkpoint of parameters as they were initialised, but larger."""
  folder = tmp_path_factory.mktemp("run")
  tokenizer = tokenizers.build(CONFIG.tokenizer, [])
  tokenizer.save(folder)
  workdir = Workdir(folder)
  workdir.write_config(CONFIG, tokenizer.sha256)
  workdir.write("results.json", to_json(Measured(curves={"any name": CURVE})))
  vocab = tokenizer.vocab
  with jax.set_mesh(make_mesh(CONFIG.mesh)), Checkpoints(folder) as checkpoints:
    denoiser = Denoiser(CONFIG.model, vocab)
    params = jax.jit(denoiser.init)(rng.stream(0, "init"))
    params = jax.tree.map(lambda p: 3 * p, params)
    state = TrainState(jnp.int32(1), params, params, ())
    checkpoints.save(1, state, {})
  return folder


@pytest.fixture(scope="module")
def model(workdir):
  return sample.load(str(workdir))


def test_a_model_samples_with_tuned_settings_if_there_are_any(
  workdir, tmp_path
):
  folder = shutil.copytree(workdir, tmp_path / "run")
  settings = {"temperature": 0.9, "temperature_range": None, "order": "random"}
  found = {"checkpoint": 1, "settings": settings}
  Workdir(folder).write(tuned_sampling.FILE, found)
  tuned = sample.load(str(folder)).settings(seed=3)
  assert (tuned.order, tuned.temperature) == ("random", 0.9)
  own = sample.load(str(folder), sampling="config").settings()
  assert (own.order, own.temperature) == ("spread", 0.7)


def known(samples, row, text):
  ids = samples.path[-1, row]
  return bytes(ids[: len(text)].tolist()) == text.encode()


def test_prompts_stay_and_every_token_is_drawn(model):
  drawn = model.generate(["one ", "t[MASK:2]o"], num_samples=2)
  assert len(drawn.texts) == 4
  assert known(drawn, 0, "one ") and known(drawn, 1, "one ")
  vocab = model.tokenizer.vocab
  ids = drawn.path[-1, 2]
  assert chr(ids[0]) == "t" and chr(ids[3]) == "o"
  assert (ids[4:] == vocab.pad).all()
  assert (drawn.path[-1] != vocab.mask).all()
  assert drawn.path.shape == (7, 4, LENGTH)
  assert (drawn.calls[2:] == 2).all()  # two tokens, one a step
  np.testing.assert_array_equal(drawn.step[:2, :4], -1)


def test_a_row_depends_on_its_number_seed_and_prompt_only(model):
  alone = model.generate("ab", num_samples=3)
  beside = model.generate(["ab", "ab", "ab", "x", "[MASK:*]"])
  np.testing.assert_array_equal(alone.path, beside.path[:, :3])
  assert len({tuple(row) for row in alone.path[-1]}) == 3
  other = model.generate("ab", num_samples=3, seed=1)
  assert (alone.path != other.path).any()


@contextlib.contextmanager
def only(devices):
  """Takes away all fake devices but the first ones."""
  with pytest.MonkeyPatch.context() as patch:
    first = jax.devices()[:devices]
    make = lambda c: jax.make_mesh(mesh_sizes(c, devices), AXES, devices=first)
    patch.setattr(placement, "make_mesh", make)
    yield


def with_model(workdir, devices=8, **fields):
  """Loads the checkpoint, with other settings of the model, on some devices."""
  model = dataclasses.replace(CONFIG.model, **fields)
  with only(devices):
    config = dataclasses.replace(CONFIG, model=model)
    return sample.load(Workdir(workdir), config=config)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_found_A7_a_text_does_not_depend_on_how_many_are_drawn(
  workdir, dtype, devices
):
  model = with_model(workdir, devices, dtype=dtype)
  many = model.generate("ab", 23, num_steps=3)
  for count in (1, 2, 5, 7):
    few = model.generate("ab", count, num_steps=3)
    assert len(few.texts) == count and few.texts == many.texts[:count]
    for name in ("path", "step", "confidence", "entropy", "calls"):
      rows = getattr(many, name)
      rows = rows[:, :count] if name == "path" else rows[:count]
      np.testing.assert_array_equal(getattr(few, name), rows)
  parts = list(model.stream("ab", 5, num_steps=3))
  assert sum((part.texts for part in parts), []) == many.texts[:5]
  assert len({tuple(row) for row in many.path[-1]}) == 23


@pytest.mark.parametrize("prompts", [["ab"], ["a", "bc", "[MASK:3]d", "", "e"]])
def test_found_C2_three_devices_draw_what_one_does(workdir, prompts, capsys):
  one, three = (with_model(workdir, n).generate(prompts) for n in (1, 3))
  assert len(three.texts) == len(prompts)
  np.testing.assert_array_equal(one.path, three.path)
  np.testing.assert_allclose(one.confidence, three.confidence, rtol=1e-4)
  told = capsys.readouterr().out
  assert "every one of 3 devices holds the whole model" in told


def test_settings_of_a_call_are_the_runs_but_for_those_given(model, workdir):
  config = dataclasses.replace(CONFIG.sample, temperature=0.3, seed=4)
  run = dataclasses.replace(CONFIG, sample=config)
  other = sample.load(Workdir(workdir), config=run)
  want = other.generate("", 2)
  drawn = model.generate("", 2, temperature=0.3, seed=4)
  np.testing.assert_array_equal(drawn.path, want.path)


def test_another_temperature_compiles_nothing(model):
  model.generate("", 2)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sample.TextSampler, "_program", never_new(model))
    drawn = [
      model.generate("", 2, temperature=t, top_p=p, seed=s).path
      for t, p, s in (
        (0.7, 0.9, 0),
        (0.4, 0.9, 0),
        (0.7, 0.5, 0),
        (0.7, 0.9, 1),
      )
    ]
  assert len({path.tobytes() for path in drawn}) == 4


def never_new(model):
  original = sample.TextSampler._program

  def program(self, config):
    known = set(self._compiled)
    found = original(self, config)
    assert set(self._compiled) == known
    return found

  return program


def test_the_optimal_schedule_follows_the_evaluation(model, workdir):
  drawn = model.generate("", 1, schedule="optimal", order="left_to_right")
  sizes = np.bincount(drawn.step[0][drawn.step[0] >= 0], minlength=6)
  losses = schedule.losses_by_revealed(CURVE, LENGTH)
  want = np.diff(schedule.optimal(losses, 6)) * LENGTH
  np.testing.assert_allclose(sizes, want, atol=1e-9)
  assert sizes[0] < sizes[-1]
  bare = sample.load(Workdir(workdir), config=CONFIG)
  bare._curve = None
  with pytest.raises(UserError, match="--mode=eval"):
    bare.generate("", 1, schedule="optimal")


def test_any_pattern_can_be_filled(model):
  numbers = np.random.default_rng(0)
  shape = 5, 20
  free = numbers.random(shape) < 0.5
  given = numbers.integers(0, 256, shape)
  lengths = np.array([20, 7, 12, 1, 20])
  vocab = model.tokenizer.vocab
  inside = np.arange(20) < lengths[:, None]
  given[~inside] = vocab.pad  # behind a row's end any id is accepted
  drawn = model.fill(given, free, lengths)
  kept = inside & ~free
  for ids in drawn.path:
    np.testing.assert_array_equal(ids[kept], given[kept])
    assert (ids[~inside] == vocab.pad).all()
  last = drawn.path[-1]
  assert vocab.is_predictable(last[inside]).all() or (last == vocab.end).any()
  np.testing.assert_array_equal(drawn.step[~(free & inside)], -1)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: m.generate("", ordr="random"), "did you mean 'order'"),
    (lambda m: m.generate("", order="sideways"), "sample.order"),
    (lambda m: m.generate("", num_steps=0), "sample.num_steps=0"),
    (lambda m: m.generate([]), "nothing to draw"),
    (lambda m: m.generate("", num_samples=0), "nothing to draw"),
    (lambda m: m.generate("x" * 24), "leaves nothing"),
    (lambda m: m.generate("x" * 25), "only 24"),
    (lambda m: m.generate("[MASK:0]"), r"\[MASK:5\]"),
    (lambda m: m.score(["a", ""]), r"texts\[1\]: it is empty"),
    (lambda m: m.score("a", draws=12), "draws=12: must be a multiple of 8"),
    (
      lambda m: m.fill(np.full((1, 4), 300), np.zeros((1, 4), bool)),
      "id 300, which is not a text token",
    ),
  ],
)
def test_a_mistake_is_one_line(model, call, message):
  with pytest.raises(UserError, match=message) as caught:
    call(model)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "prompt, named",
  [
    ("caf\udce9", "byte 0xe9 at character 4"),
    ("[MASK] \ud83d", r"U\+D83D at character 8"),
  ],
)
def test_a_prompt_that_is_no_text_is_one_line(model, prompt, named):
  with pytest.raises(UserError, match=named) as caught:
    model.generate(["a", prompt])
  assert "prompt 2 of 2" in str(caught.value)


def test_found_C4_a_session_goes_on_after_whatever_is_typed(
  workdir, monkeypatch, capsys
):
  typed = b"caf\xe9\n/seed 99999999999999999999\n/seed -1\n/seed 1e400\n"
  typed += b"/seed NaN\n/temperature 1e400\n/length 99999999999999999999\n"
  typed += b"/caf\xe9 1\n/order caf\xe9\n/temperature [[[[\n/seed 4294967295\n"
  typed += b"one\ntwo"
  stdin = io.TextIOWrapper(io.BytesIO(typed), "utf-8")
  monkeypatch.setattr(sys, "stdin", stdin)
  command_line.take_any_text()
  texts = interactive.converse(CONFIG, Workdir(workdir))
  told = capsys.readouterr()
  assert [text[:3] for text in texts] == ["one", "two"]
  errors = told.err.splitlines()
  assert len(errors) == 10 and all(e.startswith("error: ") for e in errors)
  assert "byte 0xe9 at character 4" in errors[0]
  assert "sample.seed=99999999999999999999 must be in [0, " in errors[1]


# MARK: prompts from a file


def _drawn_from(workdir, content, monkeypatch, name="prompts.txt", **options):
  """Runs --prompts on a file of these bytes, or on them as input."""
  if name == "-":
    stdin = io.TextIOWrapper(io.BytesIO(content), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    path = name
  else:
    path = str(workdir / name)
    (workdir / name).write_bytes(content)
  settings = dataclasses.replace(CONFIG.sample, num_samples=2)
  config = dataclasses.replace(CONFIG, sample=settings)
  return sample.sample_workdir(config, Workdir(workdir), file=path, **options)


FILES = {
  "prompts.txt": "\ufeffone\r\n\nt[MASK:2]o\n\u00e9\ntwo",
  "prompts.JSONL": (
    '{"prompt": "one"}\n{"prompt": ""}\n{"prompt": "t[MASK:2]o", "id": 3}\n'
    '{"prompt": "\\u00e9"}\n{"prompt": "two"}\n'
  ),
  "-": "one\n\nt[MASK:2]o\n\u00e9\ntwo\n",
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_come_from_a_file(name, workdir, model, monkeypatch, capsys):
  content = FILES[name].encode()
  drawn = _drawn_from(workdir, content, monkeypatch, name)
  prompts = ["one", "", "t[MASK:2]o", "\u00e9", "two"]
  assert [line["prompt"] for line in drawn] == prompts
  want = model.generate(prompts, 2).texts
  assert [text for line in drawn for text in line["texts"]] == want
  assert all(t.startswith("two") for t in drawn[-1]["texts"])
  rules = [r for r in capsys.readouterr().out.splitlines() if "calls" in r]
  assert len(rules) == 10
  assert "prompt 1, sample 1, 6 denoiser calls" in rules[0]
  assert "prompt 5, sample 2, 6 denoiser calls" in rules[-1]


def test_prompts_of_a_file_can_be_watched(workdir, monkeypatch, tmp_path):
  page = tmp_path / "page.html"
  drawn = _drawn_from(workdir, b"a\nb\nc", monkeypatch, page=str(page))
  assert len(drawn) == 3 and page.exists()
  none = _drawn_from(workdir, b"a\nb\nc", monkeypatch, keep=False)
  assert none == []


@pytest.mark.parametrize(
  "name, content, told",
  [
    ("p.txt", b"", "p.txt is empty"),
    ("-", b"", "--prompts=- is empty"),
    (
      "p.txt",
      b"one\n[MASK:x]\n",
      r"p.txt, line 2: \[MASK:x\] is not a valid mask",
    ),
    ("p.txt", b"caf\xe9", "p.txt, line 1: .* byte 0xe9 at character 4"),
    ("p.txt", b"a\nb\n" + b"x" * 25, "p.txt, line 3: .* a sample only 24"),
    (
      "p.jsonl",
      b'{"prompt": "a"}\n{"text": "a"}',
      "p.jsonl, line 2: expected",
    ),
    ("p.jsonl", b'{"prompt": "a"}\n\n', "p.jsonl, line 2: expected"),
    ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1: .* U.D800 at character 1"),
    ("p.jsonl", b"[1]", "line 1: expected"),
  ],
)
def test_a_line_that_is_no_prompt_is_named(
  name, content, told, workdir, monkeypatch
):
  with pytest.raises(UserError, match=told) as caught:
    _drawn_from(workdir, content, monkeypatch, name)
  assert "\n" not in str(caught.value)


def test_a_file_of_prompts_that_is_not_there(workdir):
  with pytest.raises(UserError, match="--prompts=nothing: No such file"):
    sample.sample_workdir(CONFIG, Workdir(workdir), file="nothing")


# MARK: extremes

WIDE = dict(temperature_range=None, num_steps=4096, length=2)


@pytest.mark.parametrize(
  "settings",
  [
    WIDE | dict(temperature=1e-30, top_p=0, min_p=1, top_k=1, seed=2**32 - 1),
    WIDE | dict(temperature=1e30, top_k=2**31 - 1, block_length=2**20),
    WIDE | dict(entropy_bound=1e6, guidance=1000, temperature=1),
    WIDE | dict(remasking="cap", remasking_rate=1, num_steps=64),
  ],
)
def test_numbers_at_their_bounds_draw(model, settings):
  drawn = model.generate("a", 2, **settings)
  ids = drawn.path[-1]
  assert known(drawn, 0, "a") and (ids != model.tokenizer.vocab.mask).all()
  assert np.isfinite(drawn.confidence).all()
  assert np.isfinite(drawn.entropy).all()


def test_the_package_loads_a_model(workdir, model):
  loaded = mdm_jax.load(str(workdir), step=1)
  drawn = loaded.generate("ab", num_steps=3)
  assert drawn.texts == model.generate("ab", num_steps=3).texts
  with pytest.raises(UserError, match="no checkpoint 7; it has: 1"):
    mdm_jax.load(str(workdir), step=7)


def test_the_package_alone_imports_nothing_else():
  look = "import mdm_jax, sys; print(sorted({'jax', 'numpy'} & {*sys.modules}))"
  out = subprocess.check_output([sys.executable, "-c", look], text=True)
  assert out == "[]\n"


def test_what_the_package_offers_is_found_when_it_is_asked_for():
  assert {*mdm_jax.__all__} == {*mdm_jax._FOUND_IN} <= {*dir(mdm_jax)}
  assert mdm_jax.train is training_loop.train_and_evaluate
  assert mdm_jax.generate is sample.Model.generate
  with pytest.raises(AttributeError, match="'genrate'"):
    mdm_jax.genrate  # noqa: B018


def test_the_readmes_lines_of_python_run(workdir, tmp_path):
  page = (ROOT / "README.md").read_text()
  (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "quickstart").symlink_to(workdir)
  (tmp_path / "lines.py").write_text(lines)
  done = call(tmp_path, environment(tmp_path), module="lines")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("\n") >= 3  # texts, and a score


def test_a_text_is_scored_alone(model):
  long = "a text of more than a row, so that it is cut into several"
  scores = model.score(["one", long])
  alone = mdm_jax.score(model, long)
  assert scores.bound
  np.testing.assert_array_equal(scores.nats[1:], alone.nats)
  np.testing.assert_array_equal(scores.bytes, [3, len(long)])
  np.testing.assert_array_equal(scores.tokens, scores.bytes + 1)  # its end
  assert (0 < scores.errors).all() and (scores.errors < scores.nats / 5).all()
  bits = scores.nats / scores.bytes / np.log(2)
  np.testing.assert_allclose(scores.bits_per_byte, bits)


def test_a_folder_without_a_run_says_so(tmp_path):
  with pytest.raises(UserError, match="no run was started there"):
    sample.load(str(tmp_path / "nothing"))


def test_what_is_drawn_can_be_watched(workdir, model):
  seen = {}
  watching = sample.load(str(workdir))
  watching.watch = lambda step, x: seen.__setitem__(int(step), np.asarray(x))
  drawn = watching.generate("a", 2)
  jax.effects_barrier()
  assert sorted(seen) == list(range(7))
  for step, x in seen.items():
    np.testing.assert_array_equal(x[:2], drawn.path[step])
  np.testing.assert_array_equal(drawn.path, model.generate("a", 2).path)


def test_a_text_is_streamed_block_by_block(workdir):
  blocks = BlockConfig(name="block", block_length=8)
  stages = (StageConfig(length=LENGTH),)
  config = dataclasses.replace(CONFIG, objective=blocks, stages=stages)
  model = sample.load(str(workdir), config=config)
  settings = dict(num_steps=3, remasking="cap", order="random", seed=1)
  (text,) = model.generate("ab", **settings).texts
  pieces = list(model.generate("ab", stream=True, **settings))
  assert "".join(pieces) == text
  # Half a character at a block's end waits for the other half.
  sizes = np.cumsum([len(piece) for piece in pieces])
  missing = [8, 16] - sizes[:2]
  assert (missing >= 0).all() and (missing <= 3).all()
  with pytest.raises(UserError, match="a single text, not 2"):
    model.generate("ab", 2, stream=True)
  with pytest.raises(UserError, match="num_steps"):
    list(model.generate("ab", stream=True, num_steps=0))


def test_found_C9_any_number_of_texts_is_drawn_in_parts(workdir, monkeypatch):
  """Until someone has seen enough: none of them are kept."""
  config = dataclasses.replace(CONFIG.sample, num_samples=10**9)
  config = dataclasses.replace(CONFIG, sample=config)
  seen = []

  def see(text, **_):
    seen.append(text)
    if len(seen) == 40:
      raise KeyboardInterrupt

  monkeypatch.setattr(sample.console, "print", see)
  with pytest.raises(KeyboardInterrupt):
    sample.sample_workdir(config, Workdir(workdir), keep=False)
  assert len(seen) == 40


@pytest.mark.parametrize("length, have", [(10**6, 2**34), (100, 2**16)])
def test_a_length_that_does_not_fit_is_reported(
  model, monkeypatch, length, have
):
  monkeypatch.setattr(memory, "of_device", lambda: have)
  with pytest.raises(UserError, match=f"sample.length={length}") as caught:
    model.generate("", length=length)
  told, _, valid = str(caught.value).partition("nearest valid: at most ")
  assert "GiB" in told and "\n" not in told
  if have < 2**20:
    drawn = model.generate("", length=int(valid), num_steps=1)
    assert drawn.path.shape[2] == int(valid)


def test_more_texts_than_can_be_kept_are_reported(model):
  with pytest.raises(UserError, match="1,000,000,000 texts") as caught:
    model.generate("", 10**9)
  assert "nearest valid: " in str(caught.value)


# MARK: holes whose length is not told


def test_a_hole_is_as_long_as_its_bounds_allow(model):
  prompts = ["a[MASK:2-4]b", "ab[MASK:3]c"]
  drawn = model.generate(prompts, num_samples=3, hole_length="drawn", seed=2)
  free = drawn.step >= 0
  assert {*free[:3].sum(axis=1).tolist()} <= {2, 3, 4}
  for row, hole in zip(drawn.path[-1][:3], free[:3], strict=True):
    size = int(hole.sum())
    assert row[0] == ord("a") and row[1 + size] == ord("b")
  assert free[3:].sum(axis=1).tolist() == [3, 3, 3]


def test_a_text_of_an_untold_length_is_that_of_its_told_one(model):
  untold = model.generate("ab[MASK:1-3]c", seed=5)
  (size,) = (untold.step >= 0).sum(axis=1)
  told = model.generate(f"ab[MASK:{size}]c", seed=5)
  for name in ("path", "step", "confidence", "entropy"):
    np.testing.assert_array_equal(getattr(untold, name), getattr(told, name))
