"""A judge of samples: a causal language model of hf:FOLDER, run in JAX.

judge = HuggingFaceJudge("hf:models/SmolLM2-135M")
nats = judge.nats_of(["It is so.", "So is it."])
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Float64, Int

from mdm_jax.core import distributed, trees
from mdm_jax.core.errors import UserError
from mdm_jax.core.progress import console
from mdm_jax.core.sharding import (
  RULES,
  MeshConfig,
  batch_sharding,
  data_shards,
  padded_rows,
  put,
)
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import huggingface_tokenizer
from mdm_jax.data.tokenizer_base import Tokenizer
from mdm_jax.huggingface import folder as folders
from mdm_jax.huggingface.families import Architecture, architecture
from mdm_jax.huggingface.parameters import read_params
from mdm_jax.model.context import CAUSAL, row_context
from mdm_jax.model.denoiser import Denoiser, Params
from mdm_jax.model.placement import mesh_for_use
from mdm_jax.objectives.cross_entropy import masked_cross_entropy
from mdm_jax.sampling.chain_calls import row_length

# Letters of both cases, digits and punctuation, to test tokenizers with.
_PROBE = "The cat sat on 12 mats."
# Tokens of a call, padding included.
_TOKENS_A_CALL = {"cpu": 1024}
_TOKENS_A_CALL_ELSEWHERE = 2**15
_ANY = 2**30  # tokens, of a model without a limit


class _Window(NamedTuple):
  """A part of a text that the model reads at once.

  Attributes:
    text: number of the text.
    ids: its tokens; the first is context only.
    known: number of further tokens that earlier windows have scored.
  """

  text: int
  ids: Int[np.ndarray, "M"]
  known: int


def check(source: str) -> None:
  """Checks that a judge can be loaded, before hours of training.

  Its weights are not read.

  Args:
    source: hf:FOLDER or hf:FILE.gguf; "" for none.

  Raises:
    UserError: there is no causal model of a known family, or its tokenizer is
      missing or loses text.
  """
  if source:
    _opened(source)


class HuggingFaceJudge:
  """A causal language model that another library saved.

  It runs in float32, its weights sharded over the mesh like a model's and its
  rows like those of an evaluation.

  A text's first token is conditioned on the model's begin id or else its end
  id; without either it costs log(vocabulary size) nats. Texts longer than the
  model's context are scored in windows that overlap by half. Text that the
  tokenizer drops costs nothing.
  """

  def __init__(self, source: str, mesh: MeshConfig | None = None):
    """Loads a model and its tokenizer.

    Args:
      source: hf:FOLDER or hf:FILE.gguf.
      mesh: sizes of the mesh axes (None: the defaults).

    Raises:
      UserError: as in `check`, or a tensor is missing or damaged.
    """
    self.name = source
    folder, found, self._tokenizer = _opened(source)
    model = dataclasses.replace(found.model, dtype="float32")
    self._mesh = mesh_for_use(mesh or MeshConfig(), model)
    vocab = _vocabulary(found.rows, self._mesh.shape[RULES.vocab])
    denoiser = Denoiser(model, vocab)
    with jax.set_mesh(self._mesh):
      self._params = read_params(folder.tensors(), found, denoiser)
    self._limit, self._rows = found.context or _ANY, found.rows
    self._start = _start(self._tokenizer)
    self._losses = jax.jit(
      functools.partial(_losses, denoiser, data_shards(self._mesh))
    )
    self._describe()

  def _describe(self) -> None:
    leaves = trees.by_path(self._params).values()
    count = sum(leaf.size for leaf in leaves)
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    console.print(
      f"judge {self.name}: {count:,} parameters, {here / 2**30:.2f} GiB on each"
      " device",
      soft_wrap=True,
    )
    if self._start is None:
      logging.warning(
        "%s has neither a begin nor an end id: the first token of every text"
        " costs log(vocabulary size) = %.2f nats.",
        self.name,
        math.log(self._rows),
      )

  def nats_of(self, texts: Sequence[str]) -> Float64[np.ndarray, "N"]:
    """Returns the total negative log-likelihood of each text, in nats.

    Compiles once per length of rows, which are powers of two.
    """
    total, by_length = np.zeros(len(texts)), {}
    for text, ids in enumerate(self._tokenizer.encode_batch(texts)):
      if self._start is not None:
        ids = np.concatenate([[self._start], ids])
      elif len(ids):
        total[text] = math.log(self._rows)
      for start, new, end in _windows(len(ids) - 1, self._limit):
        window = _Window(text, ids[start : end + 1], new - start)
        length = row_length(end - start, self._limit)
        by_length.setdefault(length, []).append(window)
    with jax.set_mesh(self._mesh):
      for length, windows in sorted(by_length.items()):
        for text, nats in self._costs(windows, length):
          total[text] += nats
    return total

  def _costs(
    self, windows: Sequence[_Window], length: int
  ) -> Iterator[tuple[int, float]]:
    """Yields each window's text and nats."""
    tokens = _TOKENS_A_CALL.get(jax.default_backend(), _TOKENS_A_CALL_ELSEWHERE)
    size = padded_rows(max(tokens // length, 1), self._mesh)
    ahead: list[tuple[Sequence[_Window], Array]] = []
    for start in range(0, len(windows), size):
      some = windows[start : start + size]
      rows = self._placed(some, size, length)
      ahead.append((some, self._losses(self._params, *rows)))
      # Fetch one call while the devices run the next.
      if len(ahead) == 2:
        yield from _summed(*ahead.pop(0))
    for left in ahead:
      yield from _summed(*left)

  def _placed(self, windows: Sequence[_Window], size: int, length: int):
    """Returns `size` rows: ids [B, L + 1], known tokens [B], all tokens [B]."""
    ids = np.zeros((size, length + 1), np.int32)
    known, past = np.zeros((2, size), np.int32)
    for row, window in enumerate(windows):
      ids[row, : len(window.ids)] = window.ids
      known[row], past[row] = window.known, len(window.ids) - 1
    return [
      put(a, batch_sharding(self._mesh, a.ndim)) for a in (ids, known, past)
    ]


def _losses(
  model: Denoiser,
  shards: int,
  params: Params,
  ids: Int[Array, "B M"],
  known: Int[Array, "B"],
  past: Int[Array, "B"],
) -> Float[Array, "B L"]:
  """Returns the nats of every new token of some windows; 0 elsewhere."""
  rows, length = len(ids), ids.shape[1] - 1
  index = jnp.arange(length)[None]
  real = index < past[:, None]
  context = row_context(
    real.astype(jnp.int32), visibility=CAUSAL, most_segments=1
  )
  hidden = model.hidden(params, ids[:, :-1], context)
  return masked_cross_entropy(
    model.logits,
    model.head(params),
    hidden,
    ids[:, 1:],
    real & (index >= known[:, None]),
    rows * length // shards,
    model.vocab,
  )


def _summed(
  windows: Sequence[_Window], losses: Float[Array, "B L"]
) -> Iterator[tuple[int, float]]:
  sums = distributed.fetch(losses).sum(axis=1, dtype=np.float64)
  for window, nats in zip(windows, sums.tolist(), strict=False):
    yield window.text, nats


# MARK: what a judge must be


def _opened(source: str) -> tuple[folders.Folder, Architecture, Tokenizer]:
  """Returns a folder, its architecture and its tokenizer, after checks."""
  if not folders.is_named(source):
    raise UserError(
      f"eval.judge={source!r} must be hf:FOLDER; nearest: 'hf:{source}'"
    )
  try:
    folder = folders.open_folder(source)
    found = architecture(folder.config, str(folder.path / "config.json"))
    tokenizer = huggingface_tokenizer.from_folder(folder)
  except UserError as error:
    raise UserError(f"eval.judge={source!r}: {error}") from None
  if not found.causal:
    raise _unusable(source, "is not causal: it sees later tokens")
  back = tokenizer.decode(tokenizer.encode(_PROBE))
  # Changes of case and white space are accepted: such models judge well. Lost
  # text would cost nothing.
  if "".join(back.lower().split()) != "".join(_PROBE.lower().split()):
    why = f"has a tokenizer that loses text: {_PROBE!r} becomes {back!r}"
    raise _unusable(source, why)
  return folder, found, tokenizer


def _unusable(source: str, why: str) -> UserError:
  return UserError(f"eval.judge={source!r} {why}")


def _vocabulary(rows: int, shards: int) -> Vocabulary:
  """Returns a vocabulary where all of a model's rows can be predicted."""
  # Not the tokenizer's: what the model gives to unused rows is lost to a text,
  # by the usual definition of a likelihood.
  size = -(-rows // shards) * shards
  return Vocabulary(size, forbidden=((rows, size),) if rows < size else ())


def _start(tokenizer: Tokenizer) -> int | None:
  """Returns the id to put before a text: begin, else end, else None."""
  begin, end = tokenizer.vocab.begin, tokenizer.vocab.end
  return end if begin is None else begin


def _windows(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
  """Yields (start, start of the new tokens, end) of half-overlapping windows.

  They cover `length` tokens, with at most `limit` tokens each.
  """
  end = 0
  while end < length:
    more = limit if end == 0 else max(limit // 2, 1)
    new, end = end, min(end + more, length)
    yield max(end - limit, 0), new, end
