"""The guide's targets: what passes, what misses, and by which number."""

import math

import pytest

from mdm_jax.evaluation import targets


def _results(**changed):
  text = {
    "seq_rep_2": (0.05, 0.04),
    "seq_rep_3": (0.01, 0.01),
    "seq_rep_4": (0.0, 0.0),
    "grade": (9.0, 12.0),
    "unique_starts@1": (0.8, 0.6),
  } | changed
  sources = {
    "sampling": [ours for ours, _ in text.values()],
    "held_out": [theirs for _, theirs in text.values()],
  }
  return {
    "ppl_bound": 40.0,
    "bits_per_byte": 1.9,
    "stage_ce": {"0.05,0.2": 1.0},
    "text_metrics": {
      source: {
        name: {"value": value, "stderr": 0.0, "n": 64}
        for name, value in zip(text, values, strict=True)
      }
      for source, values in sources.items()
    },
  }


def _passed(measure, **changed):
  (line,) = [
    t for t in targets.check(_results(**changed)) if t.measure == measure
  ]
  return line.passed


def test_three_numbers_are_called_perplexity():
  per_token, per_byte, masked = targets.check(_results())[:3]
  assert (per_token.value, per_token.passed) == (40.0, False)
  assert per_byte.value == pytest.approx(2**1.9) and per_byte.passed
  assert masked.value == pytest.approx(math.e) and masked.passed
  assert masked.measure == "masked_ppl@[0.05,0.2]"
  assert "no likelihood" in masked.meaning


def test_every_target_of_the_guide_is_there():
  names = [t.target for t in targets.check(_results())]
  assert names == [
    *["perplexity < 4.0"] * 3,
    *["repetition < 10 %"] * 3,
    "grade 8+",
    "unique starts > 0.7",
  ]


@pytest.mark.parametrize(
  "ours, theirs, passed",
  [
    (0.05, 0.04, True),
    (0.1, 0.09, False),
    (0.05, 0.02, False),
    (0.0, 0.0, True),
  ],
)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_repetition_is_below_a_tenth_and_twice_the_texts(
  n, ours, theirs, passed
):
  assert _passed(f"seq_rep_{n}", **{f"seq_rep_{n}": (ours, theirs)}) == passed


@pytest.mark.parametrize(
  "ours, theirs, passed",
  [
    (8.0, 20.0, True),
    (7.9, 20.0, False),
    (4.5, 5.0, True),
    (3.5, 5.0, False),
    (7.0, None, False),
    (None, 5.0, False),
  ],
)
def test_the_grade_is_high_or_the_texts_own(ours, theirs, passed):
  assert _passed("grade", grade=(ours, theirs)) == passed


@pytest.mark.parametrize(
  "ours, theirs, passed",
  [(0.71, 1.0, True), (0.7, 0.9, False), (0.45, 0.5, True), (0.4, 0.5, False)],
)
def test_starts_are_unique_or_as_the_texts(ours, theirs, passed):
  measure = "unique_starts@1"
  assert _passed(measure, **{measure: (ours, theirs)}) == passed


def test_without_samples_only_perplexity_is_told():
  results = _results()
  del results["text_metrics"]
  assert len(targets.check(results)) == 3
