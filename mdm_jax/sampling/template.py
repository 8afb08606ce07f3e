r"""Prompts and infilling templates: text with holes, as rows for the sampler.

[MASK] is a hole for one token, [MASK:5] for five, and [MASK:*], which only the
end of a text may be, for all that is left of a row. A text without a hole is a
prompt: all of it is given, and the rest of the row is drawn. With a backslash,
\[MASK], it is text; \\[MASK] is a backslash and a hole.

The given text keeps its tokens and comes back exactly, with one exception.
SentencePiece writes a word together with the space before it, so there one
space in front of a hole is the hole's own: "The [MASK] is" gives "The" and
" is", and " cat" is drawn. Were the space given, what follows it would have to
be a word without a space, which the denoiser has not seen there. Two spaces in
front of a hole give one. The end of a prompt is in front of a hole, too: "The "
gives what "The" gives. Bytes and characters are drawn one by one, spaces too,
so every space around a hole is given.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.sampling.call import Canvas

_START = re.compile(r"(\\*)\[MASK")
_END = re.compile(r"(?::([1-9][0-9]{0,5}|\*))?\]")
_FORMS = (
  "write [MASK], [MASK:5] for five tokens (up to 999999), [MASK:*] at the end"
  r" for the rest of the length, or \[MASK for the text itself"
)


class PromptError(UserError):
  """What is wrong with one of several prompts.

  Attributes:
    number: of the prompt, from 1.
    why: what is wrong.
  """

  def __init__(self, number: int, total: int, why: str):
    self.number, self.why = number, why
    super().__init__(f"prompt {number} of {total}: {why}" if total > 1 else why)


@dataclasses.dataclass(frozen=True)
class Template:
  """A row with holes.

  Attributes:
    tokens: given tokens, the mask id where one is to be drawn, and padding.
    free: which are to be drawn.
    grows: whether the row goes on with holes, as far as there is room.
  """

  tokens: Int32[np.ndarray, "N"]
  free: Bool[np.ndarray, "N"]
  grows: bool = False


class _Part(NamedTuple):
  """Given text, and the holes after it."""

  given: str
  holes: int = 0
  grows: bool = False


def parse(text: str, tokenizer: Tokenizer) -> Template:
  """Returns a text's tokens and holes; a text without a hole grows.

  Raises:
    UserError: a hole is written in no valid form, [MASK:*] is not at the end,
      or the text has what is no character.
  """
  _check_characters(text)
  parts = _split(text)
  plain = len(parts) == 1 and not parts[0].holes and not parts[0].grows
  given = [part.given for part in parts]
  if _spaces_begin_words(tokenizer):
    given = [
      part.given.removesuffix(" ")
      if part.holes or part.grows or plain
      else part.given
      for part in parts
    ]
  tokens, free = [], []
  for ids, part in zip(tokenizer.encode_batch(given), parts, strict=True):
    holes = np.full(part.holes, tokenizer.vocab.mask, np.int32)
    tokens += [ids, holes]
    free += [np.zeros(len(ids), bool), np.ones(len(holes), bool)]
  grows = plain or parts[-1].grows
  return Template(np.concatenate(tokens), np.concatenate(free), grows)


def fit(template: Template, length: int, vocab: Vocabulary) -> Template:
  """Returns a template of exactly `length` tokens, which does not grow.

  What is missing becomes holes where the template grows, else padding.

  Raises:
    UserError: the template is longer, or nothing of it is left to draw.
  """
  count = len(template.tokens)
  rest = length - count
  drawn = template.free.any()
  if rest < 0:
    raise UserError(
      f"the prompt takes {count} tokens and a sample has {length}; shorten it"
      f" by {-rest + (not drawn)} or set sample.length"
    )
  if not rest and not drawn:
    raise UserError(
      f"the prompt takes all {length} tokens of a sample, which leaves nothing"
      " to draw; shorten it or set sample.length"
    )
  filler = vocab.mask if template.grows else vocab.pad
  return Template(
    np.append(template.tokens, np.full(rest, filler, np.int32)),
    np.append(template.free, np.full(rest, template.grows)),
  )


def canvas(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Canvas:
  """Returns a row of `length` tokens for each text.

  Raises:
    PromptError: as `parse` and `fit`, naming the text if there are several.
  """
  rows, lengths = [], []
  for number, text in enumerate(texts, start=1):
    try:
      found = parse(text, tokenizer)
      rows.append(fit(found, length, tokenizer.vocab))
      lengths.append(length if found.grows else len(found.tokens))
    except UserError as error:
      raise PromptError(number, len(texts), str(error)) from None
  tokens = np.array([row.tokens for row in rows], np.int32)
  free = np.array([row.free for row in rows], bool)
  tokens, free = tokens.reshape(-1, length), free.reshape(-1, length)
  return Canvas(tokens, free, np.array(lengths, np.int32))


def escape(text: str) -> str:
  """Returns a template that gives the text, whatever it holds."""
  return _START.sub(lambda found: rf"{found[1]}\{found[0]}", text)


def _check_characters(text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    found = ord(text[error.start])
    byte = 0xDC80 <= found <= 0xDCFF  # how Python keeps what it can't decode
    what = f"byte 0x{found - 0xDC00:02x}" if byte else f"U+{found:04X}"
    raise UserError(
      f"the prompt is no UTF-8: {what} at character {error.start + 1} is none"
    ) from None


def _split(text: str) -> list[_Part]:
  """Returns the parts, of which only the last may have no hole."""
  parts, given, at = [], "", 0
  while start := _START.search(text, at):
    # Backslashes mean something before a hole only; there, two are one.
    slashes = len(start[1])
    given += text[at : start.start()] + "\\" * (slashes // 2)
    at = start.end()
    if slashes % 2:
      given += "[MASK"
      continue
    end = _END.match(text, at)
    if not end:
      written = re.match(r"[^\s\[\]]{0,12}\]?", text[at:])[0]
      raise UserError(f"[MASK{written} is not a hole; {_FORMS}")
    at = end.end()
    grows = end[1] == "*"
    if grows and at < len(text):
      raise UserError(
        "[MASK:*] stands for the rest of the length, so no text may follow it;"
        " write [MASK:5] for five tokens"
      )
    parts.append(_Part(given, 0 if grows else int(end[1] or 1), grows))
    given = ""
  rest = given + text[at:]
  return [*parts, _Part(rest)] if rest or not parts else parts


def _spaces_begin_words(tokenizer: Tokenizer) -> bool:
  return any(piece[:1] == b" " != piece for piece in tokenizer.pieces)
