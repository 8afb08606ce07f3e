"""Configuration: round trips, every refusal, and what a config file can do."""

import contextlib
import dataclasses
import json
import operator
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax import command_line, config_reference, sample
from mdm_jax import config as config_lib
from mdm_jax.config import Config
from mdm_jax.core import coercion, errors, fields
from mdm_jax.core.errors import UserError
from mdm_jax.data.config import ObjectiveStage, StageConfig
from mdm_jax.model.config import ModelConfig
from mdm_jax.objectives.config import (
  OBJECTIVES,
  Kind,
  MaskedConfig,
  MaskedStage,
  ObjectiveConfig,
)
from mdm_jax.workdir import Workdir

OPTIONAL = {
  "data.max_documents": 7,
  "data.answer_length": 9,
  "model.num_kv_heads": 4,
  "model.head_dim": 8,
  "model.mlp_dim": 128,
  "optimizer.b2": 0.99,
  "optimizer.momentum": 0.9,
  "train.keep_every": 1000,
  "train.restore_step": 40,
  "train.recheck_every": 100,
  "train.spike_sigmas": 6.0,
  "eval.final_rows": 16,
  "sample.length": 32,
  "sample.block_length": 8,
  "sample.cache_refresh": 4,
  "sample.entropy_bound": 0.25,
  "sample.threshold": 0.75,
  "sample.temperature_range": (0.2, 0.9),
  "sample.top_k": 3,
  "sample.min_p": 0.1,
  "sample.top_p": 0.5,
  "stages[0].max_words": 9,
  "stages[0].updates": 5,
  "stages[0].mask_rate": (0.1, 0.4),
}


def _error(call, *args, **kwargs):
  with pytest.raises(UserError) as caught:
    call(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _nested(path, value):
  """A dict that sets one dotted path."""
  section, _, name = path.rpartition(".")
  if section == "stages[0]":
    return {"stages": [{name: value}]}
  return _nested(section, {name: value}) if section else {name: value}


def _section(config, path):
  section, _, name = path.rpartition(".")
  if section == "stages[0]":
    stage = config.stages[0]
    return (stage if hasattr(stage, name) else stage.objective), name
  return operator.attrgetter(section)(config), name


# MARK: round trips


def test_defaults_survive_every_form():
  raw = config_lib.default_config()
  assert config_lib.from_config_dict(raw) == Config()
  plain = config_lib.to_dict(Config())
  assert config_lib.from_dict(plain) == Config()
  assert config_lib.from_dict(json.loads(json.dumps(plain))) == Config()
  saved = config_lib.to_config_dict(config_lib.from_dict(plain))
  assert config_lib.from_config_dict(saved) == Config()


@pytest.mark.parametrize("path", OPTIONAL)
def test_optional_values_survive_every_form(path):
  config = config_lib.from_dict(_nested(path, OPTIONAL[path]))
  section, name = _section(config, path)
  assert getattr(section, name) == OPTIONAL[path]
  assert config_lib.from_dict(config_lib.to_dict(config)) == config
  raw = config_lib.to_config_dict(config)
  assert config_lib.from_config_dict(raw) == config


@settings(max_examples=30)
@given(
  st.lists(
    st.builds(
      StageConfig,
      name=st.text(),
      unit=st.sampled_from(["sentences", "pairs", "paragraphs"]),
      length=st.integers(1, 4096),
      epochs=st.floats(0.01, 100),
      updates=st.none() | st.integers(1, 10),
      objective=st.builds(
        MaskedStage, mask_rate=st.none() | st.just((0.25, 0.5))
      ),
    ),
    min_size=1,
    max_size=3,
  )
)
def test_any_stages_survive_every_form(stages):
  config = Config(stages=tuple(stages))
  assert config_lib.from_dict(config_lib.to_dict(config)) == config
  raw = config_lib.to_config_dict(config)
  assert config_lib.from_config_dict(raw) == config


@pytest.mark.parametrize("path", OPTIONAL)
def test_optional_fields_are_set_to_none_and_back(path):
  raw = config_lib.default_config()
  section, name = _section(raw, path)
  section[name] = OPTIONAL[path]
  section[name] = None
  read, _ = _section(config_lib.from_config_dict(raw), path)
  assert getattr(read, name) is None
  section[name] = OPTIONAL[path]
  read, _ = _section(config_lib.from_config_dict(raw), path)
  assert getattr(read, name) == OPTIONAL[path]


def test_optional_names_every_optional_field():
  found = {
    f"{prefix}{field.name}"
    for prefix, cls in [
      *((f"{f.name}.", f.type) for f in dataclasses.fields(Config)),
      *(("stages[0].", cls) for cls in (StageConfig, MaskedStage)),
    ]
    if dataclasses.is_dataclass(cls)
    for field in dataclasses.fields(cls)
    if "None" in str(field.type) and not field.metadata.get("flat")
  }
  assert found == set(OPTIONAL)


def test_other_fields_can_not_be_none():
  raw = config_lib.default_config()
  raw.data.batch_size = None
  message = _error(config_lib.from_config_dict, raw)
  assert "data.batch_size" in message


# MARK: names and types


@pytest.mark.parametrize(
  "raw, wrong, right",
  [
    ({"sed": 1}, "sed", "seed"),
    ({"data": {"batchsize": 4}}, "data.batchsize", "batch_size"),
    ({"stages": [{"lenth": 4}]}, "stages[0].lenth", "length"),
    ({"tokenizer": {"kind": "bite"}}, "tokenizer.kind", "byte"),
    ({"model": {"dtype": "float31"}}, "model.dtype", "float32"),
    ({"data": {"on_bad_record": "skp"}}, "data.on_bad_record", "skip"),
  ],
)
def test_a_typo_is_reported_with_the_nearest_name(raw, wrong, right):
  message = _error(config_lib.from_dict, raw)
  assert wrong in message and f"did you mean {right!r}?" in message


@pytest.mark.parametrize(
  "path, wrong, nearest",
  [
    ("data.batchsize", "data.batchsize", "batch_size"),
    ("dat.batch_size", "dat", "data"),
    ("stages[3].lenth", "stages[3].lenth", "length"),
    ("stages.length", "stages.length", None),
    ("data.batch_size.x", "data.batch_size.x", None),
  ],
)
def test_a_flag_for_no_field_is_reported(path, wrong, nearest):
  message = _error(coercion.check_field, path, config_lib.form())
  assert f"unknown field {wrong};" in message
  assert nearest is None or repr(nearest) in message


def test_every_field_may_be_a_flag():
  form = config_lib.form()
  for path, cls in config_reference.sections():
    for field in dataclasses.fields(cls):
      name = f"{path}.{field.name}".lstrip(".").replace("[i]", "[12]")
      coercion.check_field(name, form)


def test_a_name_far_from_any_lists_them_all():
  assert errors.nearest("zzzz", ["b", "a"]) == "valid: a, b"
  assert errors.nearest("quik", ["slow", "quick"]) == "did you mean 'quick'?"


@pytest.mark.parametrize(
  "path, value",
  [
    ("data.batch_size", "4"),
    ("data.batch_size", 4.0),
    ("data.batch_size", True),
    ("data.corpus", 3),
    ("model.qk_norm", 1),
    ("model.dropout", True),
    ("model.dropout", "0.1"),
    ("model.num_kv_heads", "2"),
    ("sample.temperature_range", 0.5),
    ("sample.temperature_range", [0.1, 0.2, 0.3]),
    ("stages[0].mask_rate", ["a", 0.5]),
    ("data", 3),
    ("stages", 3),
  ],
)
def test_a_wrong_type_is_reported_with_its_field(path, value):
  assert path in _error(config_lib.from_dict, _nested(path, value))


def test_int_becomes_float_and_list_becomes_tuple():
  config = config_lib.from_dict(
    {"optimizer": {"clip_norm": 2}, "stages": [{"mask_rate": [0, 1]}]}
  )
  assert type(config.optimizer.clip_norm) is float
  assert config.stages[0].objective.mask_rate == (0.0, 1.0)
  assert all(
    type(rate) is float for rate in config.stages[0].objective.mask_rate
  )


def test_a_config_can_not_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().seed = 1


PATHS = {
  *("init_from", "data.cache_dir", "data.prepared", "tokenizer.path"),
  *("eval.judge", "data.chat_template"),
}


def test_found_C5_a_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  for path, cls in config_reference.sections():
    for field in dataclasses.fields(cls):
      name = f"{path}.{field.name}".lstrip(".")
      assert field.metadata.get("path", False) == (name in PATHS), name
      assert name in PATHS or "folder" not in field.metadata.get("doc", ""), (
        name
      )
  for path in PATHS:
    config = config_lib.from_dict(_nested(path, "~/a"))
    assert operator.attrgetter(path)(config) == str(tmp_path / "a")
  assert Workdir("~/a").path == tmp_path / "a"
  sample._write_page("~/page.html", "a")
  assert (tmp_path / "page.html").read_text() == "a"
  file = tmp_path / "wrong.py"
  file.write_text("def get_config(:")
  with pytest.raises(SystemExit, match="2"):
    command_line.parse(["main", "--config=~/wrong.py:quick"])


# MARK: values that can't work

HARD = [
  *(float("nan"), float("inf"), -float("inf"), -1, 0, 1e300, 1e-300),
  *(2**70, 10**400),
]


def _numbers():
  """Every number of the config, or pair of numbers: its path and its field."""
  for path, cls in config_reference.sections():
    for field in dataclasses.fields(cls):
      if {"int", "float"} & set(re.findall(r"\w+", str(field.type))):
        name = f"{path}.{field.name}" if path else field.name
        yield pytest.param(name.replace("[i]", "[0]"), field, id=name)


@pytest.mark.parametrize("path, field", list(_numbers()))
def test_found_C6_a_number_is_within_its_bounds_or_refused(path, field):
  bounds = field.metadata["bounds"]
  assert bounds, f"{path} needs bounds: see core/fields.py"
  for value in HARD:
    if isinstance(value, float) and "float" not in str(field.type):
      continue  # a wrong type
    pair = "tuple" in str(field.type)
    raw = _nested(path, [value, value] if pair else value)
    if owners := field.metadata.get("of"):
      raw.setdefault("objective", {})["name"] = owners[0]
    if fields.allows(bounds, value):
      with contextlib.suppress(UserError):  # beside others it may not fit
        config_lib.from_dict(raw)
      continue
    message = _error(config_lib.from_dict, raw)
    assert message.startswith(f"{path}{'[0]' * pair}"), message
    if value != 10**400:
      assert f"must be {fields.in_words(bounds)}" in message


@pytest.mark.parametrize(
  "bounds, inside, outside",
  [
    ("[0, 1]", (0, 0.5, 1), (-1e-9, 1.1)),
    ("(0, 1)", (1e-300, 0.5), (0, 1)),
    ("[1, 9007199254740991]", (1, 2**53 - 1), (0, 2**53)),
    ("-1 or [1, 64]", (-1, 1, 64), (0, 65, -2)),
    ("[1e-30, 1e30]", (1e-30, 1.0), (0, 1e-31, 1e31)),
  ],
)
def test_bounds(bounds, inside, outside):
  assert all(fields.allows(bounds, value) for value in inside)
  outside += float("nan"), float("inf"), -float("inf")
  assert not any(fields.allows(bounds, value) for value in outside)


def test_bounds_are_reported():
  assert fields.in_words("[0, 1)") == "in [0, 1)"
  assert fields.in_words("-1 or [1, 64]") == "-1 or in [1, 64]"


def test_a_window_of_one_has_no_deviation():
  config_lib.from_dict(_nested("train.spike_window", 2))
  for value in (1, 0, -1):
    message = _error(config_lib.from_dict, _nested("train.spike_window", value))
    assert "train.spike_window" in message and "[2, " in message


@pytest.mark.parametrize(
  "raw, named",
  [
    ({"optimizer": {"learning_rate": 0.5}, "stages": [{"lr_factor": 3}]}, "x"),
    ({"optimizer": {"learning_rate": 0.1, "weight_decay": 20}}, "= 0.1, and 2"),
    ({"data": {"batch_size": 8192}, "optimizer": {"accumulation": 4096}}, "33"),
    ({"stages": [{"min_words": 9, "max_words": 8}]}, "stages[0].min_words"),
    ({"stages": [{"mask_rate": [0.5, 0.5 + 1e-9]}]}, "stages[0].mask_rate"),
  ],
)
def test_numbers_that_do_not_go_together(raw, named):
  assert named in _error(config_lib.from_dict, raw)


@pytest.mark.parametrize("value", [[0.0, 1], [0.8, 0.3], [-1, 1]])
def test_temperatures_are_positive_and_rise(value):
  raw = {"sample": {"temperature_range": value}}
  assert "sample.temperature_range" in _error(config_lib.from_dict, raw)


@pytest.mark.parametrize(
  "fields, named",
  [
    ({"entropy_bound": 0.1, "threshold": 0.9}, "sample.threshold"),
    ({"entropy_bound": 0.1, "remasking": "cap"}, "sample.entropy_bound=None"),
    ({"threshold": 0.9, "schedule": "cosine"}, "sample.schedule=linear"),
    ({"block_length": 8, "schedule": "optimal"}, "sample.block_length"),
  ],
)
def test_settings_of_the_sampler_that_exclude_each_other(fields, named):
  assert named in _error(config_lib.from_dict, {"sample": fields})


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_rehearsal_is_a_share(value):
  stage = {"mask_rate": [0.1, 0.2], "rehearsal": value}
  message = _error(config_lib.from_dict, {"stages": [stage]})
  assert "stages[0].rehearsal" in message


@pytest.mark.parametrize(
  "model, named",
  [
    ({"embed_dim": 100, "num_heads": 3}, "model.num_heads=3"),
    ({"embed_dim": 12, "num_heads": 4}, "even head size"),
    ({"num_heads": 12, "num_kv_heads": 5}, "model.num_kv_heads=5"),
  ],
)
def test_heads_must_fit(model, named):
  message = _error(config_lib.from_dict, {"model": model})
  assert named in message


def test_stages_must_not_be_empty():
  assert "stages is empty" in _error(Config, stages=())


@pytest.mark.parametrize(
  "rates", [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (0.0, 0.0)]
)
def test_mask_rates_must_be_a_range(rates):
  told = StageConfig(objective=MaskedStage(mask_rate=rates))
  message = _error(Config, stages=(StageConfig(), told))
  assert "stages[1].mask_rate" in message


def test_rehearsal_needs_a_range():
  told = StageConfig(objective=MaskedStage(rehearsal=0.5))
  message = _error(Config, stages=(told,))
  assert "stages[0].rehearsal" in message and "mask_rate" in message


def test_the_bound_needs_every_rate():
  def build(**stage):
    raw = {"objective": {"weighting": "nelbo"}, "stages": [stage]}
    return config_lib.from_dict(raw)

  build()
  build(mask_rate=[0, 1])
  build(mask_rate=[0.1, 0.2], rehearsal=0.1)
  message = _error(build, mask_rate=[0.1, 0.2])
  assert "stages[0].rehearsal" in message and "masked_ce" in message


# MARK: what a config file does


def test_a_typo_in_a_config_file_fails_there():
  config = config_lib.default_config()
  with pytest.raises((AttributeError, KeyError), match="batch_size"):
    config.data.batchsize = 4
  with pytest.raises((AttributeError, KeyError), match="batch_size"):
    config.data.update(batchsize=4)
  assert "length" in _error(config_lib.stage, lenth=3)


def test_a_wrong_type_in_a_config_file_fails_there():
  config = config_lib.default_config()
  with pytest.raises(TypeError):
    config.data.batch_size = "four"
  assert "length" in _error(config_lib.stage, length="long")


def test_stages_take_their_fields():
  config = config_lib.default_config()
  config.stages = (
    config_lib.stage(name="a", length=32, mask_rate=(0.5, 0.6)),
    config_lib.stage(name="b"),
  )
  stages = config_lib.from_config_dict(config).stages
  told = MaskedStage(mask_rate=(0.5, 0.6))
  assert stages[0] == StageConfig(name="a", length=32, objective=told)
  assert stages[1] == StageConfig(name="b", objective=MaskedStage())


def test_the_effective_batch_and_sample_length():
  config = config_lib.from_dict(
    {"data": {"batch_size": 6}, "optimizer": {"accumulation": 3}}
  )
  assert config.rows_per_update == 18
  assert config.sample_length == config.stages[-1].length
  config = config_lib.from_dict({"sample": {"length": 17}})
  assert config.sample_length == 17


def test_quick_keeps_the_stages_and_shrinks_the_rest():
  config = config_lib.default_config()
  config.name = "big"
  config.model = coercion.to_config_dict(
    ModelConfig(num_kv_heads=3, mlp_dim=999, remat="dots")
  )
  config.stages = tuple(
    config_lib.stage(name=str(i), epochs=50, unit=unit, lr_factor=0.5)
    for i, unit in enumerate(["sentences", "pairs", "paragraphs"])
  )
  before = config_lib.from_config_dict(config)
  after = config_lib.from_config_dict(config_lib.quick(config))
  assert after.name == "big_quick"
  assert after.model.embed_dim <= 64 and after.model.num_layers <= 2
  assert after.data.max_documents <= 24
  assert sum(s.updates for s in after.stages) <= 40
  assert max(s.length for s in after.stages) <= 128
  assert after.eval.every <= 12 and after.eval.final_rows <= 16
  assert after.sample_length == after.stages[-1].length
  for kept in ("name", "unit", "lr_factor", "objective", "easiest"):
    assert [getattr(s, kept) for s in after.stages] == [
      getattr(s, kept) for s in before.stages
    ]
  for section in ("objective", "noise", "mesh"):
    assert getattr(after, section) == getattr(before, section)
  assert after.model.remat == "dots"


def test_arguments_of_a_config():
  name = lambda *args: (
    config_lib.apply_arg(config_lib.default_config(), *args).name
  )
  assert name("") == "run"
  assert name("quick") == "run_quick"
  assert name("mine,quick", "mine") == "run_quick"
  assert name("mine", "mine") == "run"
  config = config_lib.default_config()
  message = _error(config_lib.apply_arg, config, "quik")
  assert "'quik'" in message and "did you mean 'quick'?" in message
  assert "mine" in _error(config_lib.apply_arg, config, "min", "mine")


@pytest.mark.parametrize("arg", ["", "quick"])
def test_the_result_is_locked(arg):
  config = config_lib.apply_arg(config_lib.default_config(), arg)
  for section in (config, config.data, config.stages[0]):
    with pytest.raises((AttributeError, KeyError)):
      section.no_such_field = 1


# MARK: an objective's own fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(ObjectiveConfig):
  """A toy."""

  strength: float = fields.field(0.5, "of the toy", "[0, 1]")
  label_smoothing: float = fields.field(0.25, "as it is elsewhere", "[0, 0.9]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyStage(ObjectiveStage):
  """A toy's stage."""

  block: int | None = fields.fixed(None, "tokens of a block", "[1, 64]")

  def check(self, path):
    if self.block == 13:
      raise UserError(f"{path}.block=13 is bad luck")


@pytest.fixture
def toy(monkeypatch):
  monkeypatch.setattr(OBJECTIVES, "_pieces", dict(OBJECTIVES._pieces))
  OBJECTIVES.register("toy", Kind(ToyConfig, ToyStage, "builtins:dict"))


def test_an_objective_brings_its_own_fields(toy):
  raw = config_lib.default_config()
  raw.objective.update(name="toy", strength=1.0)
  raw.stages = (config_lib.stage(length=32, block=4), config_lib.stage())
  config = config_lib.from_config_dict(raw)
  assert config.objective == ToyConfig(name="toy", strength=1.0)
  assert [s.objective for s in config.stages] == [ToyStage(block=4), ToyStage()]
  saved = config_lib.to_dict(config)
  assert saved["objective"] == {
    "name": "toy",
    "strength": 1.0,
    "label_smoothing": 0.25,
  }
  assert saved["stages"][0]["block"] == 4 and "mask_rate" not in str(saved)
  assert config_lib.from_dict(json.loads(json.dumps(saved))) == config
  again = config_lib.from_config_dict(config_lib.to_config_dict(config))
  assert again == config


def test_without_a_name_the_objective_is_masked(toy):
  raw = {"objective": {"label_smoothing": 0.1}, "stages": [{"rehearsal": 0.0}]}
  config = config_lib.from_dict(raw)
  assert config.objective == MaskedConfig(label_smoothing=0.1)
  assert config.stages[0].objective == MaskedStage()


@pytest.mark.parametrize(
  "raw, message",
  [
    (
      {"objective": {"name": "toy", "weighting": "nelbo"}},
      "objective.weighting='nelbo' belongs to objective.name=masked or"
      " joint or block; this run has toy",
    ),
    (
      {"stages": [{}, {"block": 4}]},
      "stages[1].block=4 belongs to objective.name=toy; this run has masked",
    ),
    (
      {"objective": {"name": "toy"}, "stages": [{"blok": 4}]},
      "unknown field stages[0].blok; did you mean 'block'?",
    ),
    (
      {"objective": {"name": "toy"}, "stages": [{"block": 99}]},
      "stages[0].block=99 must be in [1, 64]",
    ),
    (
      {"objective": {"name": "toy"}, "stages": [{"block": 13}]},
      "stages[0].block=13 is bad luck",
    ),
    (
      {"objective": {"name": "toys"}},
      "objective.name='toys': unknown objective; did you mean 'toy'?",
    ),
  ],
)
def test_a_field_of_another_objective_is_refused(toy, raw, message):
  assert _error(config_lib.from_dict, raw) == message


def test_parts_must_be_the_chosen_objectives(toy):
  message = _error(Config, objective=MaskedConfig(name="toy"))
  assert "takes a ToyConfig, not a MaskedConfig" in message
  told = (StageConfig(objective=ToyStage()),)
  assert "takes a MaskedStage, not a ToyStage" in _error(Config, stages=told)


def test_fields_of_one_name_have_one_type(toy):
  wrong = dataclasses.make_dataclass(
    "WrongStage",
    [("block", float, fields.field(1.0, "a block"))],
    bases=(ObjectiveStage,),
    frozen=True,
    kw_only=True,
  )
  OBJECTIVES.register("wrong", Kind(ObjectiveConfig, wrong, "builtins:dict"))
  message = _error(config_lib.default_config)
  assert "WrongStage.block" in message


def test_the_reference_says_whose_a_field_is(toy):
  page = config_reference.reference()
  assert (
    "| `objective.strength` | `float` | [0, 1] | `0.5` | toy: of the" in page
  )
  assert "masked, autoregressive, joint, block, toy" in page


@pytest.mark.parametrize(
  "line",
  [
    "from mdm_jax.core.config import default_config",
    "from mdm_jax.core import config",
    "import mdm_jax.core.config",
  ],
)
def test_a_module_that_has_moved_is_reported(tmp_path, capsys, line):
  file = tmp_path / "old.py"
  file.write_text(f"import math\n{line}\n")
  with pytest.raises(SystemExit, match="2"):
    command_line.parse(["main", f"--config={file}"])
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and f"{file}, line 2: " in error
  assert "mdm_jax.core.config has moved to mdm_jax.config" in error
