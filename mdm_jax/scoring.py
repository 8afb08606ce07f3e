"""Scores texts of a caller's own by a trained model's likelihood bound.

scores = mdm_jax.load("runs/quickstart").score(["It is so.", "So is it."])
print(scores.bits_per_byte, scores.errors)
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from mdm_jax.blueprint import held_out_objective
from mdm_jax.core.errors import UserError
from mdm_jax.data.held_out import DOCUMENT, ROW, HeldOut
from mdm_jax.data.rows import Rows
from mdm_jax.data.stage_rows import make_held_out
from mdm_jax.evaluation.evaluator import Evaluator
from mdm_jax.objectives.measured import NATS, PERPLEXITY
from mdm_jax.trained_model import TrainedModel

# Independent estimates of a text's bound; their spread gives its error.
_ESTIMATES = 8


@dataclasses.dataclass(frozen=True)
class Scores:
  """Negative log-likelihoods of texts, or upper bounds on them.

  Attributes:
    nats: of each whole text, its end included.
    errors: standard errors of `nats` over random masks.
    tokens: tokens of each text.
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


def score(
  model: TrainedModel, texts: str | Sequence[str], draws: int = 64
) -> Scores:
  """Returns each text's likelihood under a model, as evaluations measure it.

  A text is scored alone, on the same masks as any other text of its length, so
  a score does not depend on the other texts of the call.

  Args:
    model: a trained model.
    texts: one or more texts; those longer than a row are cut into rows.
    draws: random mask rates per row, a multiple of 8; the error falls with
      their square root.

  Raises:
    UserError: a text is empty, or `draws` is not a multiple of 8.
  """
  texts = [texts] if isinstance(texts, str) else list(texts)
  if draws < _ESTIMATES or draws % _ESTIMATES:
    raise UserError(f"draws={draws}: must be a multiple of {_ESTIMATES}")
  for i, text in enumerate(texts):
    if not text:
      raise UserError(f"texts[{i}] is empty; there is nothing to score")
  config, vocab = model.config, model.tokenizer.vocab
  settings = dataclasses.replace(
    config.eval, masks_per_row=draws // _ESTIMATES, batch_size=draws
  )
  with jax.set_mesh(model.mesh):
    objective = held_out_objective(config, vocab, model.mesh)
    evaluator = Evaluator(settings, objective, model.denoiser, model.mesh)
    found, bound = [], False
    for text in texts:
      held, _ = make_held_out([text], config.rows, model.tokenizer)
      measured = evaluator.measure(model.params, _repeated(held))
      for value in measured.with_role(NATS).values():
        tokens = int((np.asarray(held.rows.segments[:]) > 0).sum())
        found.append((value.value * tokens, value.error * tokens, tokens))
      bound |= any(v.bound for v in measured.with_role(PERPLEXITY).values())
  if len(found) != len(texts):
    raise UserError(
      f"objective.name={config.objective.name} measures no likelihood, by which"
      " a text could be scored"
    )
  nats, errors, tokens = np.array(found, np.float64).reshape(-1, 3).T
  size = np.array([len(text.encode()) for text in texts], np.int64)
  return Scores(nats, errors, tokens.astype(np.int64), size, bound)


def _repeated(held: HeldOut) -> HeldOut:
  """Returns a text's rows several times, each time as another document.

  Masks are drawn by row, and errors are taken over documents: so the error of
  the result is over the masks.
  """
  rows, count = len(held), _ESTIMATES
  tables = np.repeat(held.texts[None], count, axis=0)
  tables[:, :, ROW] += rows * np.arange(count)[:, None]
  tables[:, :, DOCUMENT] = np.arange(count)[:, None]
  fields = {
    name: np.tile(np.asarray(values[:]), (count, 1))
    for name, values in held.rows.fields.items()
  }
  return HeldOut(Rows(**fields), tables.reshape(-1, tables.shape[-1]))
