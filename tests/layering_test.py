"""Imports go downwards, and modules and functions stay small."""

import ast
import pathlib
import re

import pytest
from paths import ROOT

PACKAGE = ROOT / "mdm_jax"
MODULES = sorted(
  p.relative_to(ROOT) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"
)
FLOORS = {
  "core": 0,
  "data": 1,
  "huggingface": 1,
  "model": 1,
  "checkpoints": 1,
  "runtime": 1,
  "objectives": 2,
  "training": 3,
  "sampling": 3,
  "evaluation": 3,
  "config.py": 4,
  "workdir.py": 4,
  "trained_model.py": 4,
  "imported_model.py": 4,
  "weights.py": 4,
  "blueprint.py": 4,
  "config_changes.py": 4,
  "config_reference.py": 4,
  "command_line.py": 4,
  "tuned_sampling.py": 4,
  "planning": 4,
  "studies": 5,
  "main.py": 6,
  "study.py": 6,
  "benchmarks": 6,
}
PROGRAMS = 5  # every other file beside the rooms
# They know the whole config, which is above them.
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

SIDEWAYS = {
  ("training_loop.py", "start.py"): "training begins with its start",
  ("start.py", "evaluate.py"): "training ends with the evaluation",
  ("start.py", "plan.py"): "training begins by telling its plan",
  ("start.py", "preview.py"): "training begins by telling what it reads",
  ("start.py", "resume.py"): "training begins where an attempt before ended",
  ("start.py", "validation.py"): "training is evaluated on its way",
  ("validation.py", "evaluate.py"): "as at its end, on fewer rows",
  ("evaluate.py", "measured_text.py"): "which text results are of",
  ("likelihood.py", "measured_text.py"): "which text a likelihood is of",
  ("evaluate.py", "sampled_texts.py"): "samples are part of the results",
  ("evaluate.py", "sampled_answers.py"): "or answers to held-out prompts",
  ("sampled_answers.py", "sampled_texts.py"): "drawn in the same way",
  ("studies", "evaluate.py"): "tuned sampling is measured as an evaluation is",
  ("studies", "sampled_answers.py"): "answers are drawn in the same way",
  ("studies", "measured_text.py"): "which text results are of",
  ("studies", "likelihood.py"): "a cell's exact likelihood",
  ("studies", "training_loop.py"): "a study trains its cells",
  ("studies", "sample.py"): "it draws as a user of the library does",
  ("workdir.py", "config.py"): "a workdir has the run's config",
  ("blueprint.py", "config.py"): "a run is put together from all of it",
  ("trained_model.py", "config.py"): "a model is read by its run's config",
  ("trained_model.py", "workdir.py"): "a model is read out of a run's folder",
  ("trained_model.py", "weights.py"): "a model has parameters",
  ("weights.py", "workdir.py"): "they are read out of a run's folder",
  ("imported_model.py", "weights.py"): "or out of another library's",
  ("imported_model.py", "config.py"): "an imported model has a config too",
  ("imported_model.py", "trained_model.py"): "it is used as a trained one is",
  ("command_line.py", "imported_model.py"): "an imported model has its sizes",
  ("export_adapter.py", "export.py"): "both fill a new folder",
  ("data", "huggingface"): "a tokenizer is read out of a folder",
  ("huggingface", "model"): "a folder's weights become a model's parameters",
  ("config_changes.py", "config.py"): "two configs, compared",
  ("config_reference.py", "config.py"): "a page of all its fields",
  ("command_line.py", "config.py"): "flags become a config",
  ("tuned_sampling.py", "config.py"): "a config with other sampling settings",
  ("tuned_sampling.py", "workdir.py"): "they are a file of a run's folder",
  ("command_line.py", "workdir.py"): "eval and sample take the run's config",
  ("evaluation", "sampling"): "samples that are measured have settings",
  ("prepare_beam.py", "prepare.py"): "both fill a folder and describe it",
  ("sample.py", "scoring.py"): "a model samples and scores",
  ("lm_eval.py", "sample.py"): "it scores and draws as a user does",
  ("interactive.py", "sample.py"): "it draws as a user of the library does",
}
TOO_LONG = {}
PRIVATE = re.compile(
  r"\b_src\b|(?<!\w)jax\.(_(?!_)|core\b|interpreters\b|lib\b)"
)
INTERNALS = {
  "mdm_jax/core/jax_internals.py": "looks whether it is there",
  "tests/launch/gke_test.py": "plays a machine with a TPU",
}


def _tree(module):
  return ast.parse((ROOT / module).read_text())


def _home(module):
  parts = pathlib.Path(module).parts
  return parts[1]


def _floor(module):
  home = _home(module)
  return FLOORS.get(home, PROGRAMS) if home.endswith(".py") else FLOORS[home]


def _file(name):
  path = pathlib.Path(*name.split("."))
  if (ROOT / path).with_suffix(".py").exists():
    return path.with_suffix(".py")
  return None


def _imports(module):
  for node in ast.walk(_tree(module)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{module}: a relative import"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
      names.append(node.module)
    else:
      continue
    for name in names:
      if name.split(".")[0] == "mdm_jax" and _file(name):
        yield _file(name)


def _edges():
  return {(m, target) for m in MODULES for target in _imports(m)}


def test_the_edges_are_found():
  names = {(a.as_posix(), b.as_posix()) for a, b in _edges()}
  assert ("mdm_jax/main.py", "mdm_jax/training_loop.py") in names
  assert ("mdm_jax/start.py", "mdm_jax/runtime/session.py") in names
  assert len(names) > 50


def test_every_folder_has_a_floor():
  assert {_home(m) for m in MODULES if not _home(m).endswith(".py")} <= set(
    FLOORS
  )


def _goes_down(module, target):
  inside = _home(module) == _home(target)
  listed = (_home(module), _home(target)) in SIDEWAYS
  return _floor(target) < _floor(module) or inside or listed


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module):
  wrong = [t for t in _imports(module) if not _goes_down(module, t)]
  assert not wrong


def test_every_exception_is_needed():
  edges = {(_home(a), _home(b)) for a, b in _edges()}
  assert set(SIDEWAYS) <= edges
  assert all(
    _floor(f"mdm_jax/{a}") == _floor(f"mdm_jax/{b}") for a, b in SIDEWAYS
  )
  for path in TOO_LONG:
    assert len((ROOT / path).read_text().splitlines()) > MAX_MODULE_LINES


def test_nothing_goes_in_a_circle():
  below = {m: set(_imports(m)) - {m} for m in MODULES}
  while below:
    done = [m for m, targets in below.items() if not targets]
    assert done, f"a circle among {sorted(map(str, below))}"
    for m in done:
      del below[m]
    for targets in below.values():
      targets.difference_update(done)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_and_functions_are_short(module):
  lines = (ROOT / module).read_text().splitlines()
  assert len(lines) <= MAX_MODULE_LINES or module.as_posix() in TOO_LONG
  for node in ast.walk(_tree(module)):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


def test_only_one_module_reaches_behind_jaxs_public_names():
  files = [p.relative_to(ROOT) for p in ROOT.glob("*/**/*.py")]
  assert len(files) > 200
  found = {
    path.as_posix()
    for path in files
    if PRIVATE.search((ROOT / path).read_text())
  }
  assert found == set(INTERNALS)


# What only an objective knows of: see `mdm_jax/objectives/measured.py`.
OF_AN_OBJECTIVE = re.compile(r"nelbo|mask_rate|mask_bins", re.IGNORECASE)
BLIND = "training", "checkpoints", "runtime", "core", "evaluation", "sampling"


def test_no_room_knows_a_number_of_an_objective_by_name():
  files = [p for room in BLIND for p in (PACKAGE / room).rglob("*.*")]
  found = {
    path.relative_to(ROOT).as_posix()
    for path in files
    if path.suffix in (".py", ".html")
    and OF_AN_OBJECTIVE.search(path.read_text())
  }
  assert len(files) > 50 and not found


def test_the_design_page_draws_every_module():
  """In the block under "Floors": a room's line, and the module's name."""
  page = (ROOT / "docs" / "design.md").read_text()
  floors = page[page.index("## Floors") : page.index("## Where to find things")]
  drawn = set(re.findall(r"\w+", floors))
  plain = {"config"}  # every room's own
  names = {m.stem for m in MODULES if _home(m) != "benchmarks"}
  assert names - plain <= drawn
