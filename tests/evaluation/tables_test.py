"""Tests of the tables on the terminal."""

import pytest

from mdm_jax.core.progress import console
from mdm_jax.evaluation import tables
from mdm_jax.objectives.measured import BITS, Measured, Value

VALUES = {
  "bits": Value(2.0, "bits per byte", role=BITS, bound=True),
  "loss": Value(5.0, "loss by some measure"),
}
RESULTS = {
  "text": {"split": "test", "own": True},
  "baselines": {
    "ngram": {"name": "8-grams", "bits_per_byte": 1.5, "stderr": 0.1},
    "xz": {"name": "xz", "bits_per_byte": 1.9, "stderr": None},
  },
  "targets": [],
  "sampling": {},
  "samples": [],
  **dict.fromkeys(("documents", "rows", "tokens", "bytes", "checkpoint"), 3),
  **dict.fromkeys(("tokens_seen", "wall_seconds"), 2.0),
}


@pytest.mark.parametrize("names", [("bits", "loss"), ("loss",)])
def test_baselines_are_below_the_models_bits_per_byte(names):
  measured = Measured(values={name: VALUES[name] for name in names})
  with console.capture() as capture:
    tables.show(measured, RESULTS)
  lines = [" ".join(line.split()) for line in capture.get().splitlines()]
  expected = ["bits per byte, 8-grams 1.5000 ± 0.1000"]
  expected += ["bits per byte, xz 1.9000"]
  if "bits" in names:
    expected = ["bits per byte <= 2.0000", *expected]
  at = lines.index(expected[0])
  assert lines[at : at + len(expected)] == expected
  loss = lines.index("loss by some measure 5.0000")
  assert (loss > at) == ("bits" in names)
