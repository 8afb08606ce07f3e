"""Packing: every text once and whole, little padding, nothing lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.packing import join_sentences, pack

PAD = 999
LAST = 777


def _vocab(pad):
  return Vocabulary(pad + 1, pad=pad, forbidden=((pad, pad + 1),))


VOCAB = _vocab(PAD)


@st.composite
def _texts(draw):
  length = draw(st.integers(1, 24))
  sizes = draw(st.lists(st.integers(1, length), max_size=40))
  starts = np.cumsum([0, *sizes])
  texts = [
    np.arange(a, b, dtype=np.int32)
    for a, b in zip(starts, starts[1:], strict=False)
  ]
  return texts, length


def _segments(rows):
  """Every segment of every row, as (row, its tokens)."""
  for i in range(len(rows)):
    for number in range(1, rows.segments[i].max() + 1):
      yield i, np.flatnonzero(rows.segments[i] == number)


def _first_fit(sizes, length):
  bins = []
  for size in sizes:
    place = next((i for i, b in enumerate(bins) if b + size <= length), None)
    if place is None:
      bins.append(size)
    else:
      bins[place] += size
  return len(bins)


# MARK: rows


@given(_texts())
@settings(deadline=None)
def test_every_text_is_one_segment_once_and_whole(case):
  texts, length = case
  rows = pack(texts, length, VOCAB)
  found = []
  for row, places in _segments(rows):
    assert (np.diff(places) == 1).all()
    found.append(tuple(rows.tokens[row, places]))
  assert sorted(found) == sorted(map(tuple, texts))


@given(_texts())
@settings(deadline=None)
def test_padding_and_segment_zero_are_the_same_and_come_last(case):
  vocab = _vocab(PAD * 1000)
  rows = pack(*case, vocab)
  padding = rows.segments == 0
  assert ((rows.tokens == PAD * 1000) == padding).all()
  assert (np.diff(padding.astype(int), axis=1) >= 0).all()
  assert not padding.all(axis=1).any()


@given(_texts())
@settings(deadline=None)
def test_segments_count_up_from_one(case):
  rows = pack(*case, VOCAB)
  for row in rows.segments:
    real = row[row > 0].astype(int)
    assert real[0] == 1
    assert set(np.diff(real)) <= {0, 1}


@given(_texts())
@settings(deadline=None)
def test_rows_are_as_few_as_first_fit_decreasing_makes_them(case):
  texts, length = case
  sizes = sorted(map(len, texts), reverse=True)
  rows = pack(texts, length, VOCAB)
  fewest = -(-sum(sizes) // length)
  assert fewest <= len(rows) <= _first_fit(sizes, length) + 1


@given(_texts())
@settings(deadline=None)
def test_no_two_rows_fit_into_one(case):
  rows = pack(*case, VOCAB)
  filled = sorted((rows.segments > 0).sum(axis=1))
  assert len(filled) < 2 or filled[0] + filled[1] > rows.length


def test_real_sizes_leave_little_padding():
  rng = np.random.default_rng(0)
  sizes = np.clip(rng.lognormal(3, 0.6, 2000).astype(int), 1, 64)
  rows = pack([np.ones(n, np.int32) for n in sizes], 64, VOCAB)
  assert (rows.segments > 0).mean() > 0.99


def test_the_same_texts_give_the_same_rows():
  texts = [np.full(n, n, np.int32) for n in (3, 1, 3, 2, 5, 1)]
  first, second = pack(texts, 6, VOCAB), pack(texts, 6, VOCAB)
  assert (first.tokens == second.tokens).all()
  assert (first.segments == second.segments).all()


def test_no_texts_give_no_rows():
  rows = pack([], 8, VOCAB)
  assert len(rows) == 0 and rows.length == 8
  assert rows.tokens.shape == rows.segments.shape == (0, 8)


@pytest.mark.parametrize("size", [0, 9])
def test_a_text_that_does_not_fit_is_an_error(size):
  with pytest.raises(ValueError, match=f"{size} tokens in rows of 8"):
    pack([np.ones(size, np.int32)], 8, VOCAB)


@pytest.mark.parametrize("pad, dtype", [(65535, np.uint16), (65536, np.int32)])
def test_ids_fit_their_type(pad, dtype):
  rows = pack([np.array([pad - 1])], 2, _vocab(pad))
  assert rows.tokens.dtype == dtype
  assert rows.tokens.tolist() == [[pad - 1, pad]]


# MARK: pieces of a document


@st.composite
def _sentences(draw):
  length = draw(st.integers(1, 12))
  sizes = draw(st.lists(st.integers(1, 30), max_size=20))
  starts = np.cumsum([0, *sizes])
  sentences = [
    np.arange(a, b, dtype=np.int32)
    for a, b in zip(starts, starts[1:], strict=False)
  ]
  return sentences, length


@given(_sentences())
@settings(deadline=None)
def test_joining_loses_nothing_and_ends_the_document(case):
  sentences, length = case
  pieces = join_sentences(sentences, length, LAST)
  total = sum(map(len, sentences))
  assert np.concatenate(pieces).tolist() == [*range(total), LAST]


@given(_sentences())
@settings(deadline=None)
def test_pieces_fit_and_are_not_empty(case):
  sentences, length = case
  for piece in join_sentences(sentences, length, LAST):
    assert 0 < len(piece) <= length


@given(_sentences())
@settings(deadline=None)
def test_pieces_start_where_sentences_do_unless_one_is_too_long(case):
  sentences, length = case
  starts = {int(s[0]) for s in sentences} | {LAST}
  cut = {
    int(token)
    for s in sentences
    if len(s) > length
    for token in s[length::length]
  }
  for piece in join_sentences(sentences, length, LAST):
    assert int(piece[0]) in starts | cut


@given(_sentences())
@settings(deadline=None)
def test_pieces_take_every_sentence_that_fits(case):
  sentences, length = case
  sizes = {int(s[0]): len(s) for s in sentences} | {LAST: 1}
  pieces = join_sentences(sentences, length, LAST)
  for piece, following in zip(pieces, pieces[1:], strict=False):
    size = sizes.get(int(following[0]))
    assert size is None or len(piece) + size > length


def test_an_empty_document_is_its_end():
  assert [p.tolist() for p in join_sentences([], 4, LAST)] == [[LAST]]
