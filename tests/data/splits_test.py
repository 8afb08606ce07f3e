"""Splits: every document is in exactly one, and their sizes are as asked."""

import pydoc_data.topics

import prepare_harness as harness
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.core.errors import UserError
from mdm_jax.data import preparation, splits
from mdm_jax.data.config import DataConfig, RowsConfig
from mdm_jax.data.splits import HELD_OUT, SIDES, Shares
from mdm_jax.data.stores import InMemory
from mdm_jax.data.text_files import Document, Tally

LINES = "\n".join(pydoc_data.topics.topics.values()).splitlines(True)
# 2.9 MB without a line that comes twice.
BOOK = "".join(f"{i} {line}" for i, line in enumerate(LINES * 5))
NOTE = "".join(f"note {i} {line}" for i, line in enumerate(LINES[50:150]))


def _documents(texts):
  return [Document(str(i), text) for i, text in enumerate(texts)]


def _shares(validation=0.05, test=0.05, wanted=HELD_OUT):
  return Shares(validation, test, wanted)


def _split(texts, shares):
  documents = _documents(texts)
  split = splits.decide(splits.count(documents, shares), shares)
  return split, split(documents)


def _parts(size, count):
  """Equal texts of real lines, all of them different."""
  step = len(BOOK) // (count + 1)
  return [BOOK[i * step : i * step + size] for i in range(count)]


_texts = st.lists(st.text("ab c\n", min_size=1), min_size=2, max_size=20)
_fractions = st.floats(0, 0.4)


@given(_texts, _fractions, _fractions)
@settings(deadline=None)
def test_text_is_divided_and_duplicates_stay_together(texts, one, other):
  texts += ["one", "two", "three"]
  split, sides = _split(texts, _shares(one, other))
  found = {side: {d.text for d in sides[side]} for side in SIDES}
  assert all(found.values())
  assert not found["train"] & (found["validation"] | found["test"])
  assert not found["validation"] & found["test"]
  whole = {side: "".join(d.text for d in sides[side]) for side in SIDES}
  assert sorted("".join(whole.values())) == sorted("".join(texts))
  assert split.way == "documents"  # each is too short to be cut


@given(_texts, _texts)
@settings(deadline=None)
def test_adding_documents_moves_none(texts, more):
  texts = [str(i) * 2 for i in range(100)] + texts
  shares = _shares(0.2, 0.2)
  (a, before), (b, after) = (_split(t, shares) for t in (texts, texts + more))
  assert a.way == b.way == "documents"
  for side in SIDES:
    kept = [d for d in after[side] if int(d.name) < len(texts)]
    assert before[side] == kept


def test_adding_documents_moves_no_end():
  shares = _shares()
  (a, before), (b, after) = (_split(_parts(4000, n), shares) for n in (3, 3))
  assert a.way == b.way == "ends"
  assert before == after


def test_held_out_shares_are_about_what_was_asked():
  split, sides = _split([f"text {i}" for i in range(4000)], _shares(0.05, 0.1))
  assert split.way == "documents"
  assert 150 < len(sides["validation"]) < 250 and 300 < len(sides["test"]) < 500


@pytest.mark.parametrize("size", [4000, 50_000])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, "book and note"])
def test_found_A4_few_or_unequal_documents_give_their_ends(size, count):
  """Whole ones would be half of the text, or the book, or the note."""
  texts = [BOOK, NOTE]
  if count != "book and note":
    texts = _parts(size, count)
  split, sides = _split(texts, _shares())
  assert split.way == "ends"
  told = splits.summary(split, splits.sizes(sides), 0)
  sizes = told["characters"]
  total = sum(map(len, texts))
  assert sum(sizes.values()) == total
  for side in HELD_OUT:
    assert 0.045 <= sizes[side] / total <= 0.07
    assert f"{side} {len(texts):,} documents, {sizes[side]:,} characters (" in (
      splits.describe(told)
    )
  assert "the ends of documents" in splits.describe(told)
  for i, text in enumerate(texts):
    parts = [sides[side][i].text for side in SIDES]
    assert "".join(parts) == text  # train first, then validation, then test
    assert all(part[-1] in "\n " for part in parts[:2])
  for side in HELD_OUT:
    for document in sides[side]:
      assert not any(document.text in d.text for d in sides["train"])


def test_tiny_documents_stay_whole_beside_long_ones():
  split, sides = _split([BOOK, "a note", "another"], _shares())
  assert split.way == "ends"
  assert [d.text for d in sides["train"][1:]] == ["a note", "another"]
  assert [d.name for d in sides["validation"]] == ["0:validation"]
  assert [d.name for d in sides["test"]] == ["0:test"]


def test_many_documents_but_one_holds_most_of_the_text():
  texts = [BOOK, *_parts(300, 200)]
  assert _split(texts[1:], _shares())[0].way == "documents"
  assert _split(texts, _shares())[0].way == "ends"


@given(st.integers(100, 900), st.floats(0.01, 0.4))
@settings(deadline=None)
def test_a_single_text_is_cut_at_words(size, fraction):
  text = " ".join(f"w{i}" for i in range(size))
  _, sides = _split([text] * 3, _shares(fraction, fraction))
  parts = [sides[side][0].text for side in SIDES]
  assert "".join(parts) == text
  assert parts[0].endswith(" ") and parts[1].endswith(" ")
  for part in parts[1:]:
    share = len(part) / len(text)
    assert fraction - 2 / len(text) <= share <= 1.5 * fraction + 42 / len(text)


def test_a_single_text_is_cut_at_a_line_if_one_is_near():
  _, sides = _split(["some words\n" * 100], _shares(0.1, 0.1))
  (train,), (validation,), (test,) = (sides[side] for side in SIDES)
  assert train.text.endswith("\n") and validation.text.endswith("\n")
  assert test.text.endswith("\n")


def test_too_little_text_is_refused():
  with pytest.raises(UserError, match="too short to hold out text for valid"):
    _split(["a\n"], _shares())
  with pytest.raises(UserError, match="2 documents with 2 characters"):
    _split(["a", "b"], _shares())


@given(_texts, _texts, _fractions, st.sampled_from([0, 1, 2]))
@settings(deadline=None, max_examples=50)
def test_counted_part_by_part_it_is_the_same(texts, more, fraction, sides):
  shares = _shares(fraction, 0.1, HELD_OUT[:sides])
  whole = splits.count(_documents(texts + more), shares)
  parts = splits.count(_documents(texts), shares)
  parts.add(splits.count(_documents(more), shares))
  assert parts == whole


def test_text_that_is_given_for_a_side_is_nowhere_else():
  texts = [f"text {i}" for i in range(400)]
  given_texts = texts[:3] + ["of its own"]
  found = {"train": _documents(texts), "test": _documents(given_texts)}
  store = InMemory({side: (found[side], Tally()) for side in found})
  data = DataConfig(eval_fraction=0.1, test_corpus="given")
  counted = harness.count(store, RowsConfig(data=data))
  sides = harness.divide(counted)
  *_, told = preparation.sample(counted, preparation.run_here)
  assert [d.text for d in sides["test"]] == given_texts
  rest = {d.text for d in (*sides["train"], *sides["validation"])}
  assert rest == set(texts[3:]) and told["repeated"] == 3
  assert told["given"] == ["test"]
  assert 20 < len(sides["validation"]) < 60
  lines = splits.describe(told)
  assert (
    "test 4 documents, 28 characters" in lines and ", its own corpus" in lines
  )
  assert "3 documents that are in a held-out corpus" in lines
