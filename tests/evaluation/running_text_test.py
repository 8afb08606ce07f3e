"""The held-out text and metrics beside which samples are measured."""

import functools
import itertools

import numpy as np
import pytest

from mdm_jax.config import Config
from mdm_jax.core.standard_errors import Estimate
from mdm_jax.data import ngrams
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.evaluation import running_text, text_metrics
from mdm_jax.evaluation.judge import NgramJudge
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.tokens import effective_temperature

BYTE = TokenizerConfig(kind="byte")
BYTES = tokenizers.build(BYTE, [])


def test_untruncated_is_the_models_own_distribution():
  plain = SampleConfig(temperature=0.5, min_p=0.1, seed=3).untruncated()
  assert effective_temperature(plain) == 1.0
  assert plain.top_k is plain.min_p is plain.top_p is None
  assert plain.seed == 3 and plain.num_steps == SampleConfig().num_steps


def _hold(documents, length):
  """Documents of letters, in pieces that end with their sentences."""
  stage = StageConfig(length=length)
  config = Config(tokenizer=BYTE, stages=(stage,))
  return make_held_out(documents, config.rows, BYTES)[0]


def _book(letter, sentences=40):
  words = (f"{i:02} {'abcdef'[: i % 6]}" for i in range(sentences))
  return " ".join(f"{letter} {word} so." for word in words)


@pytest.mark.parametrize("length", [17, 32, 48])
def test_found_A6_reference_texts_run_on_for_exactly_so_many_tokens(length):
  books = [_book("A"), _book("B"), _book("C", 90)]
  held = _hold(books, 32)
  found = running_text.running_texts(held, BYTES, 8, length)
  assert [len(text.encode()) for text in found.texts] == [length] * 8
  starts = []
  for text, document in zip(found.texts, found.documents, strict=True):
    assert text in books[document]  # as it stands there, in one piece
    assert text.lstrip()[:2] in ("A ", "B ", "C ")
    starts.append((document, books[document].index(text)))
  assert starts == sorted(starts) and set(found.documents) == {0, 1, 2}
  for (a, at), (b, then) in itertools.pairwise(starts):
    assert a < b or then >= at + length, "they overlap"
  assert found.description == f"8 texts of {length} tokens from 3 documents"
  most = running_text.count_within_documents(held, length)
  every = running_text.running_texts(held, BYTES, most, length)
  assert len(every.texts) == most and "joined" not in every.description
  more = running_text.running_texts(held, BYTES, most + 1, length)
  assert "joined" in more.description or "not enough" in more.description
  pieces = [held.rows.segments == s for s in range(1, 3)]
  sizes = np.concatenate([p.sum(axis=1) for p in pieces])
  assert 0 < np.median(sizes[sizes > 0]) < 32  # a piece alone is shorter


def test_too_little_held_out_text_is_reported():
  found = running_text.running_texts(_hold([_book("A", 8)], 32), BYTES, 8, 32)
  assert 0 < len(found.texts) < 8
  assert found.description.endswith("from 1 documents; not enough text for 8")
  none = running_text.running_texts(_hold(["Ab."], 32), BYTES, 8, 32)
  assert none.texts == [] and none.description.startswith("0 texts")
  text = "We are one."
  measured = text_metrics.measure(
    [], [], judge=NgramJudge([text]), copies=ngrams.of([text])
  )
  assert all(m.value != m.value for m in measured.values())


def test_short_documents_are_joined():
  names = [f"Name {i:02}" for i in range(40)]
  found = running_text.running_texts(_hold(names, 16), BYTES, 4, 24)
  assert (
    len(found.texts) == 4
    and "joined because they are short" in found.description
  )
  assert found.texts[0] == "Name 00\nName 01\nName 02"


def test_all_measures_of_a_text_are_there():
  text = "We are one people. We have one purpose. And we shall go on."
  given = {"judge": NgramJudge([text * 3]), "copies": ngrams.of([text * 3])}
  measure = functools.partial(text_metrics.measure, **given)
  copied, other = measure([text] * 2), measure(["Zq xv jw kp qy bz vf hj"] * 2)
  assert set(copied) == set(other)
  assert copied["copied_8gram"].value == 1 and other["copied_8gram"].value == 0
  assert copied["judge_nll"].value < other["judge_nll"].value
  assert copied["grade"].value == copied["grade"].value  # three sentences


def test_metrics_as_json_have_titles():
  found = text_metrics.as_json({"judge_nll": Estimate(0.5, 0.1, 4)})
  told = {"title": "judge, nats per byte", "value": 0.5}
  assert found == {"judge_nll": told | {"stderr": 0.1, "n": 4}}
