"""Answers to held-out prompts: what is asked, and how they are compared."""

import numpy as np
import pytest

from mdm_jax import sampled_answers
from mdm_jax.core.errors import UserError
from mdm_jax.data import answers, tasks
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import (
  DataConfig,
  RowsConfig,
  StageConfig,
  TokenizerConfig,
)
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.sampling.samples import Samples
from mdm_jax.studies import answered

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
VOCAB = BYTES.vocab
LENGTH = 12


def asked(*pairs, answer_length=None):
  texts = [answers.exchange(*pair) for pair in pairs]
  config = RowsConfig(
    data=DataConfig(answer_length=answer_length),
    stages=(StageConfig(unit="conversations", length=LENGTH),),
  )
  held, _ = make_held_out(texts, config, BYTES, asked="answers")
  return sampled_answers.questions(held, 9)


def drawn(*rows):
  path = np.full((1, len(rows), LENGTH), VOCAB.pad)
  for i, row in enumerate(rows):
    path[0, i, : len(row)] = row
  zeros, calls = np.zeros((len(rows), LENGTH)), np.arange(len(rows))
  return Samples(
    path=path,
    texts=[""] * len(rows),
    step=zeros.astype(int),
    confidence=zeros,
    entropy=zeros,
    calls=calls,
    put_back=calls,
  )


def test_an_answers_tokens_are_free_and_no_others():
  rows = sampled_answers.canvas(
    asked(("2+3=", "5"), ("9+9=", "18")), LENGTH, VOCAB, open_end=False
  )
  assert rows.free.sum(axis=1).tolist() == [3, 2]
  assert rows.lengths.tolist() == [7, 6]
  assert not rows.free[:, :4].any()
  assert (rows.tokens[1, 6:] == VOCAB.pad).all()


def test_filled_up_answers_have_an_untold_length():
  rows = sampled_answers.canvas(
    asked(("2+3=", "5"), ("9+9=", "18"), answer_length=4),
    *(LENGTH, VOCAB),
    open_end=False,
  )
  assert rows.free.sum(axis=1).tolist() == [4, 4]


def test_a_model_from_left_to_right_has_the_rest_of_the_row():
  rows = sampled_answers.canvas(
    asked(("2+3=", "5")), LENGTH, VOCAB, open_end=True
  )
  assert rows.free.sum() == LENGTH - 4 and rows.lengths.tolist() == [LENGTH]
  with pytest.raises(UserError, match=r"sample\.length=5"):
    sampled_answers.canvas(asked(("2+3=", "5")), 5, VOCAB, open_end=True)


def test_answers_are_compared_up_to_their_end():
  questions = asked(("9+9=", "18"), ("2+3=", "5"), ("1+3=", "4"))
  end = VOCAB.end
  samples = drawn(
    [*b"9+9=18", end],  # right
    [*b"1+3=44", end],  # too long
    [*b"2+3=", end, *b"5"],  # empty
  )
  # In the rows' order, the questions are not those of the texts.
  order = [bytes(q.prompt.tolist()) for q in questions]
  rows = {bytes(r[:4].tolist()): r for r in samples.path[0]}
  samples = drawn(*(rows[prompt].tolist() for prompt in order))
  found = sampled_answers.compare(
    questions, samples, BYTES, tasks.TASKS["addition"]
  )
  by_prompt = dict(zip(found.prompts, found.drawn, strict=True))
  assert by_prompt == {"9+9=": "18", "1+3=": "44", "2+3=": ""}
  metrics = found.metrics()
  assert metrics["exact"].value == metrics["right"].value == 1 / 3
  assert metrics["exact"].n == 3
  assert metrics["true_length"].value == pytest.approx((3 + 2 + 2) / 3)
  assert metrics["length"].value == pytest.approx((3 + 3 + 1) / 3)
  assert "true: 18" in found.shown(3)[order.index(b"9+9=")]


def test_ways_to_answer_have_at_most_a_step_per_token():
  ways = answered.ways(17)
  assert max(w.get("num_steps", 0) for w in ways.values()) == 17
  assert {"confidence, 9 steps", "entropy, entropy bound 1"} < ways.keys()


def test_what_is_behind_an_answer_is_given_and_no_part_of_it():
  ids = lambda text: np.array([*text], np.int32)
  one = sampled_answers.Question(ids(b"a"), ids(b"bc"), ids(b"de"))
  rows = sampled_answers.canvas([one], LENGTH, VOCAB, open_end=False)
  assert rows.free[0, :5].tolist() == [False, True, True, False, False]
  assert rows.tokens[0, 3:5].tolist() == [*b"de"] and rows.lengths[0] == 5
  found = sampled_answers.compare([one], drawn([*b"axyde"]), BYTES)
  assert (found.drawn, found.true, found.lengths) == (["xy"], ["bc"], [2])
