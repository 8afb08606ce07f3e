"""A judge of samples: a causal language model in a Hugging Face folder."""

import importlib.util
import math
import os
from collections.abc import Collection, Iterator
from typing import Any

from absl import logging

from mdm_jax.core.errors import UserError

# Letters of both cases, digits and punctuation, to test tokenizers with.
_PROBE = "The cat sat on 12 mats."


def check(path: str) -> None:
  """Checks that a judge is likely to load, before hours of training.

  Args:
    path: folder of a Hugging Face causal LM; "" for none.

  Raises:
    UserError: the folder holds no model, or a package is missing.
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


class HuggingFaceJudge:
  """A local causal language model in the format of `transformers`.

  Nothing is downloaded, no code from the folder is run, and weights are read
  from safetensors only. The model runs in float32, on a GPU if torch sees one.

  A text's first token is conditioned on the tokenizer's BOS or else EOS;
  without either it costs log(vocabulary size) nats. Texts longer than the
  model's context are scored in windows that overlap by half. Text that the
  tokenizer drops costs nothing.
  """

  def __init__(self, folder: str):
    """Loads a model and its tokenizer from a folder.

    Raises:
      UserError: the folder holds no usable model, or a package is missing.
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
        "%s has neither a BOS nor an EOS token: the first token of every text"
        " costs log(vocabulary size) = %.2f nats.",
        folder,
        math.log(self._vocab_size),
      )

  def nats(self, text: str) -> float:
    """Returns the total negative log-likelihood of a text, in nats."""
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
    """Returns the NLL of a window in nats, without its first tokens.

    Args:
      ids: tokens of the window; the first is context only.
      known: number of further tokens that earlier windows have scored.
    """
    import torch

    ids = torch.tensor(ids, device=self._model.device)
    with torch.inference_mode():
      logits = self._model(ids[None, :-1]).logits[0, known:]
    losses = torch.nn.functional.cross_entropy(
      logits.double(), ids[known + 1 :], reduction="sum"
    )
    return losses.item()


def _load(folder: str) -> tuple[Any, Any]:
  """Returns the tokenizer and the model in a folder, after checking them."""
  # Not at the top: both are optional, and take seconds to import.
  import torch
  import transformers

  local = {"local_files_only": True, "trust_remote_code": False}
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder, use_safetensors=True, output_loading_info=True, **local
    )
  except Exception as e:  # the libraries raise many types for a bad file
    line = str(e).strip().partition("\n")[0]
    raise _unusable(
      folder, f"can't be loaded: {type(e).__name__}: {line}"
    ) from e
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = model.float().eval().to(device)
  _check_complete(folder, report["missing_keys"])
  _check_tokenizer(folder, tokenizer)
  _check_causal(folder, model)
  return tokenizer, model


def _unusable(folder: str, why: str) -> UserError:
  return UserError(f"eval.judge={folder!r} {why}")


def _check_complete(folder: str, missing: Collection[str]) -> None:
  """Raises UserError if transformers initialised some weights at random."""
  if missing:
    names = ", ".join(sorted(missing)[:3])
    raise _unusable(folder, f"lacks weights of its causal LM: {names}")


def _check_tokenizer(folder: str, tokenizer: Any) -> None:
  """Raises UserError for a lossy tokenizer: lost text would cost nothing."""
  ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
  back = tokenizer.decode(ids)
  # Changes of case and white space are accepted: such models judge well.
  if "".join(back.lower().split()) != "".join(_PROBE.lower().split()):
    why = f"no tokenizer, or one that loses text: {_PROBE!r} becomes {back!r}"
    raise _unusable(folder, f"has {why}")


def _check_causal(folder: str, model: Any) -> None:
  """Raises UserError if logits depend on later tokens, i.e. on the answer."""
  import torch

  ids = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1]], device=model.device)
  with torch.inference_mode():
    logits = model(ids).logits
  change = (logits[0] - logits[1]).abs().amax(dim=-1)
  # Relative to the last position, whose input differs: rounding may leave some.
  if change[:-1].max() > 1e-4 * change[-1]:
    raise _unusable(folder, "is not causal: it sees later tokens")


def _start(tokenizer: Any) -> int | None:
  """Returns the id to put before a text: BOS, else EOS, else None."""
  bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
  return eos if bos is None else bos


def _windows(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
  """Yields (start, start of the new tokens, end) of half-overlapping windows.

  They cover `length` tokens, with at most `limit` tokens each.
  """
  end = 0
  while end < length:
    more = limit if end == 0 else max(limit // 2, 1)
    new, end = end, min(end + more, length)
    yield max(end - limit, 0), new, end
