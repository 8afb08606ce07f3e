"""Runs lm-evaluation-harness on a trained model.

  pip install -e '.[lm-eval]'
  python -m mdm_jax.lm_eval --model mdm_jax --model_args workdir=W --tasks T

The command line is the harness's own; this module adds the model `mdm_jax` to
those that it knows. The harness (0.4.13) finds no models of other packages by
itself, so `lm_eval --model mdm_jax` does not work.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import command_line, sample
from mdm_jax.core import modules
from mdm_jax.core.errors import Failure, UserError
from mdm_jax.core.progress import console
from mdm_jax.sample import Model
from mdm_jax.sampling import template
from mdm_jax.sampling.chain_calls import row_length

_AUTO = "auto"
_MOST_GENERATED = 256  # tokens, if a task does not say; as in the harness
# What of a task's generation arguments is followed.
_FOLLOWED = {"until", "max_gen_toks", "do_sample", "temperature"}


class Harness:
  """Answers the harness's requests with a trained model.

  Requests are objects with `args`, `task_name` and `doc_id`, as the harness's
  `Instance`.
  """

  def __init__(
    self,
    model: Model,
    likelihood: str = _AUTO,
    exact_tokens: int = 16,
    draws: int = 128,
    **sampling: Any,
  ):
    """Checks the settings.

    Args:
      model: the trained model.
      likelihood: as in `Model.score`; "auto" for the chain rule from left to
        right if all answers to a question have at most `exact_tokens` tokens,
        else the bound.
      exact_tokens: see `likelihood`.
      draws: random mask rates per text of the bound.
      **sampling: fields of `SampleConfig` that differ from the run's.

    Raises:
      UserError: a setting is invalid.
    """
    self._model, self._sampling = model, sampling
    self._likelihood, self._most_exact = likelihood, exact_tokens
    self._draws = draws
    self._longest = model.config.stages[-1].length
    self._said: set[str] = set()
    model.settings(**sampling)

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Returns log p(continuation | context) of each request, and False.

    The second value would say whether the continuation is the greedy one, which
    is not computed.
    """
    self._say(
      "no continuation is reported as greedy, so metrics that count greedy ones"
      " (lambada's acc) are 0"
    )
    found = [(0.0, False)] * len(requests)
    by_method: dict[str, list[int]] = {}
    methods = self._methods(requests)
    for i, request in enumerate(requests):
      # An empty continuation is certain.
      if request.args[1]:
        by_method.setdefault(methods[i], []).append(i)
    for method, index in by_method.items():
      texts = [requests[i].args[1] for i in index]
      given = self._cut([requests[i].args for i in index])
      scores = self._model.score(texts, given, method, self._draws)
      for i, nats in zip(index, scores.nats.tolist(), strict=True):
        found[i] = -nats, False
      kind = "upper bounds on -log p" if scores.bound else "exact"
      console.print(
        f"mdm_jax: {len(index):,} continuations by likelihood={method}, {kind};"
        f" mean standard error {np.mean(scores.errors):.3g} nats",
        soft_wrap=True,
      )
    return found

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Returns log p of each whole text with its end, cut into rows."""
    texts = [request.args[0] for request in requests]
    index = [i for i, text in enumerate(texts) if text]
    # Whole texts are long, so "auto" is the bound.
    method = "nelbo" if self._likelihood == _AUTO else self._likelihood
    scores = self._model.score(
      [texts[i] for i in index], likelihood=method, draws=self._draws
    )
    found = [0.0] * len(texts)
    for i, nats in zip(index, scores.nats.tolist(), strict=True):
      found[i] = -nats
    return found

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Returns a continuation of each context, cut at the first stop text.

    Rows have few lengths, so that few programs are compiled. Where a task does
    not sample, the most likely token is drawn at every position.
    """
    contexts, wanted = zip(*(r.args for r in requests), strict=True)
    counts = [self._generated(each) for each in wanted]
    rooms = [self._longest - count for count in counts]
    contexts = self._cut([(context, "") for context in contexts], rooms)
    groups: dict[Any, list[int]] = {}
    prompts, given = [], []
    for i, (context, count) in enumerate(zip(contexts, counts, strict=True)):
      # Backslashes in front of a hole stand for half as many.
      slashes = context[len(context.rstrip("\\")) :]
      prompts.append(f"{context}{slashes}[MASK:{count}]")
      row = template.parse(prompts[-1], self._model.tokenizer)
      given.append(self._model.tokenizer.decode(row.tokens[~row.free]))
      length = row_length(len(row.tokens), self._longest)
      key = length, *_settings(wanted[i]).items()
      groups.setdefault(key, []).append(i)
    found = [""] * len(requests)
    for (length, *settings), index in groups.items():
      drawn = self._model.generate(
        [prompts[i] for i in index],
        length=length,
        **dict(settings) | self._sampling,
      )
      for i, text in zip(index, drawn.texts, strict=True):
        stops = wanted[i].get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        found[i] = _until(text[len(given[i]) :], stops)
    return found

  def _methods(self, requests: Sequence[Any]) -> list[str]:
    """Returns the likelihood by which each continuation is scored."""
    if self._likelihood != _AUTO:
      return [self._likelihood] * len(requests)
    # One method for all answers to a question: a bound is above the exact
    # value, so an answer that got one would lose against the others.
    of = [(request.task_name, request.doc_id) for request in requests]
    encode = self._model.tokenizer.encode
    most: dict[Any, int] = {}
    for question, request in zip(of, requests, strict=True):
      size = len(encode(request.args[1]))
      most[question] = max(most.get(question, 0), size)
    exact = lambda question: most[question] <= self._most_exact
    return ["chain" if exact(question) else "nelbo" for question in of]

  def _cut(
    self, pairs: Sequence[tuple[str, str]], rooms: Sequence[int] | None = None
  ) -> list[str]:
    """Returns contexts as templates, cut on the left where they don't fit.

    Args:
      pairs: contexts and continuations.
      rooms: tokens for both of each pair (None: a row).
    """
    tokenizer, found, cut = self._model.tokenizer, [], 0
    rooms = [self._longest] * len(pairs) if rooms is None else rooms
    for (context, text), room in zip(pairs, rooms, strict=True):
      given = template.escape(context)
      whole = template.filled(given, text, tokenizer)
      if whole.free.sum() > room:
        raise UserError(
          f"a continuation has {whole.free.sum()} tokens, and a row has {room}"
        )
      cut += len(whole.tokens) > room
      ids = whole.tokens[~whole.free]
      # Again if the rest of the text is divided into more tokens.
      while (over := len(whole.tokens) - room) > 0:
        ids = ids[over:]
        # A character of several bytes may be cut: its rest is left out.
        given = template.escape(tokenizer.decode(ids).lstrip("\ufffd"))
        whole = template.filled(given, text, tokenizer)
      found.append(given)
    if cut:
      console.print(
        f"mdm_jax: {cut:,} of {len(found):,} contexts are cut on the left to"
        f" fit into rows of {self._longest} tokens",
        soft_wrap=True,
      )
    return found

  def _generated(self, wanted: Mapping[str, Any]) -> int:
    """Returns how many tokens to draw; says what of a request is not used."""
    unused = sorted(wanted.keys() - _FOLLOWED)
    if unused:
      self._say(f"generation arguments that have no effect: {unused}")
    count = int(wanted.get("max_gen_toks", _MOST_GENERATED))
    # At least half of a row is left to the context.
    most = self._longest // 2
    if count > most:
      self._say(f"{most} tokens are drawn, not {count}: half of a row")
    return min(count, most)

  def _say(self, text: str) -> None:
    if text not in self._said:
      self._said.add(text)
      console.print(f"mdm_jax: {text}", soft_wrap=True)


def _settings(wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the sampling settings of a task's generation arguments."""
  temperature = float(wanted.get("temperature") or 0)
  if not wanted.get("do_sample") or not temperature:
    return {"top_k": 1}
  return {"temperature": temperature, "temperature_range": None}


def _until(text: str, stops: Sequence[str]) -> str:
  ends = [text.find(stop) for stop in stops if stop]
  return text[: min((end for end in ends if end >= 0), default=len(text))]


def register() -> None:
  """Adds the model `mdm_jax` to the harness.

  Raises:
    UserError: the harness is not installed.
  """
  modules.need("lm_eval", "lm-eval", "mdm_jax.lm_eval")
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model

  @register_model("mdm_jax")
  class _Model(Harness, LM):
    def __init__(
      self,
      workdir: str,
      batch_size: Any = None,
      max_batch_size: Any = None,
      device: Any = None,
      **settings: Any,
    ):
      """Loads a run's best checkpoint.

      Args:
        workdir: the run's folder.
        batch_size: not read, calls have the library's size.
        max_batch_size: not read.
        device: not read, JAX's devices are used.
        **settings: see `Harness`.
      """
      LM.__init__(self)
      Harness.__init__(self, sample.load(workdir), **settings)


def main() -> int:
  """Runs the harness's command line; returns the exit code."""
  try:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
  except Failure as error:
    return command_line.fail(error)
  return 0


if __name__ == "__main__":
  sys.exit(main())
