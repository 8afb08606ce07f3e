"""The PyTorch model that we compare with is MDLM's, and is timed in turn."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT

from mdm_jax.benchmarks import timing, torch_mdlm, workload
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import RULES
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.objectives import cross_entropy
from mdm_jax.objectives.masked import row_weights

TINY = workload.PRESETS["tiny"]
IDS = 27  # the mask comes after them


@pytest.fixture
def torch():
  return pytest.importorskip("torch", reason="needs: pip install -e '.[torch]'")


@pytest.fixture
def torch_model(torch):
  from mdm_jax.benchmarks import torch_model

  return torch_model


# MARK: the objective


def _masked_rows():
  """Returns logits, clean and masked tokens, and times of 4 rows of 16.

  Exactly the share t of a row is masked.
  """
  draw = np.random.default_rng(0)
  logits = draw.normal(size=(4, 16, IDS + 1)).astype(np.float32)
  x0 = draw.integers(0, IDS, (4, 16))
  t = np.float32([0.25, 0.5, 0.75, 1.0])
  masked = draw.permuted(np.arange(16) < 16 * t[:, None], axis=1)
  return logits, x0, masked, t


def test_the_loss_and_its_gradient_are_the_librarys(mesh, torch, torch_model):
  logits, x0, masked, t = _masked_rows()
  xt = np.where(masked, IDS, x0)
  given = torch.tensor(logits, requires_grad=True)
  theirs = torch_model.subs_loss(given, *map(torch.tensor, (x0, xt, t)), IDS)
  theirs.backward()

  vocab = Vocabulary(IDS + 1, forbidden=((IDS, IDS + 1),))
  # Over the mesh's axes, as the library has its rows.
  by_row = lambda x: jax.device_put(jnp.array(x), RULES.spec("batch"))
  logits, x0, masked, t = map(by_row, (logits, x0, masked, t))
  weight = row_weights("nelbo", masked, masked | True, jnp.ones_like(t))
  forbid = lambda _, x: jnp.where(jnp.arange(IDS + 1) == IDS, -jnp.inf, x)

  @jax.jit
  @jax.value_and_grad
  def library(logits):
    weights = jnp.broadcast_to(weight[:, None], x0.shape)
    return cross_entropy.masked_loss(
      *(forbid, (), logits, x0, masked, weights, x0.size, vocab)
    )[0]

  ours, gradient = library(logits)
  np.testing.assert_allclose(theirs.item(), ours, rtol=1e-6)
  np.testing.assert_allclose(given.grad.numpy(), gradient, atol=1e-7)
  assert not given.grad.numpy()[~masked].any()


def test_logits_of_zero_make_any_id_as_likely_as_another(torch, torch_model):
  _, x0, masked, t = _masked_rows()
  xt = np.where(masked, IDS, x0)
  logits = torch.zeros(4, 16, IDS + 1)
  rest = torch.tensor(xt), torch.tensor(t), IDS
  loss = torch_model.subs_loss(logits, torch.tensor(x0), *rest)
  # Each row's masked share is t, so the weight 1 / t makes it a whole row's.
  assert loss.item() == pytest.approx(math.log(IDS), rel=1e-6)
  clean = torch_model.subs_loss(logits, *2 * (torch.tensor(x0),), *rest[1:])
  assert clean.item() == 0


def test_masks_are_as_many_as_the_time_says(torch, torch_model):
  torch.manual_seed(0)
  x0 = torch.randint(IDS, (64, 512))
  xt, t = torch_model.corrupt(x0, IDS)
  # One time in every 64th of (0, 1).
  edges = torch.arange(64) / 64
  assert (t >= edges).all() and (t <= edges + 1 / 64 + 1e-3).all()
  masked = xt == IDS
  assert (xt[~masked] == x0[~masked]).all()
  share = masked.float().mean(dim=1)
  assert ((share - t).abs() < 5 * (t * (1 - t) / 512).sqrt() + 1e-3).all()


# MARK: the model and its update


def test_gpt2_has_the_weights_of_mdlms_small_model(torch, torch_model):
  with torch.device("meta"):
    model = torch_model.MDLM(workload.PRESETS["gpt2"])
  d, ids = 768, 50_258
  block = 2 * d + 3 * d**2 + d**2 + 2 * 4 * d**2 + 5 * d + 129 * 6 * d
  ends = 2 * ids * d + ids + d + 129 * 2 * d + 257 * 128 + 129 * 128
  assert sum(p.numel() for p in model.parameters()) == 12 * block + ends
  assert 12 * block + ends == pytest.approx(169.6e6, rel=1e-3)


def test_flops_are_those_of_the_products(torch, torch_model):
  from torch.utils.flop_counter import FlopCounterMode

  preset = dataclasses.replace(TINY, num_layers=2)
  update = torch_model.Update(preset)
  with FlopCounterMode(display=False) as counter:
    update()
  counts = counter.get_flop_counts()["Global"]
  # Without the kernel of attention, which this version may not count.
  found = sum(n for op, n in counts.items() if "attention" not in str(op))
  attention = 3 * 2 * 4 * preset.length**2 * preset.embed_dim * preset.batch
  # Of each row's time, once or more in every block: counted as no work.
  time = preset.batch * 2 * 128
  modulation = 2 * time * (2 * 6 + 2) * preset.embed_dim
  modulation += time * (2 * 6 + 2) * preset.embed_dim
  condition = 2 * time * 256 + 3 * time * 128
  counted = torch_mdlm.update_flops(preset) - attention
  assert found == counted + modulation + condition


def test_rotated_products_depend_on_the_distance(torch, torch_model):
  cos, sin = torch_model._rotary(16, 8)
  one, other = torch.randn(2, 8).unbind()
  query = torch_model._rotate(one.expand(16, 8), cos, sin)
  key = torch_model._rotate(other.expand(16, 8), cos, sin)
  products = query @ key.T
  torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
  assert products[0, 0].item() == pytest.approx((one @ other).item(), rel=1e-5)
  assert products[0].std() > 0.01


def test_a_position_attends_to_its_whole_row(torch, torch_model):
  torch.manual_seed(0)
  model = torch_model.MDLM(TINY)
  for name, weight in model.named_parameters():
    if "modulation" in name or "head" in name:
      torch.nn.init.normal_(weight)
  x = torch.full((2, TINY.length), IDS)
  x[1, 5] = 3
  with torch.no_grad():
    plain, changed = model(x)
  assert ((plain - changed).abs().amax(dim=1) > 1e-5).all()


def test_an_update_moves_parameters_and_their_average(torch, torch_model):
  update = torch_model.Update(TINY)
  before = [p.detach().clone() for p in update._params]
  assert update().loss.item() > 0
  names = [name for name, _ in update.model.named_parameters()]
  moved = {}
  for name, old, new, ema in zip(
    names, before, update._params, update._ema, strict=True
  ):
    moved[name] = (old != new).any().item()
    expected = old + 1e-4 * (new.detach() - old)
    torch.testing.assert_close(ema, expected)
  # All else is behind the head, which is zero at first.
  assert {name for name, is_new in moved.items() if is_new} == {
    *("head.weight", "head.bias")
  }
  for _ in range(3):
    update()
  assert all(
    (old != new).any() for old, new in zip(before, update._params, strict=True)
  )


def test_the_loss_falls(torch, torch_model):
  preset = dataclasses.replace(TINY, batch=16, embed_dim=64)
  update = torch_model.Update(preset)
  update._x0 = torch.zeros_like(update._x0)
  first = update().loss.item()
  for group in update._optimizer.param_groups:
    group["lr"] = 1e-2
  for _ in range(10):
    update()
  assert update.loss.item() < first / 4


# MARK: in turn with another program


PEER = """
import json, sys
print(json.dumps({"peak_bytes": 7}), flush=True)
for line in sys.stdin:
  print(line, end="", file=open(sys.argv[1], "a"))
  if line == "wait\\n":
    print(flush=True)
"""


def _plays(monkeypatch, tmp_path, script):
  """Puts a script in the place of the PyTorch program."""
  (tmp_path / "peer.py").write_text(script)
  program = sys.executable, str(tmp_path / "peer.py"), str(tmp_path / "told")
  monkeypatch.setattr(torch_mdlm, "_PROGRAM", program)
  monkeypatch.setattr(torch_mdlm, "check", lambda: None)


def test_a_peer_steps_when_it_is_its_turn(monkeypatch, tmp_path):
  _plays(monkeypatch, tmp_path, PEER)
  with torch_mdlm.Peer(TINY) as peer:
    assert peer.facts == {"peak_bytes": 7}
    told = lambda: (tmp_path / "told").read_text().split()
    others = []
    runs = {"peer": peer, "other": lambda: others.append(told())}
    seconds = timing.interleave(runs, 2)
  assert len(seconds["peer"]) == 2 and told() == 3 * ["step", "wait"]
  assert others == [n * ["step", "wait"] for n in (1, 2, 3)]
  assert peer._process.returncode == 0


def test_a_peer_that_ends_is_reported_in_one_line(monkeypatch, tmp_path):
  _plays(monkeypatch, tmp_path, "raise SystemExit(3)")
  with pytest.raises(UserError, match="peer ended with exit code 3"):
    torch_mdlm.Peer(TINY)
  _plays(monkeypatch, tmp_path, "print('{}', flush=True); exit(4)")
  with torch_mdlm.Peer(TINY) as peer:
    peer._process.wait()
    with pytest.raises(UserError, match="peer ended with exit code 4"):
      jax.block_until_ready(peer())


def test_a_missing_torch_is_reported_with_its_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError) as error:
    torch_mdlm.Peer(TINY)
  assert str(error.value).endswith("run: pip install -e '.[torch]'")


def _run(*command):
  done = subprocess.run(
    (sys.executable, "-m", *command, "--json"),
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_is_timed_alone(torch):
  results = _run("mdm_jax.benchmarks.torch_mdlm", "--preset=tiny")
  assert results["preset"] == dataclasses.asdict(TINY)
  assert all(value > 0 for value in results["headline"].values())


@pytest.mark.slow
def test_it_is_compiled_and_timed_in_turn_with_ours(torch):
  results = _run(
    *("mdm_jax.benchmarks.train_step", "--preset=tiny", "--against=torch"),
    *("--rates=uniform", "--repeats=2"),
  )
  measured = results["rates"]["uniform"]
  assert measured["torch"]["flops"] == torch_mdlm.update_flops(TINY)
  ratio = results["headline"]["uniform: times as fast as torch"]
  assert ratio == measured["torch_over_library"]["median"] > 0
