"""Text units: lossless sentences, what each kind holds, and difficulty."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdm_jax.data import corpora, readability, segments
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data import words as words_lib
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.data.segments import Unit

SPLIT = ["One here.", " Two is here!\n\n", "Three, Dr. Lee?"]
SPLIT += [" Four \u2014 na\u00efve \U0001f600 end. ", " Five"]
TEXT = "".join(SPLIT)
DOCS = [d.text for d in corpora.load("python_docs")]


def _stage(unit, **fields):
  return StageConfig(unit=unit, **fields)


# MARK: sentences

_pieces = st.sampled_from(
  [*"aB.!? \n\r\t\x85\u2028\xa0\u3000\u3002\"')", "\n\n"]
)


@given(st.one_of(st.text(), st.lists(_pieces, max_size=30).map("".join)))
@example("B\x85.")  # sentencex itself fails on this one
@example("\n\n \n")
@settings(deadline=None, max_examples=300)
def test_sentences_joined_are_the_text(text):
  found = segments.sentences(text)
  assert "".join(found) == text
  assert all(found)


@given(st.integers(0, 2000))
@settings(deadline=None, max_examples=50)
def test_long_texts_are_not_lost_in_gaps(words):
  # sentencex leaves out white space about every 10,000 characters.
  text = "\n".join(f"Sentence {i} \u00e9 ends. \n" for i in range(words))
  assert "".join(segments.sentences(text)) == text


def test_a_space_belongs_to_the_sentence_it_is_before():
  assert segments.sentences(TEXT) == SPLIT


def test_sentences_apart_take_as_many_tokens_as_their_text():
  config = TokenizerConfig(vocab_size=400)
  tokenizer = tokenizers.build(config, DOCS[:20])
  apart = tokenizer.encode_batch(
    [s for t in DOCS for s in segments.sentences(t)]
  )
  whole = tokenizer.encode_batch(DOCS)
  # A cut inside a run of line breaks may pair them in another way.
  assert abs(sum(map(len, apart)) / sum(map(len, whole)) - 1) < 1e-3


def test_documents_divide_into_sentences():
  for text in DOCS:
    found = segments.sentences(text)
    assert "".join(found) == text
    assert not any(sentence.isspace() for sentence in found[1:])


# MARK: units


def test_a_sentence_unit_is_one_stripped_sentence():
  found = segments.units(["\n", TEXT], _stage("sentences"))
  assert [u.parts for u in found] == [(s.strip(),) for s in SPLIT]
  assert {u.document for u in found} == {1}


def test_pairs_do_not_overlap_nor_leave_their_document():
  found = segments.units([TEXT, "Anna ran. Carl sat."], _stage("pairs"))
  stripped = [s.strip() for s in SPLIT]
  assert found == [
    Unit(0, (stripped[0], stripped[1])),
    Unit(0, (stripped[2], stripped[3])),
    Unit(1, ("Anna ran.", "Carl sat.")),
  ]


def test_paragraphs_are_the_document_whatever_the_limits():
  stage = _stage("paragraphs", min_words=5, max_words=6)
  found = segments.units(DOCS, stage)
  assert ["".join(u.parts) for u in found] == DOCS
  assert [u.document for u in found] == list(range(len(DOCS)))


@pytest.mark.parametrize("unit", ["sentences", "pairs"])
def test_word_limits_are_inclusive_and_of_the_whole_unit(unit):
  everything = segments.units(DOCS, _stage(unit))
  limited = segments.units(DOCS, _stage(unit, min_words=10, max_words=20))
  assert limited == [
    u for u in everything if 10 <= len(" ".join(u.parts).split()) <= 20
  ]
  assert {words_lib.count(" ".join(u.parts)) for u in limited} == {
    *range(10, 21)
  }


def test_nothing_within_the_limits_gives_no_unit():
  assert segments.units([TEXT], _stage("sentences", min_words=99)) == []


# MARK: difficulty


def _units(*texts):
  return [Unit(i, (text,)) for i, text in enumerate(texts)]


def _mean(values):
  return sum(values) / len(values) if values else 0.0


def _rank(value, values):
  below = sum(v < value - 1e-12 for v in values)
  same = sum(abs(v - value) <= 1e-12 for v in values)
  return (below + (same - 1) / 2) / (len(values) - 1)


def _slow_difficulty(units):
  """The definition, one unit at a time."""
  texts = ["\n".join(u.parts).lower() for u in units]
  words = [words_lib.words(text) for text in texts]
  idf = {
    word: math.log(len(units) / sum(word in other for other in words))
    for word in set().union(*words)
  }
  signals = [
    [_mean([idf[w] for w in ws]) for ws in words],
    [
      -readability.reading_ease(
        max(len(ws), 1), len(u.parts), sum(map(readability.syllables, ws))
      )
      for u, ws in zip(units, words, strict=True)
    ],
    [len(ws) for ws in words],
  ]
  return np.mean([[_rank(v, s) for v in s] for s in signals], axis=0)


def test_difficulty_is_as_defined():
  units = segments.units(DOCS[:12], _stage("pairs"))[:120] + _units("--", "--")
  np.testing.assert_allclose(
    segments.difficulty(units), _slow_difficulty(units), atol=1e-9
  )


@pytest.mark.parametrize(
  "unit, limits", [("sentences", (10, 50)), ("pairs", (15, 100))]
)
@pytest.mark.parametrize("corpus", ["python_docs", "shakespeare"])
def test_found_A8_no_two_signals_of_difficulty_cancel(corpus, unit, limits):
  texts = [d.text for d in corpora.load(corpus)]
  stage = _stage(unit, min_words=limits[0], max_words=limits[1])
  units = segments.units(texts, stage)
  words = segments.unit_words(units)
  found = segments.signals(
    units, words, segments.rarity(words.frequency(), len(units))
  )
  ranks = np.array([segments._percentile_ranks(signal) for signal in found])
  for i in range(len(ranks)):
    for j in range(i):
      # Of two that cancel, the mean's deviation is far below 0.289 of each.
      assert -0.3 < np.corrcoef(ranks[i], ranks[j])[0, 1] < 0.7
      assert ranks[[i, j]].mean(axis=0).std() > 0.17
  assert segments.difficulty(units).std() > 0.15


def test_short_common_words_are_easier():
  plain = [
    f"the cat and the dog and the cat and the dog {i % 3}" for i in range(20)
  ]
  hard = "Quixotic jurisprudence perplexes bewildered magnates; vexing forums"
  hard += " fluently jeopardize zygotic hypotheses while kwashiorkor abates"
  scores = segments.difficulty(_units(*plain, hard))
  assert np.all((scores >= 0) & (scores <= 1))
  assert scores.argmax() == 20 and scores[20] == 1.0


def test_difficulty_of_one_and_of_none():
  assert segments.difficulty(_units("alone")).tolist() == [0.0]
  assert segments.difficulty([]).shape == (0,)


@pytest.mark.parametrize("fraction", [1 / 3, 0.5, 2 / 3, 1.0])
def test_easiest_keeps_the_share_in_order(fraction):
  units = segments.units(DOCS, _stage("sentences", min_words=5))
  units = units[: len(units) // 3 * 3]
  selection = segments.easiest(units, fraction)
  kept = selection.units
  assert len(kept) == math.ceil(round(fraction * len(units), 6))
  scores = dict(zip(map(id, units), segments.difficulty(units), strict=True))
  chosen = set(map(id, kept))
  left_out = [s for key, s in scores.items() if key not in chosen]
  assert selection.cut == max(scores[id(u)] for u in kept)
  assert selection.cut <= min(left_out, default=1.0)
  assert kept == [u for u in units if id(u) in chosen]
  np.testing.assert_array_equal(selection.kept, [scores[id(u)] for u in kept])


def test_the_histogram_counts_every_unit():
  units = segments.units(DOCS[:20], _stage("sentences"))
  selection = segments.easiest(units, 1 / 3)
  bars = selection.histogram(20)
  assert len(bars) == 20 and sum(bars) == len(units)
  below = sum(bars[: math.floor(selection.cut * 20)])
  assert below <= len(selection.units) <= below + bars[int(selection.cut * 20)]


def test_equally_difficult_units_are_kept_from_the_start():
  units = _units(
    *["same words here", "unequal wording prevails astonishingly"] * 100
  )
  easy = int(segments.difficulty(units).argmin())
  assert segments.easiest(units, 0.172).units == units[easy::2][:35]
  assert 0.07 * 200 > 14 and len(segments.easiest(units, 0.07).units) == 14


def test_of_nothing_nothing_is_kept():
  selection = segments.easiest([], 0.5)
  assert selection.units == [] and selection.cut == 0
  assert sum(selection.histogram(20)) == 0
