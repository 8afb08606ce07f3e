"""Scores texts of a caller's own by a trained model's likelihood.

model = mdm_jax.load("runs/quickstart")
scores = model.score(["It is so.", "So is it."])
print(scores.bits_per_byte, scores.errors)

Given the beginning of a text, or what is on both sides of it:

model.score([" so.", " law."], given="It is", likelihood="chain").nats
model.score("so", given="It is [MASK:*] ordered.", likelihood="chain").nats
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from mdm_jax.blueprint import held_out_objective
from mdm_jax.core.errors import UserError
from mdm_jax.data.held_out import DOCUMENT, ROW, HeldOut
from mdm_jax.data.rows import Rows
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.objectives.measured import NATS, PERPLEXITY
from mdm_jax.sampling import chain_rule, template
from mdm_jax.sampling.chain_calls import (
  ChainCalls,
  key_of_orders,
  passages,
  row_length,
)
from mdm_jax.sampling.chain_rule import Likelihood, bound_of_orders
from mdm_jax.trained_model import TrainedModel

# Independent estimates of a text's bound; their spread gives its error.
_ESTIMATES = 8
# Tokens per call of the chain rule. Not as many as there are to score: another
# number of rows is another program, which rounds differently.
_TOKENS_A_CALL = {"cpu": 1024}
_TOKENS_A_CALL_ELSEWHERE = 2**15
_EXACT = "chain", "chain:left_to_right"  # of a model that draws in this order


@dataclasses.dataclass(frozen=True)
class Scores:
  """Negative log-likelihoods of texts, or upper bounds on them.

  Attributes:
    nats: of each text; without `given`, of the whole text and its end.
    errors: standard errors of `nats` over random masks or orders; 0 if exact,
      nan if unknown.
    tokens: tokens of each text that are scored.
    bytes: UTF-8 bytes of each text.
    bound: True if `nats` are upper bounds.
  """

  nats: Float[np.ndarray, "N"]
  errors: Float[np.ndarray, "N"]
  tokens: Int[np.ndarray, "N"]
  bytes: Int[np.ndarray, "N"]
  bound: bool

  @property
  def bits_per_byte(self) -> Float[np.ndarray, "N"]:
    """Bits per UTF-8 byte, which compare across tokenizers."""
    return self.nats / (math.log(2) * self.bytes)


class Scorer:
  """Scores texts with one model; compiles once per length of rows.

  A score does not depend on the other texts of a call: every text is alone in
  its rows, with the same masks or orders as any other of its length.
  """

  def __init__(self, model: TrainedModel):
    """Wraps a model; nothing is compiled yet."""
    self._model, config = model, model.config
    self._longest = config.stages[-1].length
    with jax.set_mesh(model.mesh):
      self._objective = held_out_objective(
        config, model.tokenizer.vocab, model.mesh
      )
    self._one_order = self._objective.decoding().order == "left_to_right"
    self._evaluators: dict[int, Evaluator] = {}
    self._calls: dict[str, ChainCalls] = {}

  def __call__(
    self,
    texts: str | Sequence[str],
    given: str | Sequence[str] | None = None,
    likelihood: str = "nelbo",
    draws: int = 64,
  ) -> Scores:
    """Returns the likelihood of each text; see `Model.score`."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if isinstance(given, str) or given is None:
      given = [given] * len(texts)
    which = self._which(likelihood, draws)
    if len(given) != len(texts):
      raise UserError(
        f"given has {len(given)} entries for {len(texts)} texts; pass one for"
        " all, or one for each"
      )
    rows, sizes = [], []
    for i, (text, before) in enumerate(zip(texts, given, strict=True)):
      try:
        held, size = self._held(text, before)
      except UserError as error:
        raise UserError(f"texts[{i}]: {error}") from None
      rows.append(held)
      sizes.append(size)
    with jax.set_mesh(self._model.mesh):
      if which:
        nats, errors = self._by_chain_rule(rows, which)
        bound = not which.exact
      else:
        nats, errors, bound = self._measured(rows, draws)
    tokens = [int(held.rows.answer.sum()) for held in rows]
    return Scores(
      *(np.array(nats, np.float64), np.array(errors, np.float64)),
      *(np.array(tokens, np.int64), np.array(sizes, np.int64), bound),
    )

  def _which(self, likelihood: str, draws: int) -> Likelihood | None:
    """Returns the chain rule to apply; None for the objective's measure."""
    if draws < _ESTIMATES or draws % _ESTIMATES:
      raise UserError(f"draws={draws}: must be a multiple of {_ESTIMATES}")
    if likelihood == "nelbo":
      return None
    which = chain_rule.read(likelihood, "likelihood", "nelbo")
    order, name = self._objective.decoding().order, self._model.config.objective
    if self._one_order and likelihood in _EXACT:
      return None  # what the objective measures is the same, in one call
    if order != "any_order":
      raise UserError(
        f"likelihood={likelihood}: objective.name={name.name} doesn't draw in"
        " any order; likelihood=nelbo measures it"
      )
    return which

  def _held(self, text: str, given: str | None) -> tuple[HeldOut, int]:
    """Returns a text in rows of its own, and its number of bytes."""
    if not text:
      raise UserError("it is empty; there is nothing to score")
    tokenizer = self._model.tokenizer
    if given is None:
      template.check_characters(text, "the text")
      held, _ = make_held_out([text], self._model.config.rows, tokenizer)
      return held, len(text.encode())
    found = template.filled(given, text, tokenizer)
    size = len(found.tokens)
    if size > self._longest:
      raise UserError(
        f"it has {found.free.sum()} tokens, {size} with what is given, and a"
        f" row has {self._longest}; shorten given by {size - self._longest}"
      )
    if not found.free.any():
      raise UserError("the tokenizer makes no token of it")
    if self._hides(found.free):
      raise UserError(
        "given has text behind the hole that this model doesn't read when it"
        " draws there; end given at the hole"
      )
    behind = 0, row_length(size, self._longest) - size
    padded = lambda values, pad: np.pad(values, behind, constant_values=pad)
    rows = Rows(
      tokens=padded(found.tokens, tokenizer.vocab.need("pad"))[None],
      segments=padded(np.ones(size, np.int32), 0)[None],
      answer=padded(found.free.astype(np.uint8), 0)[None],
    )
    line = np.array([[0, 1, 0, found.bytes, 0]], np.int64)
    return HeldOut(rows, line), found.bytes

  def _hides(self, free: Bool[np.ndarray, "L"]) -> bool:
    """Returns whether text is given that tokens in the hole don't attend to."""
    decoding = self._objective.decoding()
    if decoding.order == "any_order":
      return False
    number = np.arange(len(free)) // (decoding.block or 1)
    return bool((number[~free] > number[free].min(initial=len(free))).any())

  def _measured(
    self, rows: list[HeldOut], draws: int
  ) -> tuple[list[float], list[float], bool]:
    """Returns what the objective measures: nats, errors, and if it's a bound.

    The random rates of a row are stratified, so the numbers of masked tokens
    are spread evenly over a text's tokens.
    """
    # One call per text: masks are drawn by the number of a row, and so are the
    # same for every text.
    copies = 1 if self._one_order else _ESTIMATES
    if draws not in self._evaluators:
      model = self._model
      settings = dataclasses.replace(
        model.config.eval,
        masks_per_row=draws // _ESTIMATES,
        batch_size=1 if self._one_order else draws,
      )
      self._evaluators[draws] = Evaluator(
        settings, self._objective, model.denoiser, model.mesh
      )
    nats, errors, bound = [], [], False
    for held in rows:
      measured = self._evaluators[draws].measure(
        self._model.params, _repeated(held, copies)
      )
      tokens = int(held.rows.answer.sum())
      for value in measured.with_role(NATS).values():
        nats.append(value.value * tokens)
        errors.append(0.0 if self._one_order else value.error * tokens)
      bound |= any(v.bound for v in measured.with_role(PERPLEXITY).values())
    if len(nats) != len(rows):
      raise UserError(
        f"objective.name={self._model.config.objective.name} measures no"
        " likelihood, by which a text could be scored"
      )
    return nats, errors, bound

  def _by_chain_rule(
    self, rows: list[HeldOut], which: Likelihood
  ) -> tuple[list[float], list[float]]:
    """Returns nats, and their errors over the random orders of a bound."""
    model = self._model
    if which.order not in self._calls:
      tokens = _TOKENS_A_CALL.get(
        jax.default_backend(), _TOKENS_A_CALL_ELSEWHERE
      )
      self._calls[which.order] = ChainCalls(
        *(which.order, model.denoiser, model.tokenizer.vocab, model.mesh),
        *(self._longest, tokens),
      )
    parts = [passages(held) for held in rows]
    texts = [part for of_text in parts for part in of_text]
    # Numbered within a text, so that its orders are its own.
    numbers = np.concatenate([np.arange(0), *map(np.arange, map(len, parts))])
    nats = np.zeros((which.orders, len(texts)))
    for k in range(which.orders):
      key = key_of_orders(k)
      run = self._calls[which.order]
      for index, found in run(model.params, texts, key, numbers):
        nats[k, index] = found
    total = bound_of_orders(nats)
    spread = np.zeros(len(texts)) if which.exact else _errors(nats)
    ends = np.cumsum(list(map(len, parts)))
    cut = lambda values: np.split(values, ends[:-1]) if parts else []
    return (
      [float(part.sum()) for part in cut(total)],
      [float(np.sqrt((part**2).sum())) for part in cut(spread)],
    )


def _errors(nats: Float[np.ndarray, "K N"]) -> Float[np.ndarray, "N"]:
  """Returns the errors of `bound_of_orders`, to first order."""
  shares = np.exp(nats.min(axis=0) - nats)
  return shares.std(axis=0, ddof=1) / math.sqrt(len(nats)) / shares.mean(axis=0)


def _repeated(held: HeldOut, count: int) -> HeldOut:
  """Returns a text's rows several times, each time as another document.

  Masks are drawn by row, and errors are taken over documents: so the error of
  the result is over the masks.
  """
  rows = len(held)
  tables = np.repeat(held.texts[None], count, axis=0)
  tables[:, :, ROW] += rows * np.arange(count)[:, None]
  tables[:, :, DOCUMENT] = np.arange(count)[:, None]
  fields = {
    name: np.tile(np.asarray(values[:]), (count, 1))
    for name, values in held.rows.fields.items()
  }
  return HeldOut(Rows(**fields), tables.reshape(-1, tables.shape[-1]))
