"""Scores of texts given others, against enumeration over three letters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_harness import make_mesh

from mdm_jax import scoring
from mdm_jax.config import Config
from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import StageConfig
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.context import row_context
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives.config import AutoregressiveConfig, BlockConfig
from mdm_jax.sampling.chain_rule import bound_of_orders
from mdm_jax.scoring import Scorer
from mdm_jax.trained_model import TrainedModel

MASK = 5
VOCAB = Vocabulary(8, begin=4, mask=MASK, pad=6, forbidden=((3, 8),))
LETTERS = "abc"
WORDS = [a + b for a, b in itertools.product(LETTERS, repeat=2)]


class Letters(Tokenizer):
  """One id per letter."""

  kind = "letters"

  def __init__(self):
    super().__init__((b"a", b"b", b"c"), b"", VOCAB)

  def encode_batch(self, texts):
    ids = ([LETTERS.index(x) for x in text if x in LETTERS] for text in texts)
    return [np.array(found, np.int32) for found in ids]


def scorer_of(objective):
  config = Config(
    objective=objective,
    model=ModelConfig(num_layers=1, embed_dim=8, num_heads=2),
    stages=(StageConfig(length=32),),
  )
  mesh, denoiser = make_mesh("1x1"), Denoiser(config.model, VOCAB)
  with jax.set_mesh(mesh):
    params = jax.jit(denoiser.init)(rng.stream(0, "init"))
    # Sharp enough that a wrong term shows.
    params = jax.tree.map(lambda p: p * 3, params)
  return Scorer(TrainedModel(config, Letters(), denoiser, mesh, params, 0))


@pytest.fixture(scope="module")
def score():
  """Scores by a masked model."""
  return scorer_of(Config().objective)


@pytest.fixture(scope="module")
def causal():
  """Scores by an autoregressive model."""
  return scorer_of(AutoregressiveConfig(name="autoregressive"))


@pytest.fixture(scope="module")
def table(score):
  """log p(token at i | the visible ones) for all texts of 3, in rows of 3."""
  model = score._model
  patterns = list(itertools.product([0, 1, 2, MASK], repeat=3))
  xt = jnp.array(patterns)
  with jax.set_mesh(model.mesh):
    context = row_context(jnp.ones_like(xt))
    hidden = jax.jit(model.denoiser.hidden)(model.params, xt, context)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logp = jax.nn.log_softmax(model.denoiser.logits(model.params, flat))
  logp = np.asarray(logp).reshape(len(patterns), 3, -1)
  return {p: logp[i] for i, p in enumerate(patterns)}


def nats_of(table, text, order):
  """-log p of the tokens at some positions, revealed in that order."""
  ids, total = [LETTERS.index(x) for x in text], 0.0
  seen = [MASK if i in order else ids[i] for i in range(3)]
  for at in order:
    total -= table[tuple(seen)][at, ids[at]]
    seen[at] = ids[at]
  return total


GIVEN = ["", "b", "b[MASK:2]", "[MASK:2]c", "ca[MASK:*]b"]


@pytest.mark.parametrize("given", GIVEN)
def test_what_may_follow_has_a_probability_of_1_in_all(score, given):
  for likelihood in ("chain", "chain:spread", "chain:confidence"):
    found = score(WORDS, given, likelihood)
    assert np.exp(-found.nats).sum() == pytest.approx(1, abs=1e-5)
    assert not found.bound and not found.errors.any()
    np.testing.assert_array_equal(found.tokens, 2)
    np.testing.assert_array_equal(found.bytes, 2)


def test_a_prefix_and_its_continuation_are_the_whole(score, table):
  text = "bca"
  for size in range(3):
    rest = score(text[size:], text[:size], "chain").nats[0]
    assert rest == pytest.approx(nats_of(table, text, range(size, 3)), rel=1e-5)
    # The prefix in a row as long as the whole, the rest still masked.
    ids = [LETTERS.index(x) for x in text]
    prefix = -sum(
      table[(*ids[:i], *[MASK] * (3 - i))][i, ids[i]] for i in range(size)
    )
    whole = score(text, likelihood="chain").nats[0]
    assert prefix + rest == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
  "given, free", [("", (0, 1, 2)), ("b", (1, 2)), ("b[MASK]c", (1,))]
)
def test_bounds_given_a_text_are_means_over_orders(score, table, given, free):
  text = "bac"
  exact = np.array(
    [nats_of(table, text, order) for order in itertools.permutations(free)]
  )
  part = "".join(text[i] for i in free)
  found = score(part, given, draws=1024)
  assert found.bound and found.tokens[0] == len(free)
  off = abs(found.nats[0] - exact.mean())
  assert off <= max(4 * found.errors[0], 1e-5)
  # One token has one order, so nothing is random.
  assert (found.errors[0] > 1e-6) == (len(free) > 1)
  several = score(part, given, "orders:64")
  mixture = -np.log(np.exp(-exact).mean())
  assert several.bound
  off = abs(several.nats[0] - mixture)
  assert off <= max(4 * several.errors[0], 1e-5)


def test_errors_are_as_large_as_the_estimates_are_off(score):
  texts = [word * 6 for word in WORDS]
  few, many = (score(texts, "", draws=n) for n in (64, 1024))
  size = lambda values: np.sqrt(np.mean(np.square(values)))
  assert 0.4 < size(few.nats - many.nats) / size(few.errors) < 2.5
  nats = np.random.default_rng(0).normal(10, 1, size=(64, 2000))
  spread = bound_of_orders(nats).std()
  assert scoring._errors(nats).mean() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
  "likelihood", ["nelbo", "chain", "chain:entropy", "orders:2"]
)
def test_a_score_does_not_depend_on_other_texts(score, likelihood):
  given = ["ab", "", "c[MASK:*]a", "abc" * 8]  # the last in a longer row
  texts = ["ab", "bca", "bb", "cab"]
  together = score(texts, given, likelihood)
  for i, (text, before) in enumerate(zip(texts, given, strict=True)):
    alone = score(text, before, likelihood)
    assert alone.nats[0] == together.nats[i]
    np.testing.assert_array_equal(alone.errors[0], together.errors[i])


def test_an_autoregressive_model_scores_in_one_call(causal):
  for given in ("", "b", "ca[MASK:*]"):
    found = causal(WORDS, given)
    assert np.exp(-found.nats).sum() == pytest.approx(1, abs=1e-5)
    assert not found.bound and not found.errors.any()
    np.testing.assert_array_equal(
      found.nats, causal(WORDS, given, "chain").nats
    )
  whole, prefix = causal(["bcabb", "bca"]).nats
  assert prefix + causal("bb", "bca").nats[0] == pytest.approx(whole, rel=1e-5)


def test_a_space_in_front_of_a_hole_belongs_to_the_text(score, monkeypatch):
  tokenizer = score._model.tokenizer
  monkeypatch.setattr(tokenizer, "pieces", (b" a", b"b", b"c"))
  seen = []
  encode = tokenizer.encode_batch
  monkeypatch.setattr(
    tokenizer, "encode_batch", lambda texts: seen.append(texts) or encode(texts)
  )
  found = score("a", "b [MASK:*] c", "chain")
  assert seen == [["b", " a", " c"]] and found.bytes[0] == 2


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda s: s(["a", "b", "c"], ["a", "b"]), "2 entries for 3 texts"),
    (lambda s: s("ab", "a[MASK]c"), r"texts\[0\]: .* write \[MASK:2\]"),
    (lambda s: s("ab", "a[MASK]c[MASK]"), "2 holes, but a text fills one"),
    (lambda s: s("ab", "a[MASK:0]"), r"\[MASK:5\] for five"),
    (lambda s: s("abc", "b" * 30), "33 with what is given, and a row has 32;"),
    (lambda s: s(["a", ""], "b"), r"texts\[1\]: it is empty"),
    (lambda s: s("?", "b"), "makes no token of it"),
    (lambda s: s("a\ud83d", "b"), "the text is not valid UTF-8"),
    (lambda s: s("a", "\ud83d"), "given is not valid UTF-8"),
    (lambda s: s("a", "b", "chain:best"), "likelihood=chain"),
    (lambda s: s("a", "b", "bound"), "likelihood=bound must be nelbo, chain"),
  ],
)
def test_a_mistake_is_one_line(score, call, message):
  with pytest.raises(UserError, match=message) as caught:
    call(score)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda s: s("a", "b[MASK]c"), "text behind the hole"),
    (lambda s: s("a", "b", "orders:2"), "draw in any order"),
    (lambda s: s("a", "b", "chain:random"), "draw in any order"),
  ],
)
def test_an_autoregressive_model_has_one_order(causal, call, message):
  with pytest.raises(UserError, match=message):
    call(causal)


def test_a_block_model_scores_what_its_blocks_read():
  by_one = scorer_of(BlockConfig(name="block", block_length=1))
  by_four = scorer_of(BlockConfig(name="block", block_length=4))
  found = by_one(["abba", "b"], given="ab")
  np.testing.assert_allclose(found.errors, 0, atol=1e-4)
  assert by_four("ab", "a[MASK:2]b").bound  # a block by itself
  with pytest.raises(UserError, match="text behind the hole"):
    by_four("ab", "aa[MASK:2]b")
  with pytest.raises(UserError, match="doesn't draw in any order"):
    by_four("ab", likelihood="chain")


def test_no_texts_have_no_scores(score):
  for likelihood in ("nelbo", "chain"):
    assert score([], likelihood=likelihood).nats.shape == (0,)
