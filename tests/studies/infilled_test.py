"""Holes in test text: where they are, and what is said of them."""

import numpy as np
import pytest

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling.chain_calls import Passage
from mdm_jax.studies import hidden, infilled

VOCAB = Vocabulary.after_text(50)


def texts(*sizes):
  return [Passage(np.arange(n), np.ones(n, bool)) for n in sizes]


def test_holes_have_all_lengths_and_given_text_on_both_sides():
  found = hidden.holes(texts(20, 9, 2), 400, room=40)
  assert len(found) == 400
  assert {hole.size for hole in found} == {*range(1, hidden.LONGEST + 1)}
  for hole in found:
    assert len(hole.ids) == (20, 9)[hole.text]
    assert 1 <= hole.start and hole.start + hole.size < len(hole.ids)
  again = hidden.holes(texts(20, 9, 2), 400, room=40)
  assert [h.start for h in again] == [h.start for h in found]


def test_only_what_may_be_predicted_is_hidden():
  free = np.zeros(30, bool)
  free[[4, 5, 6, 10, 11]] = True
  for hole in hidden.holes([Passage(np.arange(30), free)], 40, room=40):
    assert hole.passage().free.sum() == hole.size <= 3
    assert not (hole.passage().free & ~free).any()


def test_texts_without_room_are_left_out():
  assert hidden.holes(texts(34, 2), 5, room=40) == []
  assert hidden.holes([], 5, room=40) == []


def test_rows_have_each_length_between_the_same_text():
  found = hidden.holes(texts(20, 12), 6, room=40)
  rows, true = hidden.candidates(found, 32, VOCAB)
  assert rows.counts.tolist() == [hidden.LONGEST] * 6
  for n, hole in enumerate(found):
    before, behind = hole.ids[: hole.start], hole.ids[hole.start + hole.size :]
    for size in range(1, hidden.LONGEST + 1):
      row = n * hidden.LONGEST + size - 1
      length = rows.canvas.lengths[row]
      free = rows.canvas.free[row, :length]
      assert free.sum() == size and length == len(before) + size + len(behind)
      given = rows.canvas.tokens[row, :length][~free]
      np.testing.assert_array_equal(given, np.append(before, behind))
      assert (rows.canvas.tokens[row, length:] == VOCAB.pad).all()
    assert rows.canvas.lengths[true[n]] == len(hole.ids)


def test_what_an_untold_length_costs_is_its_probability():
  told = np.array([1.0, 2, 3, 4])
  untold = told - np.log([0.5, 0.25, 0.5, 1.0])
  found = infilled._summary(
    {"told": np.array([1.0, 1, 0, 0]), "untold": np.array([1.0, 0, 0, 0])},
    {"told": told, "untold": untold, "together": told + 1},
    np.array([1.0, 0, 1, 1]),
    documents=np.arange(4),
  )
  assert found["right_difference"].value == -0.25
  assert found["same_length_untold"].value == 0.75
  assert found["nats_told"].value == 2.5
  assert found["nats_difference"].value == pytest.approx(np.log(2))
  assert found["nats_untold"].value == pytest.approx(2.5 + np.log(2))
  assert found["nats_difference_together"].value == pytest.approx(1)


def test_a_text_with_blanks_is_scored_with_them():
  hole = hidden.Hole(0, np.arange(9), start=3, size=2)
  text = hole.untold(5, VOCAB)
  blanks = [VOCAB.separator] * 4
  assert text.ids.tolist() == [0, 1, 2, 3, 4, *blanks, 5, 6, 7, 8]
  assert np.flatnonzero(text.free).tolist() == [3, 4, 5, 6, 7]
  canvas = hidden.canvas_of([text], 16, VOCAB)
  assert canvas.lengths.tolist() == [13]
  assert (canvas.tokens[0, 13:] == VOCAB.pad).all()


def test_holes_that_texts_have_are_told_of_without_blanks():
  untold = hidden.Hole(0, np.arange(9), 3, 2).untold(5, VOCAB)
  told = hidden.Hole(0, np.arange(9), 3, 2).passage()
  longer = hidden.Hole(0, np.arange(9), 1, 6).passage()
  found = hidden.given_holes([untold, longer, told], 9, 5, VOCAB)
  assert [hole.text for hole in found] == [0, 2]
  for hole in found:
    assert hole.ids.tolist() == [*range(9)]
    assert (hole.start, hole.size) == (3, 2)
