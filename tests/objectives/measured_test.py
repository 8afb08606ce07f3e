"""Measured values carry their titles, in JSON and for plots."""

import json
import math

import pytest

from mdm_jax.core import strict_json
from mdm_jax.core.errors import UserError
from mdm_jax.objectives import measured
from mdm_jax.objectives.measured import (
  BITS,
  PERPLEXITY,
  Curve,
  Measured,
  Value,
  likelihood,
)


def _likelihood(exact=False):
  return likelihood(
    *("nelbo", "NELBO"),
    total_nats=8 * math.log(2),
    tokens=16,
    num_bytes=4,
    stderr=0.05,
    exact=exact,
  )


def _measured():
  curve = Curve((0.5, 1.0), (3.0, math.nan), "A curve", form=".2f")
  values = {"score/a": Value(1.5, "A score", "apples", role="score")}
  return Measured(_likelihood() | values, {"f": curve}, "nelbo_per_token")


def test_a_likelihood_is_reported_per_token_per_byte_and_as_a_perplexity():
  found = _likelihood()
  assert list(found) == ["nelbo_per_token", "ppl_bound", "bits_per_byte"]
  nats = 8 * math.log(2) / 16
  assert found["nelbo_per_token"].value == pytest.approx(nats)
  assert found["ppl_bound"].value == pytest.approx(math.exp(nats))
  assert found["bits_per_byte"].value == pytest.approx(2)
  # A function of the nats has the nats' relative error, to first order.
  assert found["bits_per_byte"].error == pytest.approx(2 * 0.05 / nats)
  assert found["ppl_bound"].bound and found["bits_per_byte"].bound


def test_an_exact_likelihood_is_no_bound():
  found = Measured(_likelihood(exact=True))
  assert list(found.values) == ["nelbo_per_token", "ppl", "bits_per_byte"]
  for role in (PERPLEXITY, BITS):
    assert not any(v.bound for v in found.with_role(role).values())


def test_what_is_written_is_read_again():
  plain = measured.to_json(_measured())
  assert plain["nelbo_stderr"] == 0.05
  assert plain["score"] == {"a": 1.5}
  assert list(plain["f"]) == ["0.50", "1.00"]
  text = json.dumps(strict_json.plain(plain), allow_nan=False)
  read, before = measured.from_json(json.loads(text)), _measured()
  # nan is not equal to itself, but its words are.
  assert repr(read.values) == repr(before.values)
  assert repr(read.curves) == repr(before.curves)
  assert repr(read.head()) == repr(before.head())


def test_an_older_file_is_refused_in_a_line():
  with pytest.raises(UserError, match="--mode=eval") as error:
    measured.from_json({"nelbo_per_token": 1.0})
  assert "\n" not in str(error.value)
  assert measured.curve_in({"f": {"1": 1.0}}, "any", "test") is None
  assert measured.curve_in(None, "any", "test") is None


def test_an_evaluation_names_its_headline():
  plain = measured.evaluation(_measured())
  assert plain["headline"] == {
    "name": "nelbo_per_token",
    "value": plain["nelbo_per_token"],
    "lower_is_better": True,
  }
