"""Asking XLA for the same bits in every run."""

import jax
import pytest

from mdm_jax import main
from mdm_jax.config import Config
from mdm_jax.core import compilation_cache, determinism
from mdm_jax.core.errors import Failure, UserError
from mdm_jax.training.config import TrainConfig
from mdm_jax.workdir import Workdir

EXACT = Config(train=TrainConfig(deterministic="true"))


@pytest.fixture
def flags(monkeypatch):
  """Flags that are given already, with a GPU's plugin installed."""
  jax.devices()  # reads the flags that there are: it would end over ours
  monkeypatch.setenv("XLA_FLAGS", "--xla_of_mine=1")
  monkeypatch.setattr(determinism, "_gpu_plugins", lambda: ["xla_cuda13"])
  return monkeypatch


def test_this_xla_knows_the_flag_and_no_nonsense():
  assert determinism.is_known(determinism.FLAG)
  assert not determinism.is_known("--xla_gpu_nonsense=true")


def test_the_flag_comes_beside_those_that_are_given(flags):
  flags.setattr(determinism, "is_known", lambda flag: True)
  for _ in range(2):
    determinism.ask_for(True)
    given = determinism.os.environ["XLA_FLAGS"]
    assert given == f"--xla_of_mine=1 {determinism.FLAG}"
  assert determinism.is_asked()


@pytest.mark.parametrize("wanted, plugins", [(False, ["cuda"]), (True, [])])
def test_without_a_wish_or_a_gpu_nothing_is_set(flags, wanted, plugins):
  flags.setattr(determinism, "_gpu_plugins", lambda: plugins)
  determinism.ask_for(wanted)
  assert determinism.os.environ["XLA_FLAGS"] == "--xla_of_mine=1"


def test_a_flag_that_xla_does_not_know_is_not_given(flags):
  flags.setattr(determinism, "is_known", lambda flag: False)
  with pytest.raises(UserError, match="train.deterministic=auto"):
    determinism.ask_for(True)
  assert not determinism.is_asked()


def test_a_gpu_that_was_started_without_it_is_refused(flags):
  determinism.check(True)
  flags.setattr(jax, "default_backend", lambda: "gpu")
  determinism.check(False)
  with pytest.raises(UserError, match="has started its GPU without"):
    determinism.check(True)
  flags.setenv("XLA_FLAGS", determinism.FLAG)
  determinism.check(True)


def test_main_asks_before_anything_else(flags):
  asked = []
  flags.setattr(determinism, "ask_for", asked.append)

  def start():
    assert asked == [True]
    raise Failure("far enough")

  flags.setattr(compilation_cache, "turn_on", start)
  with pytest.raises(Failure, match="far enough"):
    main._run(EXACT, Workdir("nowhere"))


def test_what_is_promised_depends_on_the_backend(flags):
  told = [determinism.promise(name) for name in ("cpu", "tpu", "gpu")]
  assert "on the same number of devices" in told[0]
  assert "not tested" in told[1] and "differ by rounding" in told[2]
  flags.setenv("XLA_FLAGS", determinism.FLAG)
  assert "uses deterministic kernels" in determinism.promise("gpu")
