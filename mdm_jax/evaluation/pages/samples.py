"""Renders an HTML page that replays how samples were drawn, step by step.

Pages for people count steps from 1, and 0 is the canvas before the first step;
arrays count from 0, as `Samples` does.
"""

from collections.abc import Sequence
from typing import Any

from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.evaluation.pages import page
from mdm_jax.sampling.order_statistics import MEANING, order_statistics
from mdm_jax.sampling.samples import Samples
from mdm_jax.sampling.trace import spell, visible

_MOST_TEXTS = 16  # shown on a page

Json = dict[str, Any]


def render(samples: Samples, tokenizer: Tokenizer, settings: Json) -> str:
  """Returns a self-contained page; of more than 16 texts, the first 16.

  Args:
    samples: the texts and their paths.
    tokenizer: the one that decoded them.
    settings: how they were drawn.
  """
  statistics = order_statistics(samples, tokenizer.vocab)
  count = len(samples.texts)
  shown = min(count, _MOST_TEXTS)
  of = f"{count} text" + "s" * (count != 1)
  texts = []
  for row in range(shown):
    numbers = {"denoiser calls": samples.calls[row]}
    numbers["remasked"] = samples.put_back[row]
    for name, found in statistics.items():
      numbers[name.replace("_", " ")] = _rounded(found.rows[row])
    tokens = drawn_tokens(samples, tokenizer, row)
    texts.append({"numbers": numbers, "tokens": tokens})
  return page.render(
    "samples.html",
    count=of if shown == count else f"{shown} of {of}",
    steps=len(samples.path) - 1,
    texts=texts,
    statistics={
      name: (MEANING[name], _rounded(found.mean), _rounded(found.random_mean))
      for name, found in statistics.items()
    },
    settings=settings,
  )


def _rounded(value: float) -> str:
  # Adding 0 turns -0.0 into 0.0.
  return page.number(round(value, 2) + 0, ".2f")


def drawn_tokens(
  samples: Samples, tokenizer: Tokenizer, row: int
) -> list[Json]:
  """Returns the final tokens of a text, each with its changes."""
  vocab = tokenizer.vocab
  path = samples.path[:, row].tolist()
  spelt = [spell(ids, tokenizer) for ids in path]
  final = samples.step[row], samples.confidence[row], samples.entropy[row]
  return [
    {
      "text": texts[-1] or "",
      "changes": _changes(ids, texts, vocab),
      "given": ids[0] not in (vocab.mask, vocab.pad),
      "special": ids[-1] in (vocab.end, vocab.separator),
      "step": step + 1 if step >= 0 else None,
      "confidence": confidence,
      "entropy": entropy,
    }
    for ids, texts, step, confidence, entropy in zip(
      zip(*path, strict=True), zip(*spelt, strict=True), *final, strict=True
    )
  ]


def _changes(
  ids: Sequence[int], texts: Sequence[str | None], vocab: Vocabulary
) -> list[list[Any]]:
  """Returns how the token at a position changed, for the page's script.

  A change is [step, text], or [step, text, 1] if the token was drawn in that
  step. The text is null for MASK and false for PAD.
  """
  before, changes = "", []
  for k, (i, text) in enumerate(zip(ids, texts, strict=True)):
    now = False if i == vocab.pad else text and visible(text)
    drawn = k > 0 and i != ids[k - 1] and i not in (vocab.mask, vocab.pad)
    # Texts can change without a draw: bytes complete a character later on.
    if k == 0 or drawn or now != before:
      changes.append([k, now, 1] if drawn else [k, now])
    before = now
  return changes
