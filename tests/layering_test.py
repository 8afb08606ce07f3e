"""Imports go downwards, and modules and functions stay small."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mdm_jax"
MODULES = sorted(
  p.relative_to(ROOT) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"
)
FLOORS = {
  "core": 0,
  "data": 1,
  "diffusion": 1,
  "model": 1,
  "training": 2,
  "sampling": 2,
  "evaluation": 2,
  "benchmarks": 4,
}
PROGRAMS = 3
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80

SIDEWAYS = {
  **{
    ("main.py", name): "main is the door to the programs"
    for name in (
      *("train.py", "evaluate.py", "sample.py", "plan.py", "preview.py"),
      *("frontier.py", "compare.py", "report.py", "interactive.py", "fit.py"),
      "prepare.py",
    )
  },
  ("train.py", "evaluate.py"): "training ends with the evaluation",
  ("train.py", "plan.py"): "training begins by telling its plan",
  ("train.py", "preview.py"): "training begins by telling what it reads",
  ("prepare_beam.py", "prepare.py"): "both tell in the same words",
  ("interactive.py", "sample.py"): "it draws as a user of the library does",
  ("compare.py", "sample.py"): "it draws as a user of the library does",
}
TOO_LONG = {}
PRIVATE = re.compile(
  r"\b_src\b|(?<!\w)jax\.(_(?!_)|core\b|interpreters\b|lib\b)"
)
INTERNALS = {
  "mdm_jax/core/jax_internals.py": "looks whether it is there",
  "tests/launch_gke_test.py": "plays a machine with a TPU",
}


def _tree(module):
  return ast.parse((ROOT / module).read_text())


def _home(module):
  parts = pathlib.Path(module).parts
  return parts[1]


def _floor(module):
  home = _home(module)
  return PROGRAMS if home.endswith(".py") else FLOORS[home]


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
  assert ("mdm_jax/main.py", "mdm_jax/train.py") in names
  assert ("mdm_jax/train.py", "mdm_jax/core/session.py") in names
  assert len(names) > 50


def test_every_folder_has_a_floor():
  assert {_home(m) for m in MODULES if not _home(m).endswith(".py")} <= set(
    FLOORS
  )


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module):
  for target in _imports(module):
    inside = _home(module) == _home(target)
    listed = (_home(module), _home(target)) in SIDEWAYS
    assert _floor(target) < _floor(module) or inside or listed, target


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
