"""Bits a byte of n-grams and xz, on the bytes that the model is measured on."""

import math
import random

import pytest

from mdm_jax.config import Config
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import StageConfig, TokenizerConfig
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.evaluation import baselines
from mdm_jax.evaluation.judge import NgramJudge, nll_per_byte

BYTE = TokenizerConfig(kind="byte")
BYTES = tokenizers.build(BYTE, [])


def _texts(count, seed):
  draw = random.Random(seed)
  words = "we the people of these states do hope for peace".split()
  return [" ".join(draw.choices(words, k=200)) + "." for _ in range(count)]


def _measure(train, test):
  config = Config(tokenizer=BYTE, stages=(StageConfig(length=64),))
  held, _ = make_held_out(test, config.rows, BYTES)
  return baselines.baselines(train, held, BYTES, NgramJudge(train))


def test_the_bytes_are_those_of_the_documents_in_their_order():
  train, test = _texts(8, 0), _texts(3, 1)
  found = _measure(train, test)
  judged = nll_per_byte(NgramJudge(train), test)
  ngram = found["ngram"]
  assert ngram["bits_per_byte"] == pytest.approx(judged.value / math.log(2))
  assert ngram["stderr"] == pytest.approx(judged.stderr / math.log(2))
  size = sum(len(text.encode()) for text in test)
  assert ngram["bytes"] == found["xz"]["bytes"] == size


def test_xz_is_given_the_training_text():
  test = _texts(3, 1)
  found = _measure(test, test)["xz"]
  assert found["name"] == "xz, given the training text"
  assert found["bits_per_byte"] < 0.1  # it has seen it
  assert 1 < _measure(_texts(8, 0), test)["xz"]["bits_per_byte"] < 3


def test_of_a_long_training_text_the_last_part_is_taken(monkeypatch):
  monkeypatch.setattr(baselines, "_MOST_TRAIN", 2000)
  monkeypatch.setattr(baselines, "_MOST_TEST", 1500)
  test = _texts(3, 1)
  found = _measure([*_texts(8, 0), *test[:2]], test)["xz"]
  assert found["name"].endswith("training text (0.0 of 0.0 MB)")
  assert found["bytes"] == len(test[0].encode())  # whole documents


def test_one_document_has_no_error():
  found = _measure(_texts(2, 0), _texts(1, 1))
  assert math.isnan(found["ngram"]["stderr"])
  assert found["xz"]["stderr"] is None
