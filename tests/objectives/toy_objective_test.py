"""An objective of a user's is evaluated and reported by its own names."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax.checkpoints.checkpoint import Checkpoints
from mdm_jax.core import rng, strict_json
from mdm_jax.core.progress import console
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.packing import Rows
from mdm_jax.evaluation import tables, targets
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.evaluation.pages.report import RunReport, render
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import measured as measured_lib
from mdm_jax.objectives.base import Cost, Decoding, Examples, Objective
from mdm_jax.objectives.measured import (
  SEED,
  Chart,
  Curve,
  Jobs,
  Measured,
  Value,
)

V, L, HOLE = 5, 4, 7


@dataclasses.dataclass(frozen=True)
class Hole(Objective):
  """Asks for one token of every row, where all others can be seen.

  Its headline is a share of right answers, of which more is better.
  """

  headline = "right"
  charts = {"train/loss": Chart("Cost of a hole", "nats")}

  def examples(self, batch, draws):
    raise AssertionError("only its measuring is tested here")

  def cost(self):
    return Cost(reads=((L, L),), asked=1)

  def decoding(self):
    return Decoding("any_order")

  def jobs(self, held, part, draws):
    """Every position of every row once; there is nothing to draw."""
    if part == "values":
      return None
    rows, at = np.divmod(np.arange(len(held) * L), L)
    asked = np.ones_like(rows)
    key = rng.stream(SEED, "nothing")
    return Jobs(key, rows, 0 * rows, asked, {"at": at})

  def pose(self, batch, keys, given, capacity):
    asked = jnp.arange(L)[None] == given["at"][:, None]
    return Examples(
      tokens=jnp.where(asked, HOLE, batch.tokens),
      context=row_context(batch.segments),
      targets=batch.tokens,
      asked=asked,
      weights=jnp.where(
        asked, 2.0, jnp.nan
      ),  # read where asked, and only there
      capacity=capacity,
    )

  def values(self, part, jobs, nats, held):
    cost = nats.by_row.reshape(-1, L) / 2
    if part == "likelihood":
      share = Value(
        *(float((cost < np.log(2)).mean()), "Right answers", "of all"),
        lower_is_better=False,
      )
      own = {"right": share, "cost": Value(float(cost.mean()), "Cost", "nats")}
      return Measured(own, headline=self.headline)
    by_place = tuple(cost.mean(axis=0).tolist())
    places = tuple(float(i) for i in range(L))
    curve = Curve(
      *(places, by_place, "Cost by place", "nats"),
      x_title="place",
      point="cost at place {}",
      note="Where a hole is costs little or much.",
    )
    return Measured(curves={"by_place": curve}, headline=self.headline)


@pytest.fixture(scope="module")
def found():
  """What is measured of a random model, and the same by hand."""
  with jax.set_mesh(mesh := make_mesh("1x1")):
    return measure_toy(mesh)


def measure_toy(mesh):
  vocab = Vocabulary(8, forbidden=((V, 8),))
  model = Denoiser(ModelConfig(num_layers=1, embed_dim=8, num_heads=2), vocab)
  params = jax.jit(model.init)(rng.stream(0, "init"))
  params = jax.tree.map(lambda p: 3 * p, params)
  tokens = np.array(list(itertools.product(range(V), repeat=L))[::40])
  rows = Rows(tokens.astype(np.uint16), np.ones(tokens.shape, np.uint16))
  texts = np.array([(i, 1, i, L, 0) for i in range(len(tokens))], np.int64)
  # Another size than the jobs', so that a batch is filled up.
  evaluator = Evaluator(EvalConfig(batch_size=24), Hole(), model, mesh)
  measure = lambda part: evaluator.measure(params, HeldOut(rows, texts), part)
  got = measure("likelihood").joined(measure("values"))

  @jax.jit
  def log_softmax(params, xt):
    hidden = model.hidden(params, xt, row_context(jnp.ones_like(xt)))
    logits = model.logits(model.head(params), hidden.reshape(-1, 8))
    return jax.nn.log_softmax(logits).reshape(*xt.shape, -1)

  cost = np.zeros(tokens.shape)
  for at in range(L):
    xt = jnp.array(tokens).at[:, at].set(HOLE)
    log_probs = log_softmax(params, xt)[:, at]
    cost[:, at] = -np.asarray(log_probs)[range(len(tokens)), tokens[:, at]]
  return got.joined(measure("curves")), cost


def test_its_numbers_are_those_of_the_definition(found):
  measured, cost = found
  values = measured.values
  assert values["cost"].value == pytest.approx(cost.mean(), rel=1e-5)
  assert values["right"].value == (cost < np.log(2)).mean()
  curve = measured.curves["by_place"]
  np.testing.assert_allclose(curve.y, cost.mean(axis=0), rtol=1e-5)


def _results(measured):
  plain = measured_lib.to_json(measured) | {
    "text": {"split": "test", "own": True, "corpus": "sotu"},
    "baselines": {},
    **dict.fromkeys(("documents", "rows", "tokens", "bytes"), 3),
    **dict.fromkeys(("checkpoint", "updates"), 10),
    **dict.fromkeys(("tokens_seen", "wall_seconds", "tokens_per_second"), 2.0),
    "sampling": {},
    "samples": [],
  }
  table = targets.check(measured, plain)
  plain["targets"] = [dataclasses.asdict(t) for t in table]
  return strict_json.plain(plain)


def test_results_table_and_report_have_its_titles(found):
  measured, _ = found
  results = _results(measured)
  assert results["right"] == measured.head().value
  assert list(results["by_place"]) == ["0", "1", "2", "3"]
  assert results["targets"] == []  # none of the guide's is about it
  with console.capture() as capture:
    tables.show(measured, results)
  shown = capture.get()
  for words in ("Right answers, of all", "Cost, nats", "cost at place 3"):
    assert words in shown
  line = tables.in_a_line(measured)
  assert line.startswith("Right answers 0.") and line.endswith(" of all")
  config = {"name": "toy", "data": {"corpus": "sotu"}, "stages": []}
  stage = {"name": "one", "unit": "lines", "length": L}
  lines = [{"step": 10, "train/stage": 1, "train/loss": 2.0}]
  page = render(
    RunReport(
      *("toy", config | {"stages": [stage]}, lines, None, results, None),
      descriptions=["one hole a row"],
      charts=Hole.charts,
    )
  )
  for words in (
    *("Right answers", "with the best Right answers", "Cost by place"),
    *("Where a hole is costs little", "Cost of a hole", "one hole a row"),
  ):
    assert words in page
  for words in ("NELBO", "nelbo", "mask rate", "mask_rate"):
    assert words not in page and words not in shown


def test_its_best_checkpoint_has_most_right_answers(found, tmp_path):
  measured, _ = found
  with Checkpoints(tmp_path, keep_latest=3) as checkpoints:
    for step, share in {1: 0.2, 2: 0.6, 3: 0.4}.items():
      value = dataclasses.replace(measured.head(), value=share)
      other = dataclasses.replace(measured, values={"right": value})
      checkpoints.save(step, {"w": jnp.ones(2)}, {})
      checkpoints.record(step, measured_lib.evaluation(other))
    checkpoints.wait()
    assert checkpoints.best() == 2
