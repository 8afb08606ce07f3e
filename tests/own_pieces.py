"""One toy of everything that a user can define outside the package.

`openness_test.py` copies this file to a folder of its own, names it in a config
file, and trains, resumes, evaluates and samples with it. docs/extending.md
shows its parts.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.core import rng
from mdm_jax.core.fields import fixed
from mdm_jax.core.standard_errors import mean, ratio
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.config import ObjectiveStage
from mdm_jax.data.corpora import CORPORA, Corpus
from mdm_jax.data.text_files import Document
from mdm_jax.data.tokenizer import TOKENIZERS, Kind, Tokenizer
from mdm_jax.evaluation.text_metrics import Texts, metric
from mdm_jax.model.context import row_context
from mdm_jax.model.kernels import KERNELS, Kernel, dense
from mdm_jax.objectives import config as objectives
from mdm_jax.objectives import corruption
from mdm_jax.objectives.base import Cost, Decoding, Examples, Objective, Ratio
from mdm_jax.objectives.config import OBJECTIVES, ObjectiveConfig
from mdm_jax.objectives.measured import SEED, Jobs, Measured, likelihood
from mdm_jax.objectives.noise import SCHEDULES
from mdm_jax.sampling.order import ORDERS
from mdm_jax.training.optimizer import OPTIMIZERS

# MARK: a corpus: documents, in the same order every time


def _counting(argument, tally, data):
  for start in range(60):
    count = " ".join(str(n) for n in range(start, start + 30))
    yield Document(f"from {start}", f"Counting on: {count}.")


CORPORA.register("counting", Corpus(_counting))

# MARK: a tokenizer: text to ids and back, and a file to make it again from


class Letters(Tokenizer):
  """One id per byte of the training text; any other byte becomes a space."""

  kind = "letters"

  def __init__(self, letters: str):
    fields = json.dumps({"kind": self.kind, "letters": letters})
    self._id = {letter: i for i, letter in enumerate(letters)}
    super().__init__(tuple(x.encode() for x in letters), fields.encode())

  def encode_batch(self, texts):
    ids = lambda text: [self._id.get(letter, self._id[" "]) for letter in text]
    return [np.array(ids(text), np.int32) for text in texts]


TOKENIZERS.register(
  "letters",
  Kind(
    build=lambda config, texts: Letters("".join(sorted({" "}.union(*texts)))),
    load=lambda fields: Letters(fields["letters"]),
    planned=lambda config: Vocabulary.after_text(64),
  ),
)

# MARK: a noise schedule: alpha(t)

SCHEDULES.register("slow", lambda config: lambda t: 1 - t**3)

# MARK: an objective: every position guesses itself from a fixed share of holes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HolesConfig(ObjectiveConfig):
  """The objective's own fields of a config file."""

  holes: float = fixed(0.5, "share of a text that is a hole", "[0.01, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holes(Objective):
  """Cross-entropy of as many tokens of every row, drawn at random."""

  share: float
  mask: int
  length: int
  capacity: int

  headline = "holes_per_token"

  def _holes(self, keys, tokens, answer):
    rate = jnp.full_like(keys, self.share, dtype=jnp.float32)
    drawn = corruption.corrupt(keys, tokens, answer, rate, self.mask)
    return drawn.xt, drawn.masked

  def examples(self, batch, draws):
    keys = draws.keys("mask")
    xt, asked = self._holes(keys, batch.tokens, batch.answer)
    return Examples(
      tokens=xt,
      context=row_context(batch.segments, keys=draws.dropout()),
      targets=batch.tokens,
      asked=asked,
      weights=jnp.ones_like(xt, jnp.float32) / jnp.maximum(asked.sum(), 1),
      capacity=self.capacity,
    )

  def summaries(self, examples, aux):
    asked = examples.asked.sum().astype(jnp.float32)
    return {"hole": Ratio(aux.sum(), asked)}

  def cost(self):
    return Cost(reads=((self.length, self.length),), asked=self.capacity)

  def decoding(self):
    return Decoding("any_order")

  def jobs(self, held, part, draws):
    if part != "likelihood":
      return None
    rows = np.arange(len(held))
    asked = np.asarray(held.rows.answer[:]).sum(axis=1)
    return Jobs(rng.stream(SEED, "holes"), rows, 0 * rows, asked)

  def pose(self, batch, keys, given, capacity):
    xt, asked = self._holes(keys, batch.tokens, batch.answer)
    ones = jnp.ones_like(xt, jnp.float32)
    context = row_context(batch.segments)
    return Examples(xt, context, batch.tokens, asked, ones, capacity)

  def values(self, part, jobs, nats, held):
    cost = ratio(nats.by_row / self.share, jobs.asked)
    tokens = int(jobs.asked.sum())
    found = likelihood(
      "holes",
      "cost of a hole",
      total_nats=cost.value * tokens,
      tokens=tokens,
      num_bytes=held.num_bytes,
      stderr=cost.stderr,
      exact=False,
    )
    return Measured(found, headline=self.headline)


def _build(config, stage, noise, vocabulary, plan):
  rows = plan.batch // plan.shards or 1
  return Holes(
    share=config.holes,
    mask=vocabulary.mask,
    length=plan.length,
    capacity=rows * plan.length,
  )


OBJECTIVES.register(
  "holes", objectives.Kind(HolesConfig, ObjectiveStage, _build)
)

# MARK: a sampling order: a priority for every position of a row


@ORDERS.register("outward")
def outward(key, step, length):
  """From the middle of the row outwards."""
  return -jnp.abs(jnp.linspace(-1, 1, length))


# MARK: a text metric: a number of some texts, and its error


@metric("mean_words", "Words of a text")
def mean_words(texts: Texts):
  """Returns the mean number of space-separated words."""
  return mean([len(text.split()) for text in texts], texts.documents)


# MARK: an optimizer: any optax chain


@OPTIMIZERS.register("signs")
def signs(config, schedule):
  """The sign of the momentum, times the update's learning rate."""
  return optax.chain(
    optax.trace(decay=config.b1),
    optax.scale_by_sign(),
    optax.scale_by_learning_rate(schedule),
  )


# MARK: an attention kernel: prepared once, used in every layer


@KERNELS.register("plain")
class Plain(Kernel):
  """Softmax attention, written out."""

  def prepare(self, visibility, q, k):
    return dense(visibility, q, k)

  def attend(self, query, key, value, prepared):
    scores = jnp.einsum("bgrqk,bgmk->bgrqm", query, key)
    scores = scores * query.shape[-1] ** -0.5
    seen = jnp.where(prepared[:, None, None], scores, -1e30)
    return jnp.einsum("bgrqm,bgmk->bgrqk", jax.nn.softmax(seen), value)
