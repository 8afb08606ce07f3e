"""Describing devices that are not here, to compile for them."""

import importlib.util
import re

import pytest

from mdm_jax.benchmarks import topology
from mdm_jax.core.errors import UserError

LAYERS, WIDTH, VOCABULARY = 12, 768, 50_257  # of the preset gpt2


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:12", "h200:x"])
def test_a_number_of_gpus_that_hosts_do_not_have_is_told(name):
  with pytest.raises(UserError, match=re.escape(repr(name))) as told:
    topology.devices(name)
  assert "a multiple of 8" in str(told.value)


@pytest.mark.parametrize(
  "name, extra", [("h100:1", "cuda13"), ("v5e:1", "tpu")]
)
def test_without_their_compiler_one_line_says_what_to_install(name, extra):
  installed = {"cuda13": "jax_cuda13_plugin", "tpu": "libtpu"}[extra]
  if importlib.util.find_spec(installed):
    pytest.skip(f"{installed} is installed here")
  with pytest.raises(UserError, match=r"pip install -e '\.\[" + extra):
    topology.devices(name)
