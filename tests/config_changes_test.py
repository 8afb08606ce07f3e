"""Which changes of the config a resume accepts, and how others are refused."""

import dataclasses
import typing

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mdm_jax import config as config_lib
from mdm_jax import config_changes
from mdm_jax.config import Config
from mdm_jax.config_changes import Change
from mdm_jax.core import registry
from mdm_jax.core.errors import UserError
from mdm_jax.data.config import ObjectiveStage
from mdm_jax.objectives.config import OBJECTIVES, Kind, ObjectiveConfig

NAMES = ("a", "b", "c")
SAVED = config_lib.from_dict(
  {
    "data": {"batch_size": 8},
    "optimizer": {"accumulation": 2},
    "stages": [
      {"name": name, "updates": 10, "mask_rate": [0.2, 0.8], "rehearsal": 0.5}
      for name in NAMES
    ],
  }
)


def _leaves(value, prefix=""):
  """Every field under a config: (path, dataclass field, value)."""
  for field in dataclasses.fields(value):
    item, path = getattr(value, field.name), f"{prefix}{field.name}"
    if dataclasses.is_dataclass(item):
      flat = field.metadata.get("flat")
      yield from _leaves(item, prefix if flat else f"{path}.")
    elif path == "stages":
      for i, stage in enumerate(item):
        yield from _leaves(stage, f"stages[{i}].")
    else:
      yield path, field, item


LEAVES = {path: (field, value) for path, field, value in _leaves(SAVED)}
ENDS = {"stages[2].updates", "stages[2].epochs"}


def _set(config, values):
  """The config with the values of dotted paths."""
  raw = config_lib.to_dict(config)
  for path, value in values.items():
    *sections, name = path.replace("]", "").replace("[", ".").split(".")
    target = raw
    for section in sections:
      target = target[int(section) if section.isdigit() else section]
    target[name] = value
  return config_lib.from_dict(raw)


def _field_values(field):
  """A strategy for the values of a field, as JSON has them."""
  if "registry" in field.metadata:
    return st.sampled_from(_choices(field))
  return _values(field.type)


def _values(hint):
  args = typing.get_args(hint)
  if typing.get_origin(hint) is typing.Literal:
    return st.sampled_from(args)
  if type(None) in args:
    return st.none() | _values(args[0])
  if hint == tuple[str, ...]:
    return st.sampled_from([[], ["json"], ["json", "typing"], ["query"]])
  if typing.get_origin(hint) is tuple:
    return st.sampled_from([[0.1, 0.4], [0.2, 0.9]])
  return {
    bool: st.booleans(),
    int: st.integers(1, 2**12),
    float: st.floats(0.001, 0.5),
    # Of a few letters: a table of all takes seconds to make.
    str: st.text("ab3: \u00e9", max_size=5) | st.just("3:4"),
  }[hint]


@st.composite
def _cases(draw):
  """A field, and a value of its type."""
  path = draw(st.sampled_from(sorted(LEAVES)))
  return path, draw(_field_values(LEAVES[path][0]))


def _changed(case):
  """The valid config in which that field has another value, and the change."""
  path, value = case
  try:
    config = _set(SAVED, {path: value})
  except UserError:
    assume(False)
  (after,) = (v for p, _, v in _leaves(config) if p == path)
  assume(after != LEAVES[path][1])
  return config, Change(path, LEAVES[path][1], after)


def _paths(changes):
  return [change.path for change in changes]


def _error(now, saved=SAVED):
  with pytest.raises(UserError) as caught:
    config_changes.check(saved, now)
  return str(caught.value)


# MARK: what is found


@given(_cases())
def test_a_config_is_as_it_is(case):
  config, _ = _changed(case)
  again = config_lib.from_dict(config_lib.to_dict(config))
  assert config_changes.compare(config, again) == ()
  assert config_changes.check(config, again) == ()


@given(_cases())
def test_any_changed_field_is_found_with_its_path(case):
  config, change = _changed(case)
  field, _ = LEAVES[change.path]
  changes = config_changes.compare(SAVED, config)
  fixed = field.metadata.get("fixed", False) and change.path not in ENDS
  assert changes == (dataclasses.replace(change, fatal=fixed),)


@given(_cases())
def test_the_other_way_round_it_is_as_bad(case):
  config, change = _changed(case)
  there = config_changes.compare(SAVED, config)
  back = config_changes.compare(config, SAVED)
  (fatal,) = {c.fatal for c in there + back}
  assert there == (dataclasses.replace(change, fatal=fatal),)
  assert back == (Change(change.path, change.after, change.before, fatal),)


def test_every_field_can_be_changed_by_the_tests():
  """Otherwise the properties above would be silent about one."""
  values = (1, 3, 4, 24, 0.3, 1e-5, "x", "de", "3:4", True, False, [0.1, 0.4])
  # A module that is imported already, and a product for LoRA.
  values += ["json"], ["query"]
  found = {
    path
    for path, (field, _) in LEAVES.items()
    if any(_works(path, value) for value in (*values, *_choices(field)))
  }
  single = {"optimizer.schedule"}  # there is no other value
  # See below; and blocks.
  needs_more = {"model.lora.rank", "sample.cache"}
  assert found == set(LEAVES) - single - needs_more


def test_another_rank_is_another_run():
  saved = _set(SAVED, {"init_from": "runs/base", "model.lora.rank": 4})
  assert "model.lora.rank" in _error(_set(saved, {"model.lora.rank": 8}), saved)


def _choices(field):
  if "registry" in field.metadata:
    return sorted(registry.resolve(field.metadata["registry"]))
  return typing.get_args(field.type)


def _works(path, value):
  try:
    changes = config_changes.compare(SAVED, _set(SAVED, {path: value}))
  except UserError:
    return False
  return _paths(changes) == [path]


def test_a_run_keeps_its_objective():
  """Two of them share no fields, and measure checkpoints by other numbers."""
  kind = Kind(ObjectiveConfig, ObjectiveStage, lambda *_: None)
  OBJECTIVES.register("another", kind)
  try:
    stages = [{"name": name, "updates": 10} for name in NAMES]
    raw = config_lib.to_dict(SAVED)
    now = raw | {"objective": {"name": "another"}, "stages": stages}
    with pytest.raises(UserError, match="other settings") as error:
      config_changes.check(SAVED, config_lib.from_dict(now))
    assert "objective.name  masked  another" in str(error.value)
  finally:
    del OBJECTIVES._pieces["another"]


# MARK: what a run can go on with


@pytest.mark.parametrize("path", ["data.batch_size", "optimizer.accumulation"])
def test_another_effective_batch_is_another_run(path):
  assert path in _error(_set(SAVED, {path: 4}))


def test_a_batch_may_be_cut_into_other_microbatches():
  now = _set(SAVED, {"data.batch_size": 2, "optimizer.accumulation": 8})
  assert _paths(config_changes.check(SAVED, now)) == [
    "data.batch_size",
    "optimizer.accumulation",
  ]


def test_only_the_last_stage_may_be_of_another_size():
  for name in ("updates", "epochs"):
    now = _set(SAVED, {f"stages[2].{name}": 30})
    assert _paths(config_changes.check(SAVED, now)) == [f"stages[2].{name}"]
    assert f"stages[1].{name}" in _error(_set(SAVED, {f"stages[1].{name}": 30}))


def test_other_stages_are_another_run():
  longer = dataclasses.replace(SAVED, stages=SAVED.stages + SAVED.stages[-1:])
  for now, counts in ((longer, ("3", "4")), (_shorter(), ("3", "2"))):
    last = _error(now).splitlines()[-1].split()
    assert last == ["number", "of", "stages", *counts]


def _shorter():
  return dataclasses.replace(SAVED, stages=SAVED.stages[:-1])


def test_the_last_stage_of_a_longer_run_is_not_the_saved_one():
  now = _set(SAVED, {"stages[2].updates": 30})
  now = dataclasses.replace(now, stages=now.stages + SAVED.stages[-1:])
  found = _paths(c for c in config_changes.compare(SAVED, now) if c.fatal)
  assert found == ["number of stages", "stages[2].updates"]


def test_a_field_that_an_older_version_did_not_save_has_its_default():
  old = config_lib.to_dict(Config())
  del old["data"]["on_bad_record"], old["train"]["keep_every"], old["mesh"]
  saved = config_lib.from_dict(old)
  assert config_changes.check(saved, Config()) == ()
  now = _set(Config(), {"train.keep_every": 100})
  assert config_changes.check(saved, now) == (
    Change("train.keep_every", None, 100),
  )


# MARK: how it is told


def test_fatal_changes_are_printed_as_a_table():
  now = _set(
    SAVED,
    {
      "model.embed_dim": 192,
      "tokenizer.path": "x\n.model",
      "data.corpus": "text:elsewhere",
      "train.log_every": 1,
      "stages[0].mask_rate": [0.1, 0.4],
    },
  )
  first, *lines = _error(now).split("\n")
  assert "started with other settings" in first
  assert "another --workdir" in first and "the saved values" in first
  assert lines == [
    "  field                saved       now",
    '  tokenizer.path       ""          "x\\n.model"',
    "  model.embed_dim      768         192",
    "  stages[0].mask_rate  (0.2, 0.8)  (0.1, 0.4)",
  ]
