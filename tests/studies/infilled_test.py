"""Holes in test text: where they are, and what is said of them."""

import numpy as np
import pytest

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.sampling.chain_calls import Passage
from mdm_jax.studies import infilled

VOCAB = Vocabulary.after_text(50)


def texts(*sizes):
  return [Passage(np.arange(n), np.ones(n, bool)) for n in sizes]


def test_holes_have_all_lengths_and_given_text_on_both_sides():
  found = infilled.holes(texts(20, 9, 2), 400, room=40)
  assert len(found) == 400
  assert {hole.size for hole in found} == {*range(1, infilled.LONGEST + 1)}
  for hole in found:
    assert len(hole.ids) == (20, 9)[hole.text]
    assert 1 <= hole.start and hole.start + hole.size < len(hole.ids)
  again = infilled.holes(texts(20, 9, 2), 400, room=40)
  assert [h.start for h in again] == [h.start for h in found]


def test_only_what_may_be_predicted_is_hidden():
  free = np.zeros(30, bool)
  free[[4, 5, 6, 10, 11]] = True
  for hole in infilled.holes([Passage(np.arange(30), free)], 40, room=40):
    assert hole.passage().free.sum() == hole.size <= 3
    assert not (hole.passage().free & ~free).any()


def test_texts_without_room_are_left_out():
  assert infilled.holes(texts(34, 2), 5, room=40) == []
  assert infilled.holes([], 5, room=40) == []


def test_rows_have_each_length_between_the_same_text():
  found = infilled.holes(texts(20, 12), 6, room=40)
  rows, true = infilled.candidates(found, 32, VOCAB)
  assert rows.counts.tolist() == [infilled.LONGEST] * 6
  for n, hole in enumerate(found):
    before, behind = hole.ids[: hole.start], hole.ids[hole.start + hole.size :]
    for size in range(1, infilled.LONGEST + 1):
      row = n * infilled.LONGEST + size - 1
      length = rows.canvas.lengths[row]
      free = rows.canvas.free[row, :length]
      assert free.sum() == size and length == len(before) + size + len(behind)
      given = rows.canvas.tokens[row, :length][~free]
      np.testing.assert_array_equal(given, np.append(before, behind))
      assert (rows.canvas.tokens[row, length:] == VOCAB.pad).all()
    assert rows.canvas.lengths[true[n]] == len(hole.ids)


def test_what_an_untold_length_costs_is_its_probability():
  right = {"told": np.array([1.0, 1, 0, 0]), "untold": np.array([1.0, 0, 0, 0])}
  found = infilled._summary(
    right,
    nats=np.array([1.0, 2, 3, 4]),
    log_p=np.log([0.5, 0.25, 0.5, 1.0]),
    same=np.array([True, False, True, True]),
    documents=np.arange(4),
  )
  assert found["right_difference"].value == -0.25
  assert found["same_length_untold"].value == 0.75
  assert found["nats_told"].value == 2.5
  assert found["nats_difference"].value == pytest.approx(np.log(2))
  assert found["nats_untold"].value == pytest.approx(2.5 + np.log(2))
