"""The table of docs/recipe.md against what is built from the config files.

A reader a field says what a built run does: the schedule's learning rates, the
optimizer's moments, the masks that are drawn, the logits that a sampler draws
from. The text of a config is never the last word.
"""

import ast
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from absl.testing import flagsaver
from jax.sharding import NamedSharding, PartitionSpec
from mesh_harness import make_mesh
from ml_collections.config_flags import config_path
from paths import ROOT

import mdm_jax.main  # noqa: F401 (defines the flags)
from mdm_jax import command_line
from mdm_jax import config as config_lib
from mdm_jax.benchmarks.workload import one_byte_a_token
from mdm_jax.blueprint import make_trainer
from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import batch_sharding
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import prepared
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.rows import Rows
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives import corruption, cross_entropy
from mdm_jax.objectives.draws import Draws
from mdm_jax.objectives.noise import stage_rates
from mdm_jax.sampling import schedule, tokens
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.sampler import make_sampler
from mdm_jax.training.curriculum import make_curriculum
from mdm_jax.training.learning_rate import warmup_updates

HEADER = (
  "| guide's name | field | baseline | recommended | priority | meaning |"
)
PRIORITIES = ("high", "medium", "low", "full")
REHEARSAL = 0.1  # of recommended.py; not the guide's


@pytest.fixture(autouse=True)
def one_device():
  """Adam raises a float to an integer power, which strict promotion forbids."""
  with jax.set_mesh(make_mesh("1x1")), jax.numpy_dtype_promotion("standard"):
    yield


# MARK: the table


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table."""

  field: str
  baseline: Any
  recommended: Any
  priority: str


def read_table() -> list[Row]:
  lines = (ROOT / "docs" / "recipe.md").read_text().splitlines()
  body = lines[lines.index(HEADER) + 2 :]
  rows = []
  for line in itertools.takewhile(lambda line: line.startswith("|"), body):
    cells = [cell.strip().strip("`") for cell in line[1:-1].split("|")]
    _, field, baseline, recommended, priority, _ = cells
    values = map(ast.literal_eval, (baseline, recommended))
    rows.append(Row(field, *values, priority))
  return rows


TABLE = read_table()

# What follows --config=configs/, and the priorities it adopts.
PRESETS = {
  "baseline": ("baseline.py", ()),
  "recommended": ("recommended.py", PRIORITIES),
  "recommended_strict": ("recommended.py:strict", PRIORITIES),
  "recommended_high": ("recommended.py:high", ("high",)),
  "recommended_high_medium": (
    "recommended.py:high,medium",
    ("high", "medium"),
  ),
  "recommended_high_medium_low": (
    "recommended.py:low,high,medium",
    ("high", "medium", "low"),
  ),
  "quick_fix": ("quick_fix.py", ("high",)),
}


def adopt(priorities: tuple[str, ...]) -> dict[str, Any]:
  """Returns the baseline's values with these priorities changed."""
  return {
    row.field: row.recommended if row.priority in priorities else row.baseline
    for row in TABLE
  }


def expected(preset: str) -> dict[str, Any]:
  """Returns what the table wants of a preset."""
  values = adopt(PRESETS[preset][1])
  if preset != "quick_fix":
    return values
  # Of the stages it has the last alone.
  kept = {
    k: v for k, v in values.items() if k[:9] not in ("stages[0]", "stages[1]")
  }
  return {k.replace("stages[2]", "stages[0]"): v for k, v in kept.items()}


def parse(file: str, *overrides: str) -> Config:
  """Returns the config of a real command line."""
  argv = ["main", f"--config={ROOT / 'configs' / file}", *overrides]
  with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
    patch.setattr(sys, "argv", argv)  # ml_collections looks there
    command_line.parse(argv)
    return command_line.read_config()


@functools.cache
def preset_config(preset: str) -> Config:
  return parse(PRESETS[preset][0])


EVERY = [(p, field) for p in PRESETS for field in expected(p)]


# MARK: readers


TOKENIZER = tokenizers.build(TokenizerConfig(kind="char"), ["abcdefgh"])
LENGTH = 16
# Updates an epoch of stage I, II and III: enough for any warm-up here to end
# in the first stage and not to be cut.
UPDATES = (40, 30, 20)


def make_rows(count: int) -> Rows:
  vocab = TOKENIZER.vocab
  draw = np.random.default_rng(0).integers(
    0, vocab.predictable, (count, LENGTH)
  )
  segments = np.ones((count, LENGTH), np.int32)
  segments[::3, 10:] = 0
  return Rows(np.where(segments, draw, vocab.pad), segments)


class Built:
  """What a run of a config would use, around a tiny denoiser."""

  def __init__(self, config: Config):
    stages = tuple(
      dataclasses.replace(stage, length=LENGTH) for stage in config.stages
    )
    model = ModelConfig(num_layers=1, embed_dim=16, num_heads=2)
    self.config = dataclasses.replace(config, model=model, stages=stages)
    rows = tuple(
      make_rows(updates * config.rows_per_update)
      for updates in UPDATES[-len(stages) :]
    )
    held = one_byte_a_token(rows[0])
    data = PreparedData(TOKENIZER, rows, held, held, {})
    self.trainer = make_trainer(self.config, data, make_mesh("1x1"))
    self.stages = self.trainer.curriculum.stages
    self._update = jax.jit(self.trainer.optimizer.update)

  def batch(self, stage: int):
    """The rows of a stage's first update."""
    plan = self.stages[stage]
    return self.trainer.batch(plan, plan.start)

  def examples(self, stage: int):
    """What a stage's first update asks the denoiser."""
    with jax.set_mesh(self.trainer.mesh):
      stage_plan = self.stages[stage]
      objective = self.trainer.objective(stage_plan)
      plan, batch = self.trainer.plan(stage_plan), self.batch(stage)

    @jax.jit
    def pose(step, batch):
      draws = Draws(self.config.seed, step, plan, batch.tokens.shape[1])
      return objective.examples(batch, draws)

    return pose(jnp.asarray(stage_plan.start), batch)

  @functools.cached_property
  def learning_rates(self) -> np.ndarray:
    """Of every update."""
    # One shape for all configs, so that each operation is compiled once.
    rates = np.asarray(jax.vmap(self.trainer.schedule)(jnp.arange(2**14)))
    assert self.stages[-1].end <= len(rates)
    return rates[: self.stages[-1].end]

  def peak(self, stage: int) -> float:
    """A stage's highest learning rate."""
    plan = self.stages[stage]
    return float(self.learning_rates[plan.start : plan.end].max())

  @property
  def microbatches(self) -> int:
    """Batches whose gradients are added up to change the parameters once."""
    return self.batch(0).tokens.shape[0]

  def update(self, value: float):
    """One update with a gradient of one value: the change, and the state."""
    state = self.trainer.optimizer.init(PARAMS)
    return self._update(gradient(value), state, PARAMS, step=0)


# Six equal entries; the embedding is not decayed.
PARAMS = {"embedding": jnp.ones(2), "down": jnp.ones((2, 2))}


def gradient(value: float):
  return jax.tree.map(lambda p: jnp.full_like(p, value), PARAMS)


built = functools.cache(Built)


def read_epochs(config: Config, stage: int) -> float:
  b = built(config)
  drawn = b.batch(stage).tokens[..., 0].size
  return b.stages[stage].updates * drawn / len(b.trainer.data.stages[stage])


def read_mask_rate(config: Config, stage: int) -> tuple[float, float]:
  """Where rows are masked more often than by rates from all of (0, 1)."""
  rates = stage_rates(config.stages[stage].objective, config.noise)

  @jax.jit
  def drawn_rates():
    key = rng.stream(0, "rate")
    return rates.rate(corruption.stratified_uniforms(key, MASKED_ROWS))

  masked = np.asarray(draw_masks(drawn_rates(), MASKED_LENGTH)).sum(axis=1)
  rows = np.bincount(masked, minlength=MASKED_LENGTH + 1)
  (often,) = np.nonzero(rows > MASKED_ROWS / MASKED_LENGTH)
  return (often[0] - 1) / MASKED_LENGTH, often[-1] / MASKED_LENGTH


MASKED_ROWS, MASKED_LENGTH = 512, 256


@jax.jit
def draw_masks(rate, sizes):
  """Masks rows of these sizes at these rates."""
  keys = rng.per_row(rng.stream(0, "mask"), jnp.arange(MASKED_ROWS))
  x0 = jnp.zeros((MASKED_ROWS, MASKED_LENGTH), jnp.int32)
  sizes = jnp.broadcast_to(sizes, MASKED_ROWS)
  real = jnp.arange(MASKED_LENGTH)[None] < sizes[:, None]
  return corruption.corrupt(keys, x0, real, rate, 1).masked


def read_lr_factor(config: Config, stage: int) -> float:
  return built(config).peak(stage) / config.optimizer.learning_rate


def read_batch_size(config: Config) -> int:
  return built(config).batch(0).tokens.shape[1]


def read_accumulation(config: Config) -> int:
  return built(config).microbatches


def read_learning_rate(config: Config) -> float:
  return built(config).peak(0) / config.stages[0].lr_factor


def read_warmup(config: Config) -> int:
  b = built(config)
  return int(np.argmax(b.learning_rates >= b.peak(0) * (1 - 1e-6))) + 1


def read_floor(config: Config) -> float:
  """Every stage's last learning rate, as a share of the highest of all."""
  b = built(config)
  (floor,) = {float(b.learning_rates[plan.end - 1]) for plan in b.stages}
  return floor / config.optimizer.learning_rate


def read_schedule(config: Config) -> str:
  """Every stage falls from its peak to the floor like half a cosine."""
  b = built(config)
  for stage, plan in enumerate(b.stages):
    start = plan.start or config.optimizer.warmup_steps
    at = np.linspace(0, 1, plan.end - start)
    floor = b.learning_rates[-1]
    cosine = (1 + np.cos(np.pi * at)) / 2
    want = floor + (b.peak(stage) - floor) * cosine
    got = b.learning_rates[start : plan.end]
    np.testing.assert_allclose(got, want, rtol=1e-4)
  return "cosine_with_restarts"


def read_optimizer(config: Config) -> str:
  """A gradient of any size makes steps of one size, and decay another one."""
  sizes = [built(config).update(g)[0]["embedding"][0] for g in (1e-2, 1e-3)]
  np.testing.assert_allclose(*sizes, rtol=1e-4)
  assert read_weight_decay(config) > 0
  return "adamw"


def read_weight_decay(config: Config) -> float:
  change, _ = built(config).update(0.0)
  np.testing.assert_array_equal(change["embedding"], 0)
  return float(-change["down"][0, 0] / built(config).learning_rates[0])


def read_clip_norm(config: Config) -> float:
  _, state = built(config).update(1e3)
  mean = optax.tree.norm(optax.tree.get(state, "mu"))
  return float(mean / (1 - read_b1(config)))


def read_b1(config: Config) -> float:
  _, state = built(config).update(1e-2)
  return float(1 - optax.tree.get(state, "mu")["down"][0, 0] / 1e-2)


def read_b2(config: Config) -> float:
  _, state = built(config).update(1e-2)
  return float(1 - optax.tree.get(state, "nu")["down"][0, 0] / 1e-4)


def read_eps(config: Config) -> float:
  """The first step is learning rate x g / (g + eps)."""
  g = 1e-8
  change, _ = built(config).update(g)
  step = float(-change["embedding"][0])
  return g * (built(config).learning_rates[0] / step - 1)


def read_label_smoothing(config: Config) -> float:
  """The gradient by the logits is softmax - target."""
  num_real, token = 5, 2
  vocab = Vocabulary(8, forbidden=((num_real, 8),))
  logits = np.where(np.arange(8) < num_real, np.arange(8) * 0.3, -np.inf)
  logits = logits.astype(np.float32)
  loss = lambda logits: cross_entropy.cross_entropy(
    logits[None], jnp.array([token]), vocab, config.objective.label_smoothing
  ).sum()
  error = lambda logits: jax.nn.softmax(logits) - jax.grad(loss)(logits)
  target = np.asarray(jax.jit(error)(logits))
  smoothing = float(target[0]) * num_real
  want = np.where(np.arange(8) < num_real, smoothing / num_real, 0)
  want[token] += 1 - smoothing
  np.testing.assert_allclose(target, want, atol=1e-6)
  return smoothing


class Sampled:
  """What a sampler draws from, given logits at every position.

  The program is that of a config; temperature and top-p are its arguments.
  """

  ROWS, LENGTH, VOCAB = 8, 128, 100

  def __init__(self, config: SampleConfig):
    self._sample = make_sampler(config, self, Vocabulary.after_text(self.VOCAB))
    self._calls: list[None] = []
    self._drawn: list[np.ndarray] = []

  def hidden(self, params, xt, context):
    jax.debug.callback(lambda: self._calls.append(None))
    return params

  def logits(self, params, hidden):
    return hidden

  def __call__(
    self, config: SampleConfig, logits: np.ndarray
  ) -> tuple[np.ndarray, int]:
    """Returns a draw's logits (the best has 0) a row, and denoiser calls."""
    self._calls.clear()
    self._drawn.clear()
    shape = self.ROWS, self.LENGTH
    canvas = Canvas(
      np.zeros(shape, np.int32),
      np.ones(shape, bool),
      np.full(self.ROWS, self.LENGTH, np.int32),
    )
    keys = rng.per_row(rng.stream(0, "sample"), jnp.arange(self.ROWS))
    params = np.broadcast_to(logits, (*shape, self.VOCAB)).astype(np.float32)
    pace = schedule.pace(config, self.LENGTH)
    mesh = make_mesh("1x1")
    place = lambda a: jax.device_put(a, batch_sharding(mesh, a.ndim))
    pace = jax.device_put(pace, NamedSharding(mesh, PartitionSpec()))
    with pytest.MonkeyPatch.context() as patch:
      draw = jax.random.categorical
      patch.setattr(
        jax.random, "categorical", functools.partial(self._spy, draw)
      )
      canvas = jax.tree.map(place, canvas)
      with jax.set_mesh(mesh):
        settings = tokens.effective_settings(config)
        self._sample(place(params), canvas, pace, settings, place(keys))
    jax.effects_barrier()
    return np.stack(self._drawn), len(self._calls)

  def _spy(self, draw, key, logits, **options):
    jax.debug.callback(lambda x: self._drawn.append(np.asarray(x)), logits)
    return draw(key, logits, **options)


_sampled = functools.cache(Sampled)


def sampled(config: SampleConfig):
  """Returns the call of its program."""
  top_p = None if config.top_p is None else 1.0
  values = {"temperature": 1.0, "temperature_range": None, "top_p": top_p}
  program = _sampled(dataclasses.replace(config, **values))
  return functools.partial(program, config)


# So flat that top-p, whatever it is, keeps the second token too.
SLOPE = -0.01 * np.arange(Sampled.VOCAB, dtype=np.float32)


def read_temperature(config: Config) -> float:
  drawn, _ = sampled(config.sample)(SLOPE)
  return float(-0.01 / (drawn[0, 1] - drawn[0, 0]))


def read_temperature_range(config: Config) -> tuple[float, float]:
  return tuple(
    tokens.effective_temperature(
      dataclasses.replace(config.sample, temperature=asked)
    )
    for asked in (1e-3, 1e3)
  )


def read_top_k(config: Config) -> int:
  """Candidates of a draw, those included that top-p has cut off."""
  drawn, _ = sampled(config.sample)(SLOPE)
  return drawn.shape[1]


def read_top_p(config: Config) -> float:
  """Beside a token of probability q others are kept while q < p."""
  count = Sampled.ROWS * Sampled.LENGTH
  q = 0.1 + 0.9 * (np.arange(count, dtype=np.float32)[:, None] + 0.5) / count
  rest = np.repeat((1 - q) / 9, 9, axis=1)
  cut = np.full((count, Sampled.VOCAB - 10), -np.inf, np.float32)
  logits = np.concatenate([np.log(q), np.log(rest), cut], axis=1)
  logits = logits.reshape(Sampled.ROWS, Sampled.LENGTH, -1)
  drawn, _ = sampled(config.sample)(logits * read_temperature(config))
  ratio = np.exp(drawn[np.isfinite(drawn[:, 1]), 1])  # of (1 - q) / 9 to q
  return float((1 / (1 + 9 * ratio)).max())


def read_num_steps(config: Config) -> int:
  _, calls = sampled(config.sample)(SLOPE)
  return calls


READERS: dict[str, Callable[[Config], Any]] = {
  **{
    f"stages[{i}].{name}": functools.partial(read, stage=i)
    for i in range(3)
    for name, read in (
      ("epochs", read_epochs),
      ("mask_rate", read_mask_rate),
      ("lr_factor", read_lr_factor),
    )
  },
  "data.batch_size": read_batch_size,
  "optimizer.accumulation": read_accumulation,
  "optimizer.learning_rate": read_learning_rate,
  "optimizer.weight_decay": read_weight_decay,
  "optimizer.clip_norm": read_clip_norm,
  "optimizer.warmup_steps": read_warmup,
  "optimizer.name": read_optimizer,
  "optimizer.b1": read_b1,
  "optimizer.b2": read_b2,
  "optimizer.eps": read_eps,
  "optimizer.schedule": read_schedule,
  "optimizer.min_lr_ratio": read_floor,
  "objective.label_smoothing": read_label_smoothing,
  "sample.temperature": read_temperature,
  "sample.temperature_range": read_temperature_range,
  "sample.top_k": read_top_k,
  "sample.top_p": read_top_p,
  "sample.num_steps": read_num_steps,
}
# Masks come in 256ths of a row, top-p is tried at 1024 probabilities.
COARSE = {"mask_rate": 5e-3, "top_p": 1e-3}


def near(field: str, value: Any):
  """What a reader's answer has to be equal to."""
  if isinstance(value, str | int):
    return value
  coarse = COARSE.get(field.rpartition(".")[2])
  if coarse:
    return pytest.approx(value, abs=coarse)
  return pytest.approx(value, rel=1e-3, abs=1e-6 if value == 0 else 0)


# MARK: the values


def test_the_table_is_the_guides():
  """Four changes a priority; what is not changed has none."""
  fields = [row.field for row in TABLE]
  assert sorted(fields) == sorted(READERS)
  priorities = [row.priority for row in TABLE]
  assert set(priorities) == {*PRIORITIES, "-"}
  assert all(priorities.count(priority) == 4 for priority in PRIORITIES)
  for row in TABLE:
    assert (row.baseline == row.recommended) == (row.priority == "-")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_tables_values(preset):
  config = preset_config(preset)
  assert values_of(config, expected(preset)) == expected(preset)
  assert config.name == preset


@pytest.mark.parametrize(
  "arg, name",
  [("low", "low"), ("medium", "medium"), ("low,high", "high_low")],
)
def test_any_set_of_priorities_can_be_asked_for(arg, name):
  config, want = parse(f"recommended.py:{arg}"), adopt(tuple(arg.split(",")))
  assert values_of(config, want) == want
  assert config.name == f"recommended_{name}"
  assert not any(stage.objective.rehearsal for stage in config.stages)


def values_of(config: Config, fields: Iterable[str]) -> dict[str, Any]:
  written = config_lib.to_config_dict(config)
  return {field: config_path.get_value(field, written) for field in fields}


@pytest.mark.parametrize("preset, field", EVERY)
def test_what_is_built_has_the_tables_values(preset, field):
  read = READERS[field](preset_config(preset))
  assert read == near(field, expected(preset)[field])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.field)
def test_a_field_from_the_command_line_changes_what_is_built(row):
  before = row.recommended
  if isinstance(before, str):  # there is one optimizer, and one schedule
    with pytest.raises(UserError, match=f"{row.field}.*{before}"):
      parse("recommended.py", f"--config.{row.field}={before}x")
    return
  value = another(before)
  config = parse("recommended.py", f"--config.{row.field}={value}")
  read = READERS[row.field](config)
  assert read == near(row.field, value)
  assert read != near(row.field, before)


def another(value: Any) -> Any:
  if isinstance(value, tuple):
    return tuple(v / 2 for v in value)
  return value + 1 if isinstance(value, int) else value / 2


# MARK: the presets


def flat(value: Any, path: str = "") -> dict[str, Any]:
  """Returns every leaf of a config by its path."""
  if isinstance(value, dict):
    parts = {f"{path}.{k}" if path else k: v for k, v in value.items()}
  elif isinstance(value, list) and value and isinstance(value[0], dict):
    parts = {f"{path}[{i}]": v for i, v in enumerate(value)}
  else:
    return {path: value}
  return {k: v for p, part in parts.items() for k, v in flat(part, p).items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_nothing_else(preset):
  config, baseline = preset_config(preset), preset_config("baseline")
  if preset == "quick_fix":
    baseline = dataclasses.replace(baseline, stages=baseline.stages[2:])
  old, new = (flat(config_lib.to_dict(c)) for c in (baseline, config))
  changed = {path for path in old | new if old.get(path) != new.get(path)}
  added = {
    "recommended": {f"stages[{i}].rehearsal" for i in range(3)},
    "quick_fix": {"init_from"},
  }
  names = {"name"} if preset != "baseline" else set()
  assert changed - set(expected(preset)) == names | added.get(preset, set())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_combines_with_quick(preset):
  file, _ = PRESETS[preset]
  quick = ",quick" if ":" in file else ":quick"
  config, whole = parse(file + quick), parse(file)
  assert config.name == f"{preset}_quick"
  assert config.model.num_layers == 2
  for name in ("objective", "lr_factor"):
    assert [getattr(s, name) for s in config.stages] == [
      getattr(s, name) for s in whole.stages
    ]
  assert config.objective == whole.objective
  assert config.rows_per_update == whole.rows_per_update


@pytest.mark.parametrize("arg", ["strict,high", "low,strict,quick"])
def test_strict_and_a_priority_are_refused(arg, capsys):
  message = refusal(f"recommended.py:{arg}", capsys)
  assert arg in message and "give one of the two" in message


@pytest.mark.parametrize(
  "arg, hint", [("hihg", "'high'"), ("strictt", "'strict'"), ("x", "medium")]
)
def test_an_unknown_word_is_reported_with_the_nearest(arg, hint, capsys):
  message = refusal(f"recommended.py:{arg}", capsys)
  assert repr(arg) in message and hint in message


def refusal(file: str, capsys) -> str:
  """Returns the line that a command ends with."""
  with pytest.raises(SystemExit) as caught:
    parse(file)
  message = capsys.readouterr().err
  assert caught.value.code == 2
  assert message.startswith("error: ") and message.count("\n") == 1
  return message


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_warns_where_there_is_no_rehearsal(preset):
  config = preset_config(preset)
  warned = config.objective.warnings([s.objective for s in config.stages])
  assert bool(warned) == (preset != "recommended")


@pytest.mark.parametrize(
  "file, source",
  [
    ("quick_fix.py", "runs/baseline"),
    ("quick_fix.py:quick", "runs/baseline_quick"),
  ],
)
def test_the_quick_fix_needs_a_run_to_start_from(
  file, source, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=source):
    prepared.prepare(parse(file).rows, tmp_path)


# MARK: the optimizer


@pytest.mark.parametrize("preset", PRESETS)
def test_learning_rates_of_chosen_updates(preset):
  """The guide's origin had its factors, its warm-up and its floor wrong."""
  want, b = expected(preset), built(preset_config(preset))
  highest = want["optimizer.learning_rate"]
  warmup = want["optimizer.warmup_steps"]
  floor = highest * want["optimizer.min_lr_ratio"]
  rates = b.learning_rates
  for i, plan in enumerate(b.stages):
    peak = highest * want[f"stages[{i}].lr_factor"]
    start = warmup if i == 0 else plan.start
    last = plan.end - 1
    assert rates[start] == pytest.approx(peak, rel=1e-5)
    assert rates[(start + last) // 2] == pytest.approx(
      (peak + floor) / 2, rel=5e-3
    )
    assert rates[last] == pytest.approx(floor, rel=1e-5)
    assert (np.diff(rates[start : plan.end]) <= 0).all()
    if i == 0:
      assert rates[0] == pytest.approx(peak / warmup, rel=1e-5)
      assert rates[warmup // 2 - 1] == pytest.approx(peak / 2, rel=1e-5)
      assert rates[warmup - 1] == pytest.approx(peak, rel=1e-5)
  assert (rates[: warmup - 1] < rates[1:warmup]).all()


def test_a_long_warmup_is_cut_to_a_quarter_and_says_so(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *a: said.append(a[0] % a[1:]))
  config = preset_config("recommended")
  rows = [config.rows_per_update] * 3  # an update an epoch
  short = make_curriculum(config.stages, rows, config.rows_per_update)
  assert short.updates == 75 + 150 + 300
  assert warmup_updates(config.optimizer, short) == 525 // 4
  assert len(said) == 1 and "1500" in said[0] and "131" in said[0]
  rows = [12 * config.rows_per_update] * 3
  assert (
    warmup_updates(
      config.optimizer,
      make_curriculum(config.stages, rows, config.rows_per_update),
    )
    == 1500
  )
  assert len(said) == 1


@pytest.fixture(scope="module")
def trained():
  """Two updates of stage I and two of stage II, with the state after each."""
  overrides = [f"--config.stages[{i}].updates=2" for i in range(2)]
  config = parse("recommended.py", *overrides)
  config = dataclasses.replace(config, stages=config.stages[:2])
  with jax.set_mesh(make_mesh("1x1")), jax.numpy_dtype_promotion("standard"):
    b = Built(config)
    state = b.trainer.init()
    states, metrics = [jax.device_get(state)], []
    for update in range(4):
      state, measured = b.trainer.update(state, update)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(measured))
  return b, states, metrics


def test_an_update_consumes_two_microbatches_and_changes_once(trained):
  b, states, metrics = trained
  assert b.batch(0).tokens.shape == (2, 8, LENGTH)
  real = [int((b.batch(i).segments > 0).sum()) for i in range(2)]
  assert [int(m["tokens"]) for m in metrics[::2]] == real
  for done, state in enumerate(states):
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    assert {int(count) for _, count in counts} == {done}
  for before, after in itertools.pairwise(states):
    down = [s.params["blocks"]["mlp"]["down"] for s in (before, after)]
    assert (down[0] != down[1]).any()


def test_the_moments_are_kept_across_stages(trained):
  """A square only decays by b2: a new optimizer would have smaller ones."""
  _, states, _ = trained
  for before, after in itertools.pairwise(states):
    old, new = (optax.tree.get(s.opt_state, "nu") for s in (before, after))
    decayed = jax.tree.map(lambda o, n: (n >= 0.95 * o * 0.999).all(), old, new)
    assert all(jax.tree.leaves(decayed))
  counts = optax.tree.get_all_with_path(states[-1].opt_state, "count")
  assert {int(count) for _, count in counts} == {4}


def test_a_run_uses_its_schedule_and_its_stages_rates(trained):
  b, _, metrics = trained
  used = [float(m["learning_rate"]) for m in metrics]
  np.testing.assert_allclose(used, b.learning_rates, rtol=1e-6)
  for update, measured in enumerate(metrics):
    low, high = b.stages[update // 2].config.objective.mask_rate
    mean = (1 - REHEARSAL) * (low + high) / 2 + REHEARSAL / 2
    masked, tokens = map(float, measured["mask_rate"])
    assert masked / tokens == pytest.approx(mean, abs=0.1)


def test_the_loss_that_is_trained_is_smoothed(trained):
  b, states, metrics = trained
  examples, denoiser = b.examples(0), b.trainer.denoiser
  smoothing = expected("recommended")["objective.label_smoothing"]
  total, num_real = 0.0, denoiser.vocab.predictable

  @jax.jit
  def log_probabilities(params, tokens, context):
    hidden = denoiser.hidden(params, tokens, context)
    logits = denoiser.logits(params, hidden.reshape(-1, 16))
    return jax.nn.log_softmax(logits)

  for i in range(2):
    part = jax.tree.map(lambda x, i=i: x[i], examples)
    context = dataclasses.replace(part.context, keys=None)
    log_p = log_probabilities(states[0].params, part.tokens, context)
    log_p = np.asarray(log_p)[:, :num_real]
    masked = np.asarray(part.asked).reshape(-1)
    token = np.eye(num_real)[np.asarray(part.targets).reshape(-1)[masked]]
    target = (1 - smoothing) * token + smoothing / num_real
    total -= (target * log_p[masked]).sum()
  want = total / np.asarray(examples.asked).sum()
  assert float(metrics[0]["loss"]) == pytest.approx(want, rel=1e-4)


# MARK: mask rates and rehearsal


def distribution(rate: np.ndarray, low: float, high: float, rehearsal: float):
  """The share of rows with at most this rate."""
  inside = np.clip((rate - low) / (high - low), 0, 1)
  return rehearsal * rate + (1 - rehearsal) * inside


@pytest.mark.parametrize("preset", ["recommended", "recommended_strict"])
@pytest.mark.parametrize("stage", range(3))
def test_an_update_draws_one_rate_of_each_stratum(preset, stage):
  config = preset_config(preset)
  low, high = expected(preset)[f"stages[{stage}].mask_rate"]
  rehearsal = REHEARSAL if preset == "recommended" else 0.0
  rates = stage_rates(config.stages[stage].objective, config.noise)
  rows = config.rows_per_update
  for update in range(20):
    key = rng.stream(config.seed, "rate", update)
    rate = np.asarray(rates.rate(corruption.stratified_uniforms(key, rows)))
    share = distribution(rate, low, high, rehearsal)
    stratum = np.ceil(share * rows - 1e-4).astype(int) - 1
    assert sorted(stratum) == list(range(rows))
    outside = np.mean((rate < low - 1e-6) | (rate > high + 1e-6))
    want = rehearsal * (1 - (high - low))
    assert outside == pytest.approx(want, abs=2 / rows if rehearsal else 0)


def test_every_row_has_a_mask_at_the_lowest_rates():
  config = preset_config("recommended_strict")
  rates = stage_rates(config.stages[2].objective, config.noise)
  u = corruption.stratified_uniforms(rng.stream(0, "rate"), MASKED_ROWS)
  sizes = 1 + jnp.arange(MASKED_ROWS) % 20
  masked = np.asarray(draw_masks(rates.rate(u), sizes))
  assert masked.any(axis=1).all()
  assert not masked[:, 20:].any()


@pytest.mark.parametrize("stage", range(3))
def test_nelbo_weighs_by_the_density_of_range_and_rehearsal(stage):
  config = parse("recommended.py", "--config.objective.weighting=nelbo")
  examples = built(config).examples(stage)
  low, high = config.stages[stage].objective.mask_rate
  rate, masked, real = (
    np.asarray(x).reshape(16, -1)
    for x in (
      *(examples.context.condition, examples.asked),
      examples.context.segments > 0,
    )
  )
  inside = (rate[:, 0] >= low) & (rate[:, 0] <= high)
  assert 0 < inside.sum() < 16
  density = REHEARSAL + inside * (1 - REHEARSAL) / (high - low)
  w = np.minimum(1 / density, 1 / REHEARSAL)
  want = w * real.sum(axis=1) / masked.sum(axis=1) / real.sum()
  got = np.asarray(examples.weights).reshape(16, -1)
  np.testing.assert_allclose(
    got, np.broadcast_to(want[:, None], got.shape), rtol=1e-5
  )


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "recommended"])
def test_nelbo_is_refused_where_rates_are_missing(preset):
  with pytest.raises(UserError, match=r"nelbo.*stages\[0\].*rehearsal"):
    parse(PRESETS[preset][0], "--config.objective.weighting=nelbo")


# MARK: the sampler


@pytest.mark.parametrize(
  "asked, clamp, used",
  [
    (1.5, "(0.3,0.8)", 0.8),
    (0.1, "None", 0.1),
  ],
)
def test_the_clamp_says_so_and_none_switches_it_off(
  asked, clamp, used, monkeypatch
):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *a: said.append(a[0] % a[1:]))
  config = parse(
    "recommended.py",
    f"--config.sample.temperature={asked}",
    f"--config.sample.temperature_range={clamp}",
  )
  assert read_temperature(config) == pytest.approx(used, rel=1e-4)
  assert bool(said) == (used != asked)
  assert all("sample.temperature_range" in text for text in said)


@pytest.mark.parametrize("preset", ["baseline", "recommended"])
def test_the_order_is_temperature_top_k_top_p(preset):
  want, logits = expected(preset), 4 * SLOPE
  t, k = want["sample.temperature"], want["sample.top_k"]
  p = want["sample.top_p"]

  def nucleus(logits):
    mass = np.exp(logits) / np.exp(logits).sum()
    return int((np.cumsum(mass) - mass < p).sum())  # with the one that crosses

  kept = nucleus(logits[:k] / t)
  others = [min(nucleus(logits / t), k), nucleus(logits[:k]), nucleus(logits)]
  assert kept not in others
  drawn, _ = sampled(preset_config(preset).sample)(logits)
  assert (np.isfinite(drawn).sum(axis=1) == kept).all()
  np.testing.assert_allclose(
    drawn[:, :kept],
    np.broadcast_to(logits[:kept] / t, (len(drawn), kept)),
    rtol=1e-5,
  )
