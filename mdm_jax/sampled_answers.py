"""Draws answers to held-out prompts, and compares them with the true ones."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.core.standard_errors import Estimate, mean
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import answers, splits, tasks
from mdm_jax.data.config import DataConfig
from mdm_jax.data.held_out import HeldOut
from mdm_jax.data.prepared import PreparedData
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.model.denoiser import Params
from mdm_jax.objectives.base import Decoding
from mdm_jax.objectives.measured import Curve
from mdm_jax.sampled_texts import SampledTexts
from mdm_jax.sampling.call import Canvas
from mdm_jax.sampling.config import SampleConfig
from mdm_jax.sampling.generate import effective
from mdm_jax.sampling.samplers import SAMPLERS
from mdm_jax.sampling.samples import Samples

Ids = Int[np.ndarray, "_"]
TITLES = {
  "right": "solve the task",
  "exact": "equal to the true answer",
  "length": "tokens of an answer, with its end",
  "true_length": "tokens of a true answer",
  "same_length": "as long as the true answer",
}


@dataclasses.dataclass(frozen=True)
class Question:
  """A held-out prompt and its answer: the last one of a text.

  Attributes:
    prompt: ids before the answer.
    answer: ids of the true answer, with the ends that fill it up.
    rest: ids behind it.
  """

  prompt: Ids
  answer: Ids
  rest: Ids


def questions(held: HeldOut, count: int) -> list[Question]:
  """Returns up to `count` questions, spread evenly over held-out texts."""
  found = answers.last_answers(held.rows)
  picked = np.linspace(0, len(found) - 1, min(count, len(found)))
  result = []
  for row, start, first, past, end in (found[int(i)] for i in picked.round()):
    ids = np.asarray(held.rows.tokens[row]).astype(np.int32)
    parts = ids[start:first], ids[first:past], ids[past:end]
    result.append(Question(*parts))
  return result


def row_length(config: Config, data: PreparedData, open_end: bool) -> int:
  """Returns the tokens of a row to draw an answer in.

  Held-out texts are packed into rows; alone, they need shorter ones.

  Args:
    config: `sample.length` comes first.
    data: the held-out texts.
    open_end: whether answers may be longer than the true ones.
  """
  if config.sample.length or open_end:
    return config.sample_length
  held = data.validation.rows, data.test.rows
  found = [text for rows in held for text in answers.last_answers(rows)]
  return max((end - start for _, start, *_, end in found), default=1)


def canvas(
  asked: list[Question], length: int, vocab: Vocabulary, open_end: bool
) -> Canvas:
  """Returns a row for each question, whose answer is to be drawn.

  Args:
    asked: the questions.
    length: tokens per row.
    vocab: the special ids.
    open_end: whether the rest of the row is free, for models that draw from
      left to right; else as many tokens as the true answer has, filled up.

  Raises:
    UserError: a question is longer than a row.
  """
  shape = len(asked), length
  tokens = np.full(shape, vocab.need("pad"), np.int32)
  free, lengths = np.zeros(shape, bool), np.zeros(len(asked), np.int32)
  for row, one in enumerate(asked):
    first = len(one.prompt)
    past = length if open_end else first + len(one.answer)
    ids = one.prompt if open_end else np.concatenate(dataclasses.astuple(one))
    if max(len(ids), first + len(one.answer)) > length:
      raise UserError(
        f"sample.length={length} is too short for a held-out text of"
        f" {len(ids)} tokens; leave it at None"
      )
    tokens[row, : len(ids)] = ids
    free[row, first:past], lengths[row] = True, max(past, len(ids))
  return Canvas(tokens, free, lengths)


@dataclasses.dataclass(frozen=True)
class Answered:
  """Answers that were drawn, beside the true ones.

  Attributes:
    prompts: as text, with [MASK] where text follows the answer.
    drawn: the answers, up to their end.
    true: the true answers.
    lengths: tokens of each drawn answer, with its end.
    true_lengths: the same, of the true answers.
    calls: denoiser calls of each answer.
    right: which answers solve the task; None if the corpus is no task.
  """

  prompts: list[str]
  drawn: list[str]
  true: list[str]
  lengths: list[int]
  true_lengths: list[int]
  calls: list[int]
  right: list[bool] | None = None

  def metrics(self) -> dict[str, Estimate]:
    """Returns the means over all prompts, with standard errors."""
    both = zip(self.drawn, self.true, strict=True)
    lengths = list(zip(self.lengths, self.true_lengths, strict=True))
    found = {} if self.right is None else {"right": mean(self.right)}
    return found | {
      "exact": mean([a == b for a, b in both]),
      "length": mean(self.lengths),
      "true_length": mean(self.true_lengths),
      "same_length": mean([a == b for a, b in lengths]),
    }

  def shown(self, count: int) -> list[str]:
    """Returns some of them as texts: prompt, answer, true answer."""
    every = zip(self.prompts, self.drawn, self.true, strict=True)
    return [
      f"{prompt}\n  answer: {drawn}\n    true: {true}"
      for prompt, drawn, true in list(every)[:count]
    ]


def compare(
  asked: list[Question],
  drawn: Samples,
  tokenizer: Tokenizer,
  task: tasks.Task | None = None,
) -> Answered:
  """Returns the answers in drawn rows, beside the true ones.

  Args:
    asked: the questions.
    drawn: a row for each.
    tokenizer: decodes them.
    task: says which answers are right, if there is one.
  """
  vocab, rows = tokenizer.vocab, drawn.path[-1]
  own = [_until_end(one.answer, vocab) for one in asked]
  got = []
  for one, row in zip(asked, rows, strict=True):
    first = len(one.prompt)
    # Without a rest the row may be open: what was drawn ends by itself.
    past = first + len(one.answer) if len(one.rest) else len(row)
    got.append(_until_end(row[first:past], vocab))
  texts = lambda found: [tokenizer.decode(ids) for ids in found]
  prompts, answered = texts([one.prompt for one in asked]), texts(got)
  behind = texts([one.rest for one in asked])
  prompts = [
    f"{prompt}{tasks.HOLE}{rest}" if rest.strip() else prompt
    for prompt, rest in zip(prompts, behind, strict=True)
  ]
  right = None
  if task:
    right = [*map(task.right, prompts, answered)]
  return Answered(
    prompts=prompts,
    drawn=answered,
    true=texts(own),
    lengths=[len(ids) for ids in got],
    true_lengths=[len(ids) for ids in own],
    calls=drawn.calls.tolist(),
    right=right,
  )


def task_of(data: DataConfig, side: str) -> tasks.Task | None:
  """Returns the task that a split's corpus is, or None."""
  return tasks.of_corpus(getattr(data, f"{side}_corpus") or data.corpus)


def _until_end(ids: Ids, vocab: Vocabulary) -> Ids:
  """Returns ids up to the first end of text, with it, or up to padding.

  Of a hole these are the ones before the blanks that fill it up.
  """
  ids = ids[: int(np.argmax(np.append(ids == vocab.pad, True)))]
  ends = np.flatnonzero(vocab.is_end(ids))
  ids = ids[: ends[0] + 1] if len(ends) else ids
  return ids[: np.max(np.flatnonzero(ids != vocab.separator) + 1, initial=0)]


class SampledAnswers(SampledTexts):
  """Draws answers to held-out prompts with one model's parameters.

  It stands in place of `SampledTexts` for a run whose texts have answers.
  """

  def _length(self, decoding: Decoding) -> int:
    open_end = SAMPLERS[decoding.order].block is not None
    return row_length(self._config, self._data, open_end)

  def sample(self, params: Params) -> Samples:
    """Draws answers to a few validation prompts, while a run trains."""
    settings = self._config.sample
    held, count = self._data.validation, settings.num_samples
    answered, drawn = self.answer(params, settings, held, count)
    return dataclasses.replace(drawn, texts=answered.shown(count))

  def samples(
    self, params: Params, tuned: SampleConfig | None = None
  ) -> dict[str, Any]:
    """Draws answers to test prompts, and measures them.

    Returns:
      Plain values, as `SampledTexts.samples`, with "answers" in place of
      "text_metrics".
    """
    del tuned  # of free text
    config, shown = self._config, self._config.sample.num_samples
    count = max(config.eval.samples, shown)
    answered, drawn = self.answer(params, config.sample, self._data.test, count)
    results = {
      "sampling": effective(config.sample, self.method.unused),
      "samples": answered.shown(shown),
      "unmasking": self._unmasking(drawn),
    }
    if config.eval.samples:
      results["answers"] = {
        name: {"title": TITLES[name], **dataclasses.asdict(found)}
        for name, found in answered.metrics().items()
      }
    return results

  def answer(
    self,
    params: Params,
    settings: SampleConfig,
    held: HeldOut,
    count: int,
    curve: Curve | None = None,
  ) -> tuple[Answered, Samples]:
    """Draws an answer to each of `count` held-out prompts.

    Args:
      params: the averaged parameters.
      settings: how to sample.
      held: the prompts, with their answers.
      count: number of prompts; fewer if there are fewer.
      curve: as in `draw`.

    Raises:
      UserError: there is no prompt, or it doesn't fit.
    """
    asked = questions(held, count)
    if not asked:
      raise UserError(
        "no held-out text has an answer: give more text, or raise"
        " data.eval_fraction and data.test_fraction"
      )
    length, vocab = self._sampler.length, self._data.tokenizer.vocab
    rows = canvas(asked, length, vocab, self.method.block is not None)
    drawn = self._draw(params, rows, settings, curve)
    is_test = held is self._data.test
    side = splits.TEST if is_test else splits.VALIDATION
    task = task_of(self._config.data, side)
    return compare(asked, drawn, self._data.tokenizer, task), drawn
