"""Texts with hidden spans: where they are, and how they become rows."""

import dataclasses

import numpy as np
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.data import answers, corpora, inputs, row_checks, segments
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import (
  DataConfig,
  RowsConfig,
  StageConfig,
  TokenizerConfig,
)
from mdm_jax.data.holes import Holes, blank
from mdm_jax.data.stage_rows import make_held_out, make_rows

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
VOCAB = BYTES.vocab
BLANK = blank(VOCAB)
TEXTS = [*np.random.default_rng(0).integers(0, 97, (2000, 40), np.int32)]


def spans(asked):
  """The first position and the one past each run of hidden tokens."""
  edges = np.flatnonzero(np.diff(np.pad(asked.astype(int), 1)))
  return edges.reshape(-1, 2).tolist()


def test_hidden_spans_have_given_text_on_both_sides():
  holes = Holes(most=3, length=5, untold=0.0)
  found = [holes.hide(ids, VOCAB) for ids in TEXTS]
  sizes, counts = [], []
  for ids, text in zip(TEXTS, found, strict=True):
    np.testing.assert_array_equal(text.ids, ids)  # nothing is added
    here = spans(text.answer)
    assert here[0][0] > 0 and here[-1][1] < len(ids)
    counts.append(len(here))
    sizes += [past - first for first, past in here]
  assert np.bincount(counts)[1:] / 2000 == pytest.approx([1 / 3] * 3, abs=0.05)
  share = np.bincount(sizes)[1:] / len(sizes)
  assert share == pytest.approx([0.2] * 5, abs=0.03)


def test_untold_holes_are_filled_up_and_end_with_a_visible_blank():
  holes = Holes(most=2, length=5, untold=1.0)
  for ids in TEXTS[:200]:
    text = holes.hide(ids, VOCAB)
    np.testing.assert_array_equal(text.ids[text.ids != BLANK], ids)
    assert len(text.ids) <= len(ids) + holes.growth
    for first, past in spans(text.answer):
      assert past - first == 5
      inside = text.ids[first:past] == BLANK
      assert not inside[0] and (np.diff(inside.astype(int)) >= 0).all()
      assert text.ids[past] == BLANK and text.ids[past + 1] != BLANK


def test_each_hole_is_told_or_untold_by_itself():
  holes = Holes(most=1, length=5, untold=0.25)
  found = [holes.hide(ids, VOCAB) for ids in TEXTS]
  untold = np.mean([(text.ids == BLANK).any() for text in found])
  assert untold == pytest.approx(0.25, abs=0.04)
  two = [Holes(2, 5, 0.5).hide(ids, VOCAB) for ids in TEXTS]
  both = [text for text in two if len(spans(text.answer)) == 2]
  behind = [
    {int(text.ids[past]) == BLANK for _, past in spans(text.answer)}
    for text in both
  ]
  assert np.mean([len(kinds) == 2 for kinds in behind]) > 0.4


def test_holes_depend_on_the_text_alone_and_short_texts_have_none():
  holes = Holes(most=2, length=5)
  one, again = (holes.hide(TEXTS[3].copy(), VOCAB) for _ in range(2))
  np.testing.assert_array_equal(one.answer, again.answer)
  assert Holes(1, 1, 0.0).hide(np.arange(2, dtype=np.int32), VOCAB) is None
  text = Holes(1, 1, 0.0).hide(np.arange(3, dtype=np.int32), VOCAB)
  assert text.answer.tolist() == [False, True, False]


# MARK: the corpus


def config(corpus, unit="paragraphs", length=64, **data):
  data = {"hole_length": 4, "untold_holes": 0.5} | data
  return RowsConfig(
    data=DataConfig(corpus=corpus, **data),
    tokenizer=TokenizerConfig(kind="byte"),
    stages=(StageConfig(unit=unit, length=length),),
  )


def test_a_corpus_with_holes_has_the_texts_of_the_corpus():
  whole = [d.text for d in corpora.load("python_docs", 3)]
  hidden = DataConfig(corpus="infill:python_docs", max_documents=3)
  found = corpora.load_all(hidden)["train"][0]
  assert [d.text for d in found] == whole
  assert [d.text for d in corpora.load("infill:python_docs", 3)] == whole
  assert corpora.asked(hidden) == corpora.asked(hidden, "test") == "holes"
  assert corpora.has_answers(hidden)
  assert corpora.shown(hidden).corpus == "python_docs"
  other = dataclasses.replace(hidden, test_corpus="text:*.txt")
  assert corpora.asked(other, "test") == "all"


@pytest.mark.parametrize("unit", ["paragraphs", "sentences"])
def test_rows_have_all_text_and_ask_only_for_holes(unit):
  texts = [f"This is sentence {n} of a text. And one more." for n in range(9)]
  own = config("infill:python_docs", unit)
  found = segments.find(texts, own.stages[0])
  rows, counts, _ = make_rows(found, None, own.stages[0], BYTES, own.data)
  if unit == "sentences":
    held = None
  else:
    held, _ = make_held_out(texts, own, BYTES, asked="holes")
    assert held.num_bytes == sum(len(text.encode()) for text in texts)
  for some in (rows, held.rows if held else rows):
    real = some.tokens[(some.segments > 0) & (some.tokens != BLANK)]
    text = BYTES.decode(real)
    assert all(f"sentence {n} of" in text for n in range(9))
    assert 0 < some.answer.sum() < (some.segments > 0).sum()
    ends = some.tokens == VOCAB.end
    assert not (ends & some.answer).any()
  assert counts["answer_tokens"] == rows.answer.sum()
  assert counts["texts_without_room"] == 0


def test_what_is_hidden_decides_which_rows_are_read():
  whole = inputs.row_inputs(config("python_docs"), None)
  hidden = inputs.row_inputs(config("infill:python_docs"), None)
  assert "holes" not in whole
  assert inputs.difference(hidden, whole).startswith("holes is [1, 4, 0.5")
  longer = config("infill:python_docs", hole_length=5)
  assert inputs.row_inputs(longer, None) != hidden
  task = inputs.row_inputs(config("task:middle", "conversations"), None)
  assert task["holes"][-1] == []


@pytest.mark.parametrize(
  "found, words",
  [
    (config("infill:task:sorting"), "set data.corpus=task:sorting"),
    (config("infill:sotu", "pairs"), "set stages.0..unit=paragraphs"),
    (config("infill:sotu", length=6), "nearest valid: stages.0..length=7"),
  ],
)
def test_what_cant_have_holes_is_said(found, words):
  with pytest.raises(UserError, match=words):
    row_checks.check_units(found)


@pytest.mark.parametrize("corpus", ["infill:", "infill:sotuu", "infill:text:"])
def test_a_corpus_that_is_none_is_said(corpus):
  with pytest.raises(UserError, match="did you mean 'infill:"):
    corpora.load(corpus)


def test_which_models_learn_lengths():
  learns = lambda *args, **data: corpora.untold_hole(config(*args, **data).data)
  assert learns("infill:sotu") == learns("task:middle") == 4
  assert learns("infill:sotu", untold_holes=0.0) is None
  assert learns("sotu") is learns("task:sorting") is None


# MARK: tasks


def test_a_task_has_holes_in_its_documents():
  text = answers.hole("([", "{}]", ").")
  assert answers.parts(text) == ("([", "{}]" + answers.HOLE, ").")
  assert answers.plain(text) == "([{}])."
  encode = lambda untold: answers.encode(
    [answers.parts(text)], BYTES, holes=Holes(length=4, untold=untold)
  )[0]
  told, untold = encode(0.0), encode(1.0)
  assert BYTES.decode(told.ids) == BYTES.decode(untold.ids) == "([{}])."
  assert spans(told.answer) == [[2, 5]] and spans(untold.answer) == [[2, 6]]
  assert untold.ids[5] == untold.ids[6] == BLANK and untold.fits
  (longer,) = answers.encode(
    [answers.parts(text)], BYTES, holes=Holes(length=2, untold=1.0)
  )
  assert spans(longer.answer) == [[2, 5]] and not longer.fits
