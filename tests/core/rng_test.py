"""Random numbers: every seed has its own, and every stream one use."""

import ast
import collections
import pathlib

import jax
import numpy as np
import pytest

import mdm_jax
from mdm_jax import config as config_lib
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.data import batches

PACKAGE = pathlib.Path(mdm_jax.__file__).parent
LAST = 2**32 - 1


@pytest.mark.parametrize("section", ["", "sample"])
def test_found_A12_every_seed_that_is_allowed_is_another_one(section):
  of = lambda seed: {section: {"seed": seed}} if section else {"seed": seed}
  for seed in (-1, LAST + 1, 2**64, 10**20):
    with pytest.raises(UserError, match=rf"seed={seed} must be in \[0, {LAST}"):
      config_lib.from_dict(of(seed))
  allowed = [0, 1, 2**31, LAST]
  for seed in allowed:
    config_lib.from_dict(of(seed))
  keys = [jax.random.key_data(rng.stream(s, "init", 3)) for s in allowed]
  assert len({np.asarray(key).tobytes() for key in keys}) == len(allowed)
  orders = [
    batches.row_numbers(99, batches.stage_seed(s, 0), 0, 99) for s in allowed
  ]
  assert len({order.tobytes() for order in orders}) == len(allowed)


def _streams(tree):
  """Yields the name in every call of `rng.stream`, direct or handed down."""
  handed_down = set()
  for scope in ast.walk(tree):
    if isinstance(scope, ast.Assign) and isinstance(scope.value, ast.Lambda):
      name, function = ast.unparse(scope.targets[0]), scope.value
    elif isinstance(scope, ast.FunctionDef):
      name, function = scope.name, scope
    else:
      continue
    args = {arg.arg for arg in function.args.args}
    for call in _calls(function, "rng.stream"):
      if any(getattr(n, "id", None) in args for n in ast.walk(call.args[1])):
        handed_down.add(name)
  for name in handed_down:
    for call in _calls(tree, name):
      yield from (a.value for a in call.args if _is_text(a))
  for call in _calls(tree, "rng.stream"):
    assert _is_text(call.args[1]) or handed_down, ast.unparse(call)
    if _is_text(call.args[1]):
      yield call.args[1].value
  for name in ("draws.key", "draws.keys", "self.keys"):  # of an objective
    for call in _calls(tree, name):
      yield from (a.value for a in call.args if _is_text(a))


def _calls(tree, name):
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      if f".{ast.unparse(node.func)}".endswith(f".{name}"):
        yield node


def _is_text(node):
  return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_found_A13_a_stream_has_one_use():
  uses = collections.defaultdict(list)
  for path in PACKAGE.rglob("*.py"):
    if path.parent.name != "benchmarks":  # which keep nothing that they draw
      for name in _streams(ast.parse(path.read_text())):
        uses[name].append(path.name)
  assert {"init", "mask", "dropout", "rate", "nelbo", "sample"} <= set(uses)
  assert not {name: at for name, at in uses.items() if len(at) > 1}
