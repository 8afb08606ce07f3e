r"""Parses prompts and infilling templates into rows for the sampler.

[MASK] is a hole of one token, [MASK:5] of five, [MASK:1-8] of one to eight, and
[MASK:*], which is allowed only at the end, of the rest of the row. A text
without a hole is a prompt: all of it is given, and the rest of the row is
drawn. A backslash makes \[MASK] literal; \\[MASK] is a backslash followed by a
hole. Which of one to eight tokens a hole has is decided by `hole_lengths.py`.

Given text is reproduced exactly, with one exception. SentencePiece tokens
include the space before a word, so one space in front of a hole belongs to the
hole: in "The [MASK] is", "The" and " is" are given, and " cat" can be drawn. If
the space were given, a word without its space would have to follow, which the
denoiser has never seen. Of two spaces in front of a hole one is given. The end
of a prompt counts as in front of a hole: "The " is the same prompt as "The".
Byte and character tokenizers have tokens for spaces, so all spaces are given.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data.tokenizer import Tokenizer
from mdm_jax.sampling.call import Canvas

_START = re.compile(r"(\\*)\[MASK")
_END = re.compile(r"(?::([1-9][0-9]{0,5})(?:-([1-9][0-9]{0,5}))?|(:\*))?\]")
_FORMS = (
  "write [MASK], [MASK:5] for five tokens (up to 999999), [MASK:1-8] for one to"
  " eight, [MASK:*] at the end for the rest of the text, or \\[MASK for literal"
  " text"
)
# Ways to choose the lengths of a text's holes; each costs denoiser calls.
_MOST_WAYS = 512


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
    untold: number, from 1, of the hole whose length is not told that a token is
      in; 0 elsewhere.
    grows: whether holes fill the rest of the row.
  """

  tokens: Int32[np.ndarray, "N"]
  free: Bool[np.ndarray, "N"]
  untold: Int32[np.ndarray, "N"]
  grows: bool = False


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Rows with every choice of lengths of some templates' holes.

  Attributes:
    canvas: the rows, text by text.
    untold: number, from 1, of the hole whose length is not told that a token is
      in; 0 elsewhere [B, L].
    counts: rows of each text.
  """

  canvas: Canvas
  untold: Int32[np.ndarray, "B L"]
  counts: Int[np.ndarray, "N"]


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
  """Given text, and the fewest and most tokens of the hole after it."""

  given: str
  least: int = 0
  most: int = 0
  grows: bool = False

  @property
  def tokens(self) -> str:
    told = self.least == self.most
    return str(self.most) if told else f"{self.least} to {self.most}"


def parse(text: str, tokenizer: Tokenizer) -> Template:
  """Returns the tokens and holes of a prompt or template.

  Example:
    parse("The [MASK:2] of", tokenizer).free  # e.g. [False, True, True, False]

  Raises:
    UserError: a hole is malformed or its length is not told, [MASK:*] is not at
      the end, or the text is not valid Unicode.
  """
  return _told(text, tokenizer)[0]


def _told(text: str, tokenizer: Tokenizer) -> list[Template]:
  found = ways(text, tokenizer)
  if len(found) > 1:
    raise UserError(
      "the length of a hole is not told; write [MASK:5] for five tokens"
    )
  return found


def ways(text: str, tokenizer: Tokenizer) -> list[Template]:
  """Returns a template for each choice of lengths of the untold holes.

  The last hole's length varies fastest. There is one template if all lengths
  are told.

  Raises:
    UserError: as `parse`, or there are too many choices.
  """
  check_characters(text)
  parts = _split(text)
  plain = len(parts) == 1 and not parts[0].most and not parts[0].grows
  given = [part.given for part in parts]
  # A space in front of a hole belongs to the hole (see the module's docstring).
  if _spaces_begin_words(tokenizer):
    given = [
      part.given.removesuffix(" ")
      if part.most or part.grows or plain
      else part.given
      for part in parts
    ]
  encoded = tokenizer.encode_batch(given)
  choices = [range(part.least, part.most + 1) for part in parts]
  _check_ways(parts, math.prod(map(len, choices)))
  grows = plain or parts[-1].grows
  open_ones = np.array([part.least < part.most for part in parts])
  numbers = (open_ones.cumsum() * open_ones).tolist()
  found = []
  for sizes in itertools.product(*choices):
    tokens, free, untold = [], [], []
    for ids, number, size in zip(encoded, numbers, sizes, strict=True):
      tokens += [ids, np.full(size, tokenizer.vocab.mask, np.int32)]
      free += [np.zeros(len(ids), bool), np.ones(size, bool)]
      untold += [np.zeros(len(ids), np.int32), np.full(size, number, np.int32)]
    joined = map(np.concatenate, (tokens, free, untold))
    found.append(Template(*joined, grows))
  return found


def _check_ways(parts: list[_Part], count: int) -> None:
  if count <= _MOST_WAYS:
    return
  open_ones = [part for part in parts if part.least < part.most]
  each = max(int(_MOST_WAYS ** (1 / len(open_ones)) + 1e-9), 1)
  first = open_ones[0].least
  raise UserError(
    f"the holes whose length is not told have {count:,} choices of lengths;"
    f" nearest valid: at most {_MOST_WAYS}, such as"
    f" [MASK:{first}-{first + each - 1}] for each"
  )


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
    np.append(template.untold, np.zeros(rest, np.int32)),
  )


def canvas(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Canvas:
  """Returns a canvas with a row of `length` tokens for each text.

  Raises:
    PromptError: `parse` or `fit` fails; it names the text if there are several.
  """
  found = candidates(texts, tokenizer, length, _told)
  return found.canvas


def candidates(
  texts: Sequence[str],
  tokenizer: Tokenizer,
  length: int,
  read: Callable[[str, Tokenizer], list[Template]] = ways,
) -> Candidates:
  """Returns rows of `length` tokens, one for each of the `ways` of each text.

  Raises:
    PromptError: `read` or `fit` fails; it names the text if there are several.
  """
  rows, lengths, counts = [], [], []
  for number, text in enumerate(texts, start=1):
    try:
      found = read(text, tokenizer)
      # The longest first: the error says what it needs.
      fit(found[-1], length, tokenizer.vocab)
      rows += [fit(one, length, tokenizer.vocab) for one in found]
    except UserError as error:
      raise PromptError(number, len(texts), str(error)) from None
    lengths += [length if one.grows else len(one.tokens) for one in found]
    counts.append(len(found))
  as_rows = lambda name, dtype: np.array(
    [getattr(row, name) for row in rows], dtype
  ).reshape(-1, length)
  tokens, free = as_rows("tokens", np.int32), as_rows("free", bool)
  return Candidates(
    Canvas(tokens, free, np.array(lengths, np.int32)),
    as_rows("untold", np.int32),
    np.array(counts, np.int64),
  )


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
  holes = [part for part in parts if part.most or part.grows]
  if len(holes) > 1:
    raise UserError(f"given has {len(holes)} holes, but a text fills one")
  before, after = parts[0].given, "".join(part.given for part in parts[1:])
  if _spaces_begin_words(tokenizer) and before.endswith(" "):
    before, text = before[:-1], f" {text}"
  ids = tokenizer.encode_batch([before, text, after])
  sizes = [len(part) for part in ids]
  if holes and not (
    holes[0].grows or holes[0].least <= sizes[1] <= holes[0].most
  ):
    raise UserError(
      f"the hole has {holes[0].tokens} token(s) and the text {sizes[1]}; write"
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
      written = re.match(r"[^\s\[\]]{0,14}\]?", text[at:])[0]
      raise UserError(f"[MASK{written} is not a valid mask; {_FORMS}")
    at = end.end()
    grows = bool(end[3])
    if grows and at < len(text) and not anywhere:
      raise UserError(
        "[MASK:*] fills the rest of the text, so nothing may follow it; write"
        " [MASK:5] for five tokens"
      )
    least = 0 if grows else int(end[1] or 1)
    most = int(end[2] or least)
    if most < least:
      raise UserError(
        f"[MASK:{least}-{most}] has no length; write [MASK:{most}-{least}]"
      )
    parts.append(_Part(given, least, most, grows))
    given = ""
  rest = given + text[at:]
  return [*parts, _Part(rest)] if rest or not parts else parts


def _spaces_begin_words(tokenizer: Tokenizer) -> bool:
  # Whether some token is a space followed by something else.
  return any(piece[:1] == b" " != piece for piece in tokenizer.pieces)
