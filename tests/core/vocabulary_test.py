"""Ids are data: special ids and forbidden ones may lie anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mdm_jax.core import rng
from mdm_jax.core.errors import UserError
from mdm_jax.core.sharding import RULES, batch_sharding, vocab_ids
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import row_checks
from mdm_jax.data.packing import join_sentences
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.model.config import ModelConfig
from mdm_jax.model.denoiser import Denoiser
from mdm_jax.objectives import cross_entropy
from mdm_jax.sampling import sampler, schedule, template, tokens, trace
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig

VOCABULARIES = {
  "today's": Vocabulary.after_text(26),
  "the mask at 0": Vocabulary(16, mask=0, pad=5, forbidden=((0, 1), (5, 6))),
  "ranges in the middle": Vocabulary(
    32,
    end=31,
    pad=4,
    mask=17,
    begin=16,
    separator=2,
    forbidden=((3, 5), (5, 6), (16, 18), (24, 30)),
  ),
  "one id is left": Vocabulary(
    16, end=9, mask=3, pad=10, forbidden=((0, 9), (10, 16))
  ),
  "all can be predicted": Vocabulary(16, end=0),
}
MODEL = ModelConfig(
  num_layers=1, embed_dim=8, num_heads=2, tie_embeddings=False
)


@pytest.fixture(params=list(VOCABULARIES))
def vocab(request):
  return VOCABULARIES[request.param]


def allowed(vocab):
  """Which ids can be predicted, counted one by one."""
  return np.array(
    [
      not any(i in range(*span) for span in vocab.forbidden)
      for i in range(vocab.size)
    ]
  )


def network(vocab):
  return _network(vocab, jax.sharding.get_mesh())


@functools.cache
def _network(vocab, _mesh):
  denoiser = Denoiser(MODEL, vocab)
  return denoiser, jax.jit(denoiser.init)(rng.stream(0, "init"))


# MARK: by itself


def test_every_id_is_in_a_range_or_not(vocab):
  possible = allowed(vocab)
  assert vocab.predictable == possible.sum()
  for ids in (np.arange(vocab.size), jnp.arange(vocab.size)):
    np.testing.assert_array_equal(vocab.is_predictable(ids), possible)
    ends = np.arange(vocab.size) == (-1 if vocab.end is None else vocab.end)
    np.testing.assert_array_equal(vocab.is_end(ids), ends)


def test_what_may_stand_in_a_text(vocab):
  beside = {vocab.begin, vocab.end, vocab.separator}
  numbers = np.arange(-3, vocab.size + 3)
  inside = [
    i in beside or (0 <= i < vocab.size and bool(allowed(vocab)[i]))
    for i in numbers
  ]
  np.testing.assert_array_equal(vocab.may_be_text(numbers), inside)
  small = np.arange(vocab.size, dtype=np.uint16)
  assert np.array_equal(vocab.may_be_text(small), inside[3:-3])


def test_todays_vocabulary_costs_one_comparison_and_nothing_of_its_size():
  vocab = Vocabulary.after_text(26)
  found = jax.make_jaxpr(vocab.is_predictable)(jnp.arange(vocab.size))
  assert [e.primitive.name for e in found.eqns] == ["lt"]
  for vocab in VOCABULARIES.values():
    found = jax.make_jaxpr(vocab.is_predictable)(jnp.arange(vocab.size))
    assert not found.consts
    steps = sum(e.primitive.name in ("lt", "ge") for e in found.eqns)
    assert steps <= 2 * len(vocab.forbidden) + 1


def test_equal_ones_are_one_key():
  one, other = (Vocabulary(8, forbidden=((4, 8),)) for _ in range(2))
  one.may_be_text(np.zeros(1, int))  # what is computed once is no part of it
  assert one == other and hash(one) == hash(other)
  assert one != Vocabulary(8, forbidden=((5, 8),))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"forbidden": ((4, 4),)}, "not empty"),
    ({"forbidden": ((4, 9),)}, r"within \[0, 8\]"),
    ({"forbidden": ((-1, 2),)}, r"within \[0, 8\]"),
    ({"forbidden": ((4, 6), (5, 7))}, "must be increasing"),
    ({"forbidden": ((0, 8),)}, "no id can be predicted"),
    ({"end": 8}, "end=8 is not in"),
    ({"begin": -1}, "begin=-1 is not in"),
    ({"mask": 3}, "mask=3 must be forbidden"),
    ({"pad": 3, "forbidden": ((4, 8),)}, "pad=3 must be forbidden"),
    (
      {"pad": 5, "mask": 5, "forbidden": ((4, 8),)},
      "=5 is also another special id",
    ),
    (
      {"end": 5, "pad": 5, "forbidden": ((4, 8),)},
      "pad=5 is also another special id",
    ),
  ],
)
def test_what_can_not_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Vocabulary(8, **fields)


def test_a_missing_id_that_is_needed_is_reported():
  vocab = Vocabulary(8, mask=0, forbidden=((0, 1),))
  assert vocab.need("mask") == 0
  with pytest.raises(UserError, match="no pad id"):
    vocab.need("pad")


# MARK: a model of it


def test_logits_are_minus_infinity_exactly_at_forbidden_ids(any_mesh, vocab):
  _, logits, *_ = _loss(vocab, any_mesh.size)
  assert np.isneginf(logits[:, ~allowed(vocab)]).all()
  assert np.isfinite(logits[:, allowed(vocab)]).all()


def test_a_split_vocabulary_is_compared_part_by_part(any_mesh, vocab):
  """Inside a `shard_map`, where a shard has its own ids."""
  parts = any_mesh.shape[RULES.vocab]
  find = jax.shard_map(
    lambda: vocab.is_predictable(vocab_ids(vocab.size // parts)),
    out_specs=P(RULES.vocab),
  )
  np.testing.assert_array_equal(jax.jit(find)(), allowed(vocab))


@functools.cache
def _loss(vocab, mesh_size):
  """Loss, its parts and gradients, of a smoothed target."""
  del mesh_size
  mesh = jax.sharding.get_mesh()
  denoiser, params = network(vocab)
  place = lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim))
  ids = np.flatnonzero(allowed(vocab))
  x0 = place(ids[np.arange(32).reshape(8, 4) % len(ids)])
  masked = place(np.arange(32).reshape(8, 4) % 3 > 0)
  hidden = place(
    np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
  )
  weight = place(np.linspace(0.5, 2, 32, dtype=np.float32).reshape(8, 4))

  def loss(params):
    return cross_entropy.masked_loss(
      *(denoiser.logits, denoiser.head(params), hidden, x0, masked, weight),
      *(32, vocab, 0.1),
    )

  @jax.jit
  def both(params):
    rows = hidden.reshape(32, 8, out_sharding=P(("replica", "fsdp"), None))
    found = jax.value_and_grad(loss, has_aux=True)(params)
    return found, denoiser.logits(params, rows)

  return jax.device_get((*both(params), x0, masked))


def test_the_smoothed_target_is_uniform_over_what_can_be_predicted(
  any_mesh, vocab
):
  ((_, losses), _), logits, x0, masked = _loss(vocab, any_mesh.size)
  possible = allowed(vocab)
  target = 0.9 * np.eye(vocab.size)[x0.reshape(-1)]
  target += 0.1 * possible / possible.sum()
  np.testing.assert_allclose(target.sum(axis=1), 1)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  want = -(target * np.where(possible, log_p, 0)).sum(axis=1)
  np.testing.assert_allclose(
    losses, np.where(masked, want.reshape(8, 4), 0), rtol=1e-5, atol=1e-6
  )


def test_no_gradient_comes_to_the_head_of_a_forbidden_id(any_mesh, vocab):
  (_, grads), *_ = _loss(vocab, any_mesh.size)
  head = grads["head"]
  assert (head[~allowed(vocab)] == 0).all()
  moved = np.abs(head[allowed(vocab)]).max(axis=1) > 0
  assert moved.all() or vocab.predictable == 1


def test_a_split_table_has_the_loss_of_a_whole_one(any_mesh, vocab):
  found, *_ = _loss(vocab, any_mesh.size)
  one = jax.make_mesh((1, 1, 1), any_mesh.axis_names, devices=jax.devices()[:1])
  with jax.set_mesh(one):
    whole, *_ = _loss(vocab, 1)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, found, whole)


# MARK: a sampler of it


SETTINGS = {
  "all": {"top_k": None, "top_p": None},
  "top-k": {"top_k": 4, "top_p": None},
  "more than there are": {"top_k": 15, "top_p": None},
  "top-p": {"top_k": None, "top_p": 0.9},
  "greedy": {"top_k": None, "top_p": None, "temperature": 0.0},
  "guided": {"top_k": None, "top_p": None, "guidance": 0.5},
}


# Every layout of ids and every kind of settings once; all pairs are slow.
PAIRS = [
  pytest.param(
    *(name, fields),
    id=f"{name}-{kind}",
    marks=pytest.mark.slow
    if name != "the mask at 0" and kind not in ("all", "guided")
    else (),
  )
  for name in ("the mask at 0", "ranges in the middle", "one id is left")
  for kind, fields in SETTINGS.items()
]


@pytest.mark.parametrize("name, fields", PAIRS)
def test_the_sampler_never_draws_a_forbidden_id(mesh, name, fields):
  vocab = VOCABULARIES[name]
  fields = {"temperature": 3.0, **fields}
  if name == "one id is left":
    vocab = Vocabulary(16, mask=3, pad=10, forbidden=vocab.forbidden)
  denoiser, params = network(vocab)
  config = SampleConfig(num_steps=4, temperature_range=None, **fields)
  x = np.full((8, 16), vocab.mask, np.int32)
  x[:, 3] = first = int(np.flatnonzero(allowed(vocab))[0])
  place = lambda x: jax.device_put(x, batch_sharding(mesh, x.ndim))
  canvas = Canvas(x, x == vocab.mask, np.full(8, 16, np.int32))
  drawn = sampler.make_sampler(config, denoiser, vocab)(
    params,
    jax.tree.map(place, canvas),
    schedule.pace(config, 16),
    tokens.effective_settings(config),
    place(rng.per_row(rng.stream(0, "sample"), jnp.arange(8))),
  )
  last = np.asarray(drawn.path[-1])
  ended = vocab.is_end(last).any(axis=1)
  length = np.where(ended, vocab.is_end(last).argmax(axis=1) + 1, 16)
  inside = np.arange(16)[None] < length[:, None]
  assert allowed(vocab)[last[inside]].all()
  assert (last[~inside] == vocab.pad).all()
  assert (last[:, 3] == first).all()
  if vocab.end is None:
    assert inside.all()
  if vocab.predictable > 1 and fields["temperature"]:
    assert len(np.unique(last)) > 4


# MARK: a tokenizer of it


class Words(Tokenizer):
  """Words by their number, among special ids."""

  kind = "words"

  def __init__(self, vocab):
    pieces = [b"%d " % i if allowed(vocab)[i] else b"" for i in range(32)]
    for i in (vocab.end, vocab.separator):
      pieces[i] = b""
    super().__init__(tuple(pieces), b"", vocab)

  def encode_batch(self, texts):
    return [np.array(text.split(), np.int32) for text in texts]


def test_special_ids_between_words_are_no_text():
  vocab = VOCABULARIES["ranges in the middle"]
  words = Words(vocab)
  ids = [1, vocab.separator, 7, vocab.mask, vocab.pad, 30, vocab.end, 25]
  assert words.decode(ids) == "1 7 30 "
  found = trace.spell(ids, words)
  assert found == ["1 ", "\u27e8sep\u27e9", "7 ", None, "", "30 "] + [
    "\u27e8end\u27e9",
    "\u27e8?\u27e9",
  ]


def test_a_prompts_length_is_that_of_its_tokens():
  words = Words(VOCABULARIES["ranges in the middle"])
  found = template.canvas(["1 7 [MASK]", "1 [MASK:*]"], words, 6)
  assert found.lengths.tolist() == [3, 6]
  assert (found.tokens[0, 3:] == words.vocab.pad).all()
  assert found.free.sum(axis=1).tolist() == [1, 5]


def test_rows_are_checked_by_what_may_stand_in_a_text():
  vocab = VOCABULARIES["ranges in the middle"]
  tokens = np.array([[16, 7, 2, 8, 31, 4]], np.uint16)
  segments = np.array([[1, 1, 1, 1, 1, 0]], np.uint16)
  check = lambda t, s: row_checks.find_wrong(
    {"tokens": t, "segments": s}, 6, vocab
  )
  assert check(tokens, segments) is None
  for place, token, reason in [
    (1, 17, "is the mask"),
    (2, 4, "is the padding id, but inside a text"),
    (3, 24, "not in the tokenizer's vocabulary"),
    (3, 32, "not in the tokenizer's vocabulary"),
    (5, 7, "in padding, where the id must be 4"),
  ]:
    wrong = tokens.copy()
    wrong[0, place] = token
    assert reason in check(wrong, segments)
    assert f"token {place}" in check(wrong, segments)


def test_a_document_without_an_end_is_its_sentences():
  a, b = np.array([1, 2]), np.array([3])
  (joined,) = join_sentences([a, b], 8, None)
  assert joined.tolist() == [1, 2, 3]
  (joined,) = join_sentences([a, b], 8, 9)
  assert joined.tolist() == [1, 2, 3, 9]
