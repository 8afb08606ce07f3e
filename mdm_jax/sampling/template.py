r"""Parses prompts and infilling templates into rows for the sampler.

[MASK] is a hole of one token, [MASK:5] of five, and [MASK:*], which is allowed
only at the end, of the rest of the row. A text without a hole is a prompt: all
of it is given, and the rest of the row is drawn. A backslash makes \[MASK]
literal; \\[MASK] is a backslash followed by a hole.

Given text is reproduced exactly, with one exception. SentencePiece tokens
include the space before a word, so one space in front of a hole belongs to the
hole: in "The [MASK] is", "The" and " is" are given, and " cat" can be drawn. If
the space were given, a word without its space would have to follow, which the
denoiser has never seen. Of two spaces in front of a hole one is given. The end
of a prompt counts as in front of a hole: "The " is the same prompt as "The".
Byte and character tokenizers have tokens for spaces, so all spaces are given.
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
  r" for the rest of the text, or \[MASK for literal text"
)


class PromptError(UserError):
  """An invalid prompt.

  Attributes:
    number: position among all prompts, from 1.
    why: what is wrong with it.
  """

  def __init__(self, number: int, total: int, why: str):
    self.number, self.why = number, why
    super().__init__(f"prompt {number} of {total}: {why}" if total > 1 else why)


@dataclasses.dataclass(frozen=True)
class Template:
  """A row with holes.

  Attributes:
    tokens: given ids, MASK in holes, and PAD.
    free: which tokens are holes.
    grows: whether holes fill the rest of the row.
  """

  tokens: Int32[np.ndarray, "N"]
  free: Bool[np.ndarray, "N"]
  grows: bool = False


@dataclasses.dataclass(frozen=True)
class Filled:
  """A template whose hole is filled with a given text.

  Attributes:
    tokens: all ids.
    free: which of them are the text's.
    bytes: UTF-8 bytes of the text, with a space in front of the hole that
      belongs to it.
  """

  tokens: Int32[np.ndarray, "N"]
  free: Bool[np.ndarray, "N"]
  bytes: int


class _Part(NamedTuple):
  """Given text and the number of holes after it."""

  given: str
  holes: int = 0
  grows: bool = False


def parse(text: str, tokenizer: Tokenizer) -> Template:
  """Returns the tokens and holes of a prompt or template.

  Example:
    parse("The [MASK:2] of", tokenizer).free  # e.g. [False, True, True, False]

  Raises:
    UserError: a hole is malformed, [MASK:*] is not at the end, or the text is
      not valid Unicode.
  """
  check_characters(text)
  parts = _split(text)
  plain = len(parts) == 1 and not parts[0].holes and not parts[0].grows
  given = [part.given for part in parts]
  # A space in front of a hole belongs to the hole (see the module's docstring).
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
  """Returns a template filled up to exactly `length` tokens.

  The rest is filled with holes if the template grows, else with padding.

  Raises:
    UserError: the template is longer than that, or has nothing to draw.
  """
  count = len(template.tokens)
  rest = length - count
  drawn = template.free.any()
  if rest < 0:
    # One token more if otherwise nothing would be left to draw.
    raise UserError(
      f"the prompt has {count} tokens and a sample only {length}; shorten it"
      f" by {-rest + (not drawn)} or increase sample.length"
    )
  if not rest and not drawn:
    raise UserError(
      f"the prompt takes all {length} tokens of a sample, which leaves nothing"
      " to draw; shorten it or increase sample.length"
    )
  filler = vocab.mask if template.grows else vocab.pad
  return Template(
    np.append(template.tokens, np.full(rest, filler, np.int32)),
    np.append(template.free, np.full(rest, template.grows)),
  )


def canvas(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Canvas:
  """Returns a canvas with a row of `length` tokens for each text.

  Raises:
    PromptError: `parse` or `fit` fails; it names the text if there are several.
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


def filled(given: str, text: str, tokenizer: Tokenizer) -> Filled:
  """Returns the tokens of a template with a text in its hole.

  [MASK:*] is a hole for a text of any length, and here may be anywhere.

  Args:
    given: a template with one hole, or a prompt, which the text continues.
    text: what replaces the hole.
    tokenizer: makes the ids.

  Raises:
    UserError: the template does not have one hole, or the hole has another
      number of tokens than the text.
  """
  check_characters(given, "given")
  check_characters(text, "the text")
  parts = _split(given, anywhere=True)
  holes = [part for part in parts if part.holes or part.grows]
  if len(holes) > 1:
    raise UserError(f"given has {len(holes)} holes, but a text fills one")
  before, after = parts[0].given, "".join(part.given for part in parts[1:])
  if _spaces_begin_words(tokenizer) and before.endswith(" "):
    before, text = before[:-1], f" {text}"
  ids = tokenizer.encode_batch([before, text, after])
  sizes = [len(part) for part in ids]
  if holes and not holes[0].grows and holes[0].holes != sizes[1]:
    raise UserError(
      f"the hole has {holes[0].holes} token(s) and the text {sizes[1]}; write"
      f" [MASK:{sizes[1]}], or [MASK:*] for a text of any length"
    )
  return Filled(
    np.concatenate(ids).astype(np.int32),
    np.repeat(np.array([False, True, False]), sizes),
    len(text.encode()),
  )


def escape(text: str) -> str:
  """Returns a text with every [MASK escaped, so that all of it is given."""
  return _START.sub(lambda found: rf"{found[1]}\{found[0]}", text)


def check_characters(text: str, name: str = "the prompt") -> None:
  """Raises UserError if a text has characters that UTF-8 can't store.

  Args:
    text: the text.
    name: what the message calls it.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    found = ord(text[error.start])
    byte = 0xDC80 <= found <= 0xDCFF  # Python's surrogateescape range
    what = f"byte 0x{found - 0xDC00:02x}" if byte else f"U+{found:04X}"
    raise UserError(
      f"{name} is not valid UTF-8: {what} at character {error.start + 1}"
    ) from None


def _split(text: str, anywhere: bool = False) -> list[_Part]:
  """Splits a template at its holes; only the last part may have no hole.

  Args:
    text: the template.
    anywhere: whether text may follow [MASK:*].
  """
  parts, given, at = [], "", 0
  while start := _START.search(text, at):
    # Only backslashes in front of a hole are special: two of them make one.
    slashes = len(start[1])
    given += text[at : start.start()] + "\\" * (slashes // 2)
    at = start.end()
    if slashes % 2:
      given += "[MASK"
      continue
    end = _END.match(text, at)
    if not end:
      written = re.match(r"[^\s\[\]]{0,12}\]?", text[at:])[0]
      raise UserError(f"[MASK{written} is not a valid mask; {_FORMS}")
    at = end.end()
    grows = end[1] == "*"
    if grows and at < len(text) and not anywhere:
      raise UserError(
        "[MASK:*] fills the rest of the text, so nothing may follow it; write"
        " [MASK:5] for five tokens"
      )
    parts.append(_Part(given, 0 if grows else int(end[1] or 1), grows))
    given = ""
  rest = given + text[at:]
  return [*parts, _Part(rest)] if rest or not parts else parts


def _spaces_begin_words(tokenizer: Tokenizer) -> bool:
  # Whether some token is a space followed by something else.
  return any(piece[:1] == b" " != piece for piece in tokenizer.pieces)
