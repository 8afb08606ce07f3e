"""Renders a moving picture (SVG) of one text while it is drawn.

It needs no script, so it also plays as an image, as in a README.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.evaluation.pages import page
from mdm_jax.evaluation.pages.samples import drawn_tokens
from mdm_jax.sampling.samples import Samples

_COLUMNS = 64  # characters per line
_STEP_SECONDS = 0.35
_HOLD_SECONDS = 5.0  # at the end, for reading

Json = dict[str, Any]


class Piece(NamedTuple):
  """What is at a position of the text during some steps.

  Attributes:
    line: line of the text, from 0.
    column: first character in its line, from 0.
    width: in characters.
    text: what is read there; None while it is masked.
    since: first step that shows it.
    until: first step that no longer does; None if it stays.
    given: whether it is part of the prompt.
  """

  line: int
  column: int
  width: int
  text: str | None
  since: int
  until: int | None
  given: bool


def render(samples: Samples, tokenizer: Tokenizer, row: int = 0) -> str:
  """Returns the picture of one text as SVG.

  Args:
    samples: texts and their paths.
    tokenizer: the one that decoded them.
    row: which text.
  """
  tokens = drawn_tokens(samples, tokenizer, row)
  pieces = list(_pieces(tokens))
  steps = int(samples.calls[row])
  # Behind the end of the text there is padding, whose text is False.
  total = sum(token["changes"][-1][1] is not False for token in tokens)
  seconds = steps * _STEP_SECONDS + _HOLD_SECONDS
  at = lambda step: round(100 * step * _STEP_SECONDS / seconds, 2)
  # One animation for all pieces that come, or come and go, together.
  spans = sorted({(p.since, p.until or 0) for p in pieces})
  return page.render(
    "picture.svg",
    columns=_COLUMNS,
    lines=max((p.line for p in pieces), default=0) + 1,
    pieces=pieces,
    spans=[
      (since, until, at(since), at(since + 1), at(until) if until else None)
      for since, until in spans
    ],
    counts=[
      (k, at(k), at(k + 1) if k < steps else None, known, total)
      for k, known in enumerate(_known(tokens, steps))
    ],
    seconds=round(seconds, 1),
    text=samples.texts[row].strip(),
  )


def _known(tokens: list[Json], steps: int) -> Iterator[int]:
  """Yields how many tokens can be read after each step, from 0 on."""
  for step in range(steps + 1):
    seen = (
      [text for since, text, *_ in token["changes"] if since <= step][-1]
      for token in tokens
    )
    yield sum(isinstance(text, str) for text in seen)


def _pieces(tokens: list[Json]) -> Iterator[Piece]:
  """Yields what every position shows, from the first step to the last."""
  for token, (line, column) in zip(tokens, _places(tokens), strict=True):
    changes = token["changes"]
    ends = [since for since, *_ in changes[1:]] + [None]
    stripped = token["text"].strip()
    # A blank token takes no room, but is a block while it is masked.
    width = len(stripped) or 1
    for (since, text, *_), until in zip(changes, ends, strict=True):
      shown = text.strip() if text else text
      if shown or text is None:
        yield Piece(line, column, width, shown, since, until, token["given"])


def _places(tokens: list[Json]) -> Iterator[tuple[int, int]]:
  """Yields the line and column of each token; lines break between words."""
  line = column = 0
  for i, token in enumerate(tokens):
    text = token["text"]
    gap = len(text) - len(text.lstrip())
    word = len(text.strip())
    for after in tokens[i + 1 :]:
      # The rest of the word, which later tokens spell.
      if after["text"][:1].isspace() or not after["text"].strip():
        break
      word += len(after["text"].strip())
    if word and "\n" in text[:gap]:
      line, column = line + bool(column), 0
    elif column and gap + word > _COLUMNS - column:
      line, column = line + 1, 0
    else:
      column += min(gap, 1) if column else 0
    yield line, column
    column += len(text.strip())
    # Only what follows a blank token starts the next line: at the end of the
    # text nothing does.
    if not word and "\n" in text:
      line, column = line + bool(column), 0
