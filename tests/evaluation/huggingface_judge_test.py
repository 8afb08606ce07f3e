"""A judge of hf:FOLDER gives the likelihood of the model, written out."""

import json
import math

import huggingface_harness as harness
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import MeshConfig
from mdm_jax.evaluation import huggingface_judge
from mdm_jax.evaluation.huggingface_judge import HuggingFaceJudge
from mdm_jax.evaluation.judge import make_judge

LIMIT = 16
SMALL = {"max_position_embeddings": LIMIT}
SHORT = "the cat sat"
LONG = "the cat sat on the mat \u2603 and 12 dogs. " * 2
END = 256


def _conditional(tensors, context, token):
  """Returns the nats of a token after a context."""
  logits = harness.logits({}, tensors, np.array(context))[-1]
  return np.logaddexp.reduce(logits) - logits[token]


def _by_hand(tensors, text, start=(END,)):
  """Returns a text's nats, where windows overlap by half."""
  ids, total = [*start, *harness.tokenizer().encode(text).ids], 0.0
  for i in range(1, len(ids)):
    # The first LIMIT tokens from the start, then LIMIT / 2 a window.
    block = max(-(-(i - LIMIT) // (LIMIT // 2)), 0)
    end = min(LIMIT + block * LIMIT // 2, len(ids) - 1)
    total += _conditional(tensors, ids[max(end - LIMIT, 0) : i], ids[i])
  return total


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_text_costs_what_the_model_says(tmp_path, tensor):
  """In few or many windows, whatever texts are beside it."""
  tensors = harness.save(tmp_path, SMALL)
  mesh = MeshConfig(fsdp=-1, tensor=tensor)
  with console.capture() as said:
    judge = make_judge(f"hf:{tmp_path}", [], mesh)
  assert f"hf:{tmp_path}: 13,520 parameters, 0.00 GiB on each" in said.get()
  texts = [SHORT, "", LONG, *"a ca", SHORT]
  wanted = [_by_hand(tensors, text) for text in texts]
  np.testing.assert_allclose(judge.nats_of(texts), wanted, rtol=1e-5)
  assert wanted[2] > 3 * LIMIT and wanted[1] == 0
  assert judge.name == f"hf:{tmp_path}"


def test_the_begin_id_stands_before_a_text(tmp_path):
  tensors = harness.save(tmp_path, SMALL | {"bos_token_id": 7})
  judge = HuggingFaceJudge(f"hf:{tmp_path}")
  wanted = _by_hand(tensors, "the cat", [7])
  assert judge.nats_of(["the cat"]) == pytest.approx(wanted, rel=1e-5)


def test_without_either_the_first_token_costs_the_vocabulary(tmp_path):
  tensors = harness.save(tmp_path, SMALL | {"eos_token_id": None})
  judge = HuggingFaceJudge(f"hf:{tmp_path}")
  first = math.log(harness.ROWS)
  wanted = [first + _by_hand(tensors, SHORT, []), first, 0]
  found = judge.nats_of([SHORT, "t", ""])
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@given(st.integers(0, 300), st.integers(1, 40))
def test_windows_overlap_by_half(length, limit):
  seen = []
  for start, new, end in huggingface_judge._windows(length, limit):
    assert 0 <= start <= new < end <= length
    assert end - start <= limit
    assert start == 0 or new - start >= limit - max(limit // 2, 1)
    seen += range(new, end)
  assert seen == list(range(length))


def test_rows_that_only_split_a_vocabulary_are_never_predicted():
  whole, split = (huggingface_judge._vocabulary(7, n) for n in (1, 4))
  assert (whole.size, whole.predictable) == (7, 7)
  assert (split.size, split.predictable) == (8, 7)


def _lossy(folder):
  path = folder / "tokenizer.json"
  fields = json.loads(path.read_text())
  fields["model"]["vocab"] = {"t": 0, "h": 1, "th": 2, "<end>": 3}
  fields["added_tokens"][0]["id"] = 3
  path.write_text(json.dumps(fields))


UNUSABLE = {
  "not causal": ({"is_causal": False}, None, "is not causal"),
  "family": ({"model_type": "gpt2"}, None, "gpt2.*valid: Dream"),
  "tokenizer": (
    {},
    lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer.json",
  ),
  "lossy": ({"eos_token_id": 3}, _lossy, "loses text"),
  "folder": (
    {},
    lambda folder: (folder / "config.json").unlink(),
    "no config.json",
  ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_folder_that_can_not_judge_is_refused_before_its_weights(
  tmp_path, kind
):
  config, damage, why = UNUSABLE[kind]
  harness.save(tmp_path, config, {})
  if damage:
    damage(tmp_path)
  with pytest.raises(UserError, match=f"eval.judge.*{why}") as error:
    huggingface_judge.check(f"hf:{tmp_path}")
  assert "\n" not in str(error.value)


def test_a_judge_is_named_by_where_it_is():
  huggingface_judge.check("")
  with pytest.raises(UserError, match="'gpt' must be hf:FOLDER.*'hf:gpt'"):
    huggingface_judge.check("gpt")
