"""Counts how much training text is left out, by each stage and by all."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mdm_jax.data.config import StageConfig
from mdm_jax.data.segments import Unit


class Coverage:
  """Counts the characters that stages read, without white space."""

  def __init__(self, texts: Sequence[str]):
    """Starts with nothing read.

    Args:
      texts: documents of the train split.
    """
    self._texts = texts
    # Which characters are read; None for a document that is read in full.
    self._read: dict[int, np.ndarray | None] = {}

  def add(self, units: Sequence[Unit]) -> None:
    """Marks the text of a stage's units as read."""
    for unit in units:
      at = unit.document
      # Only whole documents have no starts.
      if not unit.starts:
        self._read[at] = None
      elif at not in self._read:
        self._read[at] = np.zeros(len(self._texts[at]), bool)
      if (mask := self._read[at]) is not None:
        for start, part in zip(unit.starts, unit.parts, strict=True):
          mask[start : start + len(part)] = True

  def counts(self) -> dict[str, int]:
    """Returns how many characters there are, and how many no stage reads."""
    characters = unread = 0
    for i, text in enumerate(self._texts):
      own = len("".join(text.split()))
      characters += own
      if i not in self._read:
        unread += own
      elif (mask := self._read[i]) is not None:
        # Look only at unread positions: white space among them doesn't count.
        left = np.flatnonzero(~mask).tolist()
        unread += sum(not text[at].isspace() for at in left)
    return {"characters": characters, "unread": unread}


def unread_text(counts: dict[str, int]) -> str:
  """Describes how much of the text no stage reads; '' if all of it is read."""
  if not counts["unread"]:
    return ""
  share = counts["unread"] / counts["characters"]
  return (
    f"no stage reads {counts['unread']:,} of the text's"
    f" {counts['characters']:,} characters ({share:.1%})"
  )


def left_out(stage: StageConfig, counts: dict[str, Any]) -> list[str]:
  """Returns lines on how much text a stage leaves out, and for what reasons."""
  if "answer_tokens" in counts:
    return _answers(stage, counts)
  if stage.reads_all:
    return []
  lines = []
  if counts["without_sentences"]:
    lines.append(
      f"{counts['without_sentences']:,} of {counts['documents']:,} documents"
      " have no sentences and were divided into lines or parts of lines"
    )
  total = counts["characters"]
  share = 1 - counts["characters_read"] / max(total, 1)
  reasons = [
    (counts["units_too_short"], f"shorter than {stage.min_words} words"),
    (counts["units_too_long"], f"longer than {stage.max_words}"),
    (counts["texts_too_long"], f"longer than {stage.length} tokens"),
    (counts["units_found"] - counts["units_selected"], "too difficult"),
  ]
  lines.append(f"left out: {share:.1%} of {total:,} characters")
  lines += [f"  {count:,} {reason}" for count, reason in reasons if count]
  return lines


def _answers(stage: StageConfig, counts: dict[str, Any]) -> list[str]:
  share = counts["answer_tokens"] / max(counts["tokens"], 1)
  what = "answers" if stage.unit == "conversations" else "holes"
  lines = [
    f"{counts['answer_tokens']:,} tokens of {what} ({share:.0%}): only these"
    " are masked and predicted"
  ]
  if count := counts["texts_too_long"]:
    lines.append(
      f"left out: {count:,} of {counts['units_found']:,} {stage.unit}, longer"
      f" than {stage.length} tokens"
    )
  # Older manifests lack it.
  if count := counts.get("texts_without_room", 0):
    lines.append(f"left out: {count:,} texts, too short for their holes")
  if count := counts["answers_too_long"]:
    lines.append(
      f"{count:,} last answers are longer than data.answer_length, or holes"
      " than data.hole_length: they are neither cut nor filled up"
    )
  return lines
