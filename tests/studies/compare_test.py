"""The sampling settings that are compared."""

import sys

import pytest

from mdm_jax import config as config_lib
from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.studies import compare, frontier
from mdm_jax.workdir import Workdir


def test_every_way_is_another_that_can_work():
  ways = compare.ways(128)
  settings = [
    config_lib.from_dict({"sample": fields}).sample for fields in ways.values()
  ]
  assert len(set(settings)) == len(ways) > 30
  for order in ("random", "spread", "confidence"):
    for steps in (12, 24, 48, 128):
      assert f"{order}, {steps} steps" in ways
  # A colour of the plot for each order and each filter.
  groups = {compare._group(name) for name in ways}
  assert {"random", "confidence", "temperature", "top_p", "min_p"} <= groups
  assert compare._group("validation text") == "validation text"


def test_a_way_that_is_not_there_is_one_line(tmp_path):
  with pytest.raises(UserError, match="--ways=margni, 24 steps.*'margin, 24"):
    compare.compare_workdir(Config(), Workdir(tmp_path), "margni, 24 steps")


def test_the_frontier_says_how_to_install_its_plots(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[plots\]'"):
    frontier.frontier_workdir(Config(), Workdir(tmp_path))
