"""The search for sampling settings, on texts whose quality is a formula."""

import dataclasses
import math

import numpy as np
import pytest

from mdm_jax import config as config_lib
from mdm_jax.core.standard_errors import Estimate
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.studies import search

RUN = SampleConfig(
  num_steps=20,
  order="random",
  temperature=0.2,
  top_k=20,
  top_p=0.85,
  block_length=8,
  seed=5,
)
OWN = {
  "seq_rep_2": 0.05,
  "seq_rep_3": 0.01,
  "seq_rep_4": 0.0,
  "unigram_entropy": 4.0,
  "distinct_2": 0.8,
  "unique_starts@1": 0.5,
  "judge_nll": 1.0,
}
ERRORS = {"unigram_entropy": 0.03, "distinct_2": 0.02, "unique_starts@1": 0.1}


def text():
  return {
    name: Estimate(value, ERRORS.get(name, 0.004), 8)
    for name, value in OWN.items()
  }


def measured(stderr=0.0, **changed):
  return {n: Estimate(v, stderr, 8) for n, v in (OWN | changed).items()}


def test_texts_may_be_worse_than_text_by_its_standard_error():
  own = text()
  for better in ({"seq_rep_2": 0.0}, {"unigram_entropy": 5.0}, {}):
    assert search.beyond(measured(**better), own, 1.0) == 0
  for allowed in ({"seq_rep_2": 0.054}, {"distinct_2": 0.78}):
    assert search.beyond(measured(**allowed), own, 1.0) == pytest.approx(
      0, abs=1e-9
    )
  worse = measured(seq_rep_2=0.07, unigram_entropy=3.88)
  # 0.02 is five errors, 0.12 four; one each is allowed.
  assert search.beyond(worse, own, 1.0) == pytest.approx(4 + 3)
  # The samples' own error counts, too: hypot(0.003, 0.004) = 0.005.
  unsure = measured(0.003, seq_rep_2=0.07)
  assert search.beyond(unsure, own, 1.0) == pytest.approx(0.02 / 0.005 - 1)


def test_an_error_of_the_text_that_is_unknown_or_zero_has_a_floor():
  own = text()
  own["unigram_entropy"] = Estimate(4.0, math.nan, 1)  # one document
  own["seq_rep_4"] = Estimate(0.0, 0.0, 8)
  worse = measured(unigram_entropy=2.8, seq_rep_4=0.006)
  assert search.beyond(worse, own, 1.0) == pytest.approx(2 + 2)


def quality(settings, count, seed):
  """Texts that repeat more the colder they are, and cost a judge when hot.

  `spread` and top-p help the judge; noise falls with the number of texts.
  """
  order = {"spread": 0.0, "random": 0.1}.get(settings.order, 0.3)
  cut = 1 - (settings.top_p or 1.0)
  heat = settings.temperature - 0.4 * cut
  remasked = settings.remasking == "cap"
  noise = np.random.default_rng([seed, count]).normal()
  return measured(
    seq_rep_2=0.05 + 0.5 * max(0.75 - heat, 0) + 0.001 * noise,
    judge_nll=1 + heat + order - cut - 0.05 * remasked,
  )


def run_search(texts=32, has_curve=True, measure=quality):
  plan = search.rounds(RUN, 25, texts, has_curve)
  return plan, search.search(plan, measure, lambda _: text(), seed=7)


def test_the_search_finds_the_best_of_what_it_tries():
  _, found = run_search()
  best = found[-1][0]
  assert best.settings.order == "spread"
  assert best.settings.remasking == "cap"
  assert best.settings.num_steps == 25
  assert best.beyond == 0
  # Of all that meet the criteria none costs the judge less.
  allowed = [t for trials in found for t in trials if t.beyond == 0]
  cheapest = min(t.measured["judge_nll"].value for t in allowed)
  assert best.measured["judge_nll"].value <= cheapest + 0.02
  # Better than the coarse grid alone.
  assert best.rank < found[0][0].rank


def test_the_last_round_allows_less_and_finds_a_weaker_truncation():
  def measure(settings, count, seed):
    cut = 1 - (settings.top_p or 1.0)
    starts = 0.5 - 0.25 * cut
    return measured(**{"judge_nll": 2 - cut, "unique_starts@1": starts})

  plan, found = run_search(measure=measure)
  assert [part.errors for part in plan] == [1.0] * 4 + [0.5]
  before, best = found[-2][0], found[-1][0]
  assert before.beyond == 0 and best.beyond == 0
  # Text has 0.5 +- 0.1, and half an error may be missing: 0.2 may be cut off.
  assert before.settings.top_p < 0.8 <= best.settings.top_p < 0.95


def test_without_any_good_settings_the_closest_are_chosen():
  hopeless = lambda s, *_: measured(seq_rep_2=0.9 - 0.1 * s.temperature)
  _, found = run_search(measure=hopeless)
  best = found[-1][0]
  assert best.beyond > 0
  assert best.settings.temperature == pytest.approx(1.05)


def test_a_rounds_settings_share_a_seed_that_no_other_round_has():
  calls = []

  def measure(settings, count, seed):
    calls.append((settings, count, seed))
    return quality(settings, count, seed)

  plan, found = run_search(measure=measure)
  assert len(calls) == sum(map(len, found))
  for number, part in enumerate(plan):
    tried = [s for s, _, seed in calls if seed == 7 + number]
    assert len(tried) == len(set(tried)) == len(found[number]) > 1
    assert {n for _, n, seed in calls if seed == 7 + number} == {part.texts}
  counts = [part.texts for part in plan]
  assert counts == sorted(counts) and counts[-1] > counts[0]
  # What a round keeps, the next one draws again.
  for before, after, part in zip(found, found[1:], plan, strict=False):
    kept = {trial.settings for trial in before[: part.keep]}
    assert kept <= {trial.settings for trial in after}


def test_all_that_is_tried_is_valid_and_as_an_evaluation_would_draw():
  _, found = run_search()
  settings = [t.settings for trials in found for t in trials]
  for one in settings:
    fields = dataclasses.asdict(one)
    assert config_lib.from_dict({"sample": fields}).sample == one
    assert one.temperature_range is None and one.num_samples == 1
  # The run's own, with the temperature that it is clamped to.
  first = {t.settings for t in found[0]}
  run = [s for s in first if s.top_k == 20]
  assert [(s.temperature, s.top_p, s.block_length) for s in run] == [
    (0.3, 0.85, 8)
  ]
  assert search.plain(RUN, 25) in first
  assert {s.schedule for s in settings} == {"linear", "cosine", "optimal"}


def test_the_optimal_schedule_needs_the_loss_by_mask_rate():
  _, found = run_search(has_curve=False)
  used = {t.settings.schedule for trials in found for t in trials}
  assert used == {"linear", "cosine"}
