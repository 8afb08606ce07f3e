"""What samples are measured beside, and with what settings they are drawn."""

import numpy as np
import pytest

from mdm_jax.core.config import SampleConfig, TokenizerConfig
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.packing import Rows
from mdm_jax.evaluation import samples
from mdm_jax.evaluation.judge import NgramJudge
from mdm_jax.evaluation.text_metrics import Measured
from mdm_jax.sampling.tokens import effective_temperature

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])


def test_untruncated_is_the_models_own_distribution():
  plain = samples.untruncated(SampleConfig(temperature=0.5, min_p=0.1, seed=3))
  assert effective_temperature(plain) == 1.0
  assert plain.top_k is plain.min_p is plain.top_p is None
  assert plain.seed == 3 and plain.num_steps == SampleConfig().num_steps


def test_reference_texts_are_first_texts_of_rows_cut_to_length():
  vocab = BYTES.vocab
  tokens = np.array([list(b"abcdXY"), [*b"ab", vocab.eos, *b"XYZ"]])
  rows = Rows(tokens, np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2]]))
  assert samples.reference_texts(rows, BYTES, 2, 6) == ["abcd", "ab"]
  assert samples.reference_texts(rows, BYTES, 2, 3) == ["abc", "ab"]
  assert samples.reference_texts(rows, BYTES, 1, 6) == ["abcd"]


def test_all_measures_of_a_text_are_there():
  text = "We are one people. We have one purpose. And we shall go on."
  measure = samples.TextMeasures(NgramJudge([text * 3]), [text * 3])
  copied, other = measure([text] * 2), measure(["Zq xv jw kp qy bz vf hj"] * 2)
  assert set(copied) == set(other)
  assert copied["copied_8gram"].value == 1 and other["copied_8gram"].value == 0
  assert copied["judge_nll"].value < other["judge_nll"].value
  assert copied["grade"].value == copied["grade"].value  # three sentences


@pytest.mark.parametrize("value, plain", [(0.5, 0.5), (float("nan"), None)])
def test_plain_values_are_json(value, plain):
  found = samples.as_plain({"x": Measured(value, 0.1, 4)})
  assert found == {"x": {"value": plain, "stderr": 0.1, "n": 4}}
