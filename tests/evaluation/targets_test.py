"""The guide's targets: what passes, what misses, and by which number."""

import math

import pytest

from mdm_jax.evaluation import targets
from mdm_jax.objectives.measured import (
  BITS,
  PERPLEXITY,
  SCORE,
  Measured,
  Value,
)

BOUND = {
  "ppl_bound": Value(40.0, "perplexity", role=PERPLEXITY, bound=True),
  "bits_per_byte": Value(1.9, "bits", role=BITS, bound=True),
  "score": Value(1.0, "CE somewhere", role=SCORE),
}


def _results(**changed):
  """Results whose text metrics are (ours, the text's, its standard error)."""
  text = {
    "seq_rep_2": (0.05, 0.04, 0.005),
    "seq_rep_3": (0.01, 0.01, 0.005),
    "seq_rep_4": (0.0, 0.0, 0.0),
    "grade": (9.0, 12.0, 0.5),
    "unique_starts@1": (0.8, 0.6, 0.06),
  } | changed
  measured = lambda value, stderr: {"value": value, "stderr": stderr, "n": 64}
  return {
    "baselines": {
      "ngram": {"name": "8-grams", "bits_per_byte": 1.5},
      "xz": {"name": "xz", "bits_per_byte": None},
    },
    "text_metrics": {
      "sampling": {name: measured(x, 0.1) for name, (x, _, _) in text.items()},
      "held_out": {n: measured(own, se) for n, (_, own, se) in text.items()},
    },
  }


def _check(results, **values):
  return targets.check(Measured(BOUND | values), results)


def _line(measure, **changed):
  lines = _check(_results(**changed))
  (line,) = [line for line in lines if line.measure == measure]
  return line


def test_three_numbers_are_called_perplexity_and_one_is_judged():
  per_token, per_byte, masked = _check(_results())[:3]
  assert (per_token.value, per_token.passed) == (40.0, False)
  assert per_byte.value == pytest.approx(2**1.9) and per_byte.passed is None
  assert per_byte.meaning == "not judged; 2.83 by 8-grams"  # 2 ** 1.5
  assert masked.value == pytest.approx(math.e) and masked.passed is None
  assert masked.measure == "exp of CE somewhere"
  better = Value(3.9, "perplexity", role=PERPLEXITY, bound=True)
  assert _check(_results(), ppl_bound=better)[0].passed
  assert per_token.meaning == "a bound"
  exact = {"ppl": Value(3.0, "perplexity", role=PERPLEXITY)}
  (line,) = targets.check(Measured(exact), {})
  assert (line.measure, line.meaning, line.passed) == (
    *("ppl per token", "exact"),
    True,
  )


def test_every_target_of_the_guide_is_there():
  names = [t.target for t in _check(_results())]
  assert names == [
    *["perplexity < 4.0"] * 3,
    *["repetition < 10 %"] * 3,
    "grade 8+",
    "unique starts > 0.7",
  ]


@pytest.mark.parametrize(
  "ours, own, stderr, passed",
  [
    (0.05, 0.01, 0.0, True),  # below a tenth, whatever the text has
    (0.10, 0.04, 0.01, False),
    (0.12, 0.10, 0.01, True),  # text itself may miss it
    (0.121, 0.10, 0.01, False),
    (0.12, 0.12, None, True),
    (0.12, None, None, False),
  ],
)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_repetition_is_below_a_tenth_or_near_the_texts(
  n, ours, own, stderr, passed
):
  measure = f"seq_rep_{n}"
  assert _line(measure, **{measure: (ours, own, stderr)}).passed == passed


@pytest.mark.parametrize(
  "ours, own, passed",
  [
    (8.0, 20.0, True),
    (7.9, 7.9, False),
    (26.0, 23.0, True),
    (26.0, 22.9, False),  # run-on sentences
    (None, 5.0, False),
    (9.0, None, None),
    (None, None, None),
  ],
)
def test_the_grade_is_high_but_not_far_above_the_texts(ours, own, passed):
  line = _line("grade", grade=(ours, own, 0.1))
  assert line.passed is passed
  assert ("has no grade" in line.meaning) == (passed is None)


@pytest.mark.parametrize(
  "ours, own, passed",
  [
    (0.71, 1.0, True),
    (0.7, 0.9, False),
    (0.45, 0.5, True),
    (0.4, 0.5, False),
    (0.5, None, False),
  ],
)
def test_starts_are_unique_or_as_the_texts(ours, own, passed):
  measure = "unique_starts@1"
  assert _line(measure, **{measure: (ours, own, 0.1)}).passed == passed


def test_without_samples_only_perplexity_is_reported():
  results = _results()
  del results["text_metrics"]
  assert len(_check(results)) == 3


def test_tuned_samples_are_judged_beside_the_runs_own():
  results = _results(seq_rep_2=(0.4, 0.04, 0.005))
  text = results["text_metrics"]
  text["tuned"] = text["sampling"] | {"seq_rep_2": {"value": 0.02}}
  lines = [t for t in _check(results) if t.measure == "seq_rep_2"]
  assert [(t.texts, t.passed) for t in lines] == [
    ("sampling", False),
    ("tuned", True),
  ]
  assert {t.texts for t in _check(_results())} == {"", "sampling"}
