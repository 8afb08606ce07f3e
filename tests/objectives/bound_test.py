"""The bound against enumeration, on a vocabulary of 3 and rows of 3."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core import rng
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.rows import Rows
from mdm_jax.evaluation.config import EvalConfig
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.masked import Masked
from mdm_jax.objectives.measured import LOSS_BY_MASKED_SHARE
from mdm_jax.objectives.noise import RateRange

V, L, MASK = 3, 3, 5
TEXTS = list(itertools.product(range(V), repeat=L))
ORDERS = list(itertools.permutations(range(L)))


def make_rows(texts):
  tokens = np.array(texts, np.uint16)
  return Rows(tokens, np.ones_like(tokens))


def hold(rows, documents=None):
  """Rows as held-out text, each row a text of its own document."""
  count = len(rows)
  numbers = np.arange(count)
  documents = numbers if documents is None else np.array(documents)
  columns = numbers, np.ones(count), documents, np.ones(count), np.zeros(count)
  return HeldOut(rows, np.stack(columns, axis=1).astype(np.int64))


@pytest.fixture
def model(mesh):
  """A random denoiser, sharp enough that a wrong weight shows."""
  return _model(mesh)


@functools.cache
def _model(_mesh):
  config = ModelConfig(num_layers=1, embed_dim=8, num_heads=2)
  denoiser = Denoiser(config, Vocabulary(8, forbidden=((V, 8),)))
  params = jax.jit(denoiser.init)(rng.stream(0, "init"))
  return denoiser, jax.tree.map(lambda p: p * 3, params)


def make_evaluator(model, mesh, low=0.0, high=1.0, **config):
  objective = Masked(
    rates=RateRange(low, high),
    weighting="masked_ce",
    label_smoothing=0.1,  # of the training alone
    mask=MASK,
    length=L,
    capacity=1,
  )
  return Evaluator(EvalConfig(**config), objective, model[0], mesh)


def measure(evaluator, params, held):
  """The bound per token and its standard error."""
  found = evaluator.measure(params, held).head()
  return found.value, found.error


@pytest.fixture
def table(mesh):
  """log p(token at i | the visible others) for every pattern of masks."""
  return _table(mesh)


@functools.cache
def _table(mesh):
  denoiser, params = _model(mesh)
  patterns = list(itertools.product([*range(V), MASK], repeat=L))

  @jax.jit
  def log_probabilities(params, xt):
    hidden = denoiser.hidden(params, xt, row_context(jnp.ones_like(xt)))
    logits = denoiser.logits(params, hidden.reshape(-1, hidden.shape[-1]))
    return jax.nn.log_softmax(logits).reshape(len(patterns), L, -1)

  logp = np.asarray(log_probabilities(params, jnp.array(patterns)))
  return {p: logp[i] for i, p in enumerate(patterns)}


def log_prob_in_order(table, text, order):
  """Of the positions in the order, where all others can be seen."""
  xt = [MASK if i in order else token for i, token in enumerate(text)]
  total = 0.0
  for i in order:
    total += table[tuple(xt)][i, text[i]]
    xt[i] = text[i]
  return total


def brute_nelbo(table, text):
  return -np.mean([log_prob_in_order(table, text, o) for o in ORDERS])


def exact_nll(table, text):
  return -np.log(
    np.mean([np.exp(log_prob_in_order(table, text, o)) for o in ORDERS])
  )


def mean_ce(table, text, count):
  """Mean cross-entropy per masked token over all masks of `count` tokens."""
  losses = []
  for masked in itertools.combinations(range(L), count):
    xt = tuple(MASK if i in masked else text[i] for i in range(L))
    losses.append(-np.mean([table[xt][i, text[i]] for i in masked]))
  return np.mean(losses)


def test_probabilities_sum_to_one(table):
  total = sum(np.exp(-exact_nll(table, text)) for text in TEXTS)
  np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_the_integral_of_ce_is_the_bound(table):
  for text in TEXTS:
    integral = np.mean([mean_ce(table, text, n) for n in (1, 2, 3)])
    np.testing.assert_allclose(
      L * integral, brute_nelbo(table, text), rtol=1e-5
    )


def test_the_bound_is_at_least_the_exact_nll(table):
  gaps = [brute_nelbo(table, x) - exact_nll(table, x) for x in TEXTS]
  assert min(gaps) > -1e-6
  assert max(gaps) > 1e-3  # the orders of this model do disagree


def test_evaluator_gives_the_bound_of_enumeration(model, table, mesh):
  evaluator = make_evaluator(model, mesh, masks_per_row=900, batch_size=2700)
  found = evaluator.measure(model[1], hold(make_rows(TEXTS)))
  per_row = np.array([brute_nelbo(table, text) for text in TEXTS]) / L
  got = found.head()
  np.testing.assert_allclose(got.value, per_row.mean(), rtol=3e-3)
  assert found.values["ppl_bound"].bound and "ppl" not in found.values
  expected = per_row.std(ddof=1) / np.sqrt(len(TEXTS))
  np.testing.assert_allclose(got.error, expected, rtol=0.05)


def test_of_rows_with_prompts_only_the_answers_are_measured(model, table, mesh):
  """The first token is a prompt, and one row has no answer."""
  evaluator = make_evaluator(model, mesh, masks_per_row=900, batch_size=2700)
  rows, answer = make_rows(TEXTS), np.tile(np.uint8([0, 1, 1]), (len(TEXTS), 1))
  answer[0] = 0
  held = hold(Rows(rows.tokens, rows.segments, answer=answer))
  found = evaluator.measure(model[1], held)
  orders = (1, 2), (2, 1)
  per_token = [
    -np.mean([log_prob_in_order(table, text, o) for o in orders]) / 2
    for text in TEXTS[1:]
  ]
  # Bytes of prompts are in the table, too.
  assert "bits_per_byte" not in found.values
  got = found.head()
  np.testing.assert_allclose(got.value, np.mean(per_token), rtol=1e-2)
  expected = np.std(per_token, ddof=1) / np.sqrt(len(per_token))
  np.testing.assert_allclose(got.error, expected, rtol=0.05)


@pytest.mark.parametrize(
  "low, high, shares", [(0.4, 0.6, (0, 1, 0)), (0.0, 0.5, (2 / 3, 1 / 3, 0))]
)
def test_ce_in_a_range_is_the_mean_over_its_rates(
  model, table, mesh, low, high, shares
):
  evaluator = make_evaluator(
    model, mesh, low, high, masks_per_row=60, batch_size=2700
  )
  held = hold(make_rows(TEXTS * 40))
  got = evaluator.measure(model[1], held, "values").values
  by_count = [np.mean([mean_ce(table, x, n) for x in TEXTS]) for n in (1, 2, 3)]
  value = got[f"stage_ce/{low:g},{high:g}"].value
  np.testing.assert_allclose(value, np.dot(shares, by_count), rtol=1e-2)
  assert np.ptp(by_count) > 0.05  # the test could see another range


def test_curve_is_ce_at_each_rate(model, table, mesh):
  evaluator = make_evaluator(model, mesh, batch_size=2700)
  held = hold(make_rows(TEXTS * 160))
  found = evaluator.measure(model[1], held, "curves")
  curve = found.curve_with_role(LOSS_BY_MASKED_SHARE)
  assert curve.x == tuple(round(0.05 * i, 2) for i in range(1, 21))
  for rate, loss in zip(curve.x, curve.y, strict=True):
    count = int(np.ceil(rate * L - 1e-6))
    expected = np.mean([mean_ce(table, text, count) for text in TEXTS])
    np.testing.assert_allclose(loss, expected, rtol=0.05)


def test_padding_and_batch_size_change_nothing(model, mesh):
  rows = make_rows(TEXTS[:7])
  padded = Rows(
    np.pad(rows.tokens, ((0, 0), (0, 2)), constant_values=4),
    np.pad(rows.segments, ((0, 0), (0, 2))),
  )
  in_batches = lambda rows, size: measure(
    make_evaluator(model, mesh, masks_per_row=256, batch_size=size),
    *(model[1], hold(rows)),
  )
  whole, parts = in_batches(rows, 7 * 256), in_batches(rows, 100)
  np.testing.assert_allclose(whole, parts, rtol=1e-5)
  assert abs(in_batches(padded, 100)[0] - whole[0]) < 0.1


def test_every_checkpoint_meets_the_same_masks(model, mesh):
  evaluator = make_evaluator(model, mesh)
  rows = hold(make_rows(TEXTS))
  assert measure(evaluator, model[1], rows) == measure(
    evaluator, model[1], rows
  )


def test_found_A15_the_error_is_over_documents(model, mesh):
  """Rows of one document resemble each other: an error over rows is small."""
  evaluator = make_evaluator(model, mesh, masks_per_row=64, batch_size=2048)
  rows = make_rows([text for text in TEXTS[:8] for _ in range(16)])
  documents = np.repeat(np.arange(8), 16)
  found = lambda held: measure(evaluator, model[1], held)
  by_row, by_document = found(hold(rows)), found(hold(rows, documents))
  assert by_document[0] == by_row[0]
  assert by_document[1] > 3 * by_row[1]
  each = [found(hold(make_rows([t] * 16)))[0] for t in TEXTS[:8]]
  expected = np.std(each, ddof=1) / np.sqrt(8)
  np.testing.assert_allclose(by_document[1], expected, rtol=0.1)
  assert np.isnan(found(hold(rows, documents * 0))[1])


def test_texts_of_a_row_add_up_to_it_and_are_told_apart(model, mesh):
  """Two documents share every row: one of its first token, one of the rest."""
  evaluator = make_evaluator(model, mesh, masks_per_row=200, batch_size=1800)
  tokens = np.array(TEXTS[:9], np.uint16)
  rows = Rows(tokens, np.tile(np.array([1, 2, 2], np.uint16), (9, 1)))
  numbers, segment = np.arange(9).repeat(2), np.tile([1, 2], 9)
  texts = np.stack([numbers, segment, segment, segment, 0 * segment], axis=1)
  held = HeldOut(rows, texts.astype(np.int64))
  jobs = evaluator._objective.jobs(held, "likelihood", 200)
  nats = evaluator.run(model[1], rows, jobs)
  np.testing.assert_allclose(nats.by_text.sum(axis=1), nats.by_row, rtol=1e-5)
  assert (nats.by_text > 0).any(axis=0).tolist() == [True, True]
  mean, error = measure(evaluator, model[1], held)
  by_text = nats.by_text / jobs.asked[:, None]
  first, rest = (by_text.reshape(9, 200, 2) * L).mean(axis=1).sum(axis=0)
  np.testing.assert_allclose(first + rest, 27 * mean, rtol=1e-6)
  residual = np.array([first - mean * 9, rest - mean * 18])
  expected = np.sqrt(2 * np.square(residual).sum()) / 27
  np.testing.assert_allclose(error, expected, rtol=0.2)
