"""Trains SentencePiece models that restore every text exactly."""

import io
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import sentencepiece
from absl import logging

from mdm_jax.core.errors import UserError
from mdm_jax.data import words

SPACE = "\u2581"  # SentencePiece's symbol for a space
_BREAKS = ("\n\n", "\n")
_SMALLEST = 320  # unknown, 256 bytes, two line breaks, and 61 to learn
_MAX_LINES = 200_000  # most lines that SentencePiece learns from

# A text may be encoded in chunks if no piece crosses the cuts: around line
# breaks and before spaces. Short chunks keep the sums of piece scores small
# enough to be exact in float32, and keep every core busy. The second quantifier
# bounds a chunk where text has no spaces.
CHUNK = f"{SPACE}|[^\n{SPACE}]{{1,1000}}[^\n {SPACE}]{{0,1000}}\n*|\n+"


def chunks(text: str) -> list[str]:
  """Cuts a text into chunks that no piece crosses; they join to the text."""
  return re.findall(CHUNK, text)


def train(vocab_size: int, texts: Sequence[str]) -> bytes:
  """Trains a unigram model with byte fallback; returns its file's bytes.

  Args:
    vocab_size: most pieces; a short text gives fewer.
    texts: what to learn from; beyond 200,000 lines, a random sample of them.

  Raises:
    UserError: `vocab_size` is too small, or SentencePiece can't train on so
      little text.
  """
  if vocab_size < _SMALLEST:
    raise UserError(
      f"tokenizer.vocab_size={vocab_size} must be at least {_SMALLEST}, or set"
      " tokenizer.kind=byte"
    )
  if (share := words.share_of_runs(texts)) > 0.1:
    logging.warning(
      "SentencePiece trains slowly on words of 50 characters or more, which are"
      " %.0f %% of the text; tokenizer.kind=char or byte needs no training",
      100 * share,
    )
  lines = [line for text in texts for line in _lines(text)]
  if len(lines) > _MAX_LINES:
    # A fixed seed, so the same text always gives the same model.
    lines = random.Random(0).sample(lines, _MAX_LINES)
  content = _train_on(_common_characters(lines, vocab_size), vocab_size)
  size = len(sentencepiece.SentencePieceProcessor(model_proto=content))
  if size < vocab_size:
    logging.info(
      "The text is too short for tokenizer.vocab_size=%d: SentencePiece found"
      " %d pieces.",
      vocab_size,
      size,
    )
  return content


def _lines(text: str) -> Iterator[str]:
  # Line breaks are symbols of their own, so nothing is learnt across them.
  cut = (chunk.rstrip("\n") for chunk in chunks(text))
  return (chunk for chunk in cut if chunk and not chunk.isspace())


def _common_characters(lines: list[str], vocab_size: int) -> list[str]:
  """Replaces rare characters by spaces if there are too many to be pieces."""
  counts = Counter(itertools.chain.from_iterable(lines))
  # Leaves at least half of the pieces that aren't bytes to be learnt.
  room = (vocab_size - 256) // 2
  if len(counts) <= room:
    return lines
  logging.info(
    "Only the %d most common of %d characters can become pieces; the rest is"
    " spelled in bytes.",
    room,
    len(counts),
  )
  rare = [c for c, _ in counts.most_common()[room:]]
  table = str.maketrans(dict.fromkeys(rare, " "))
  return [line.translate(table) for line in lines]


def _train_on(lines: list[str], vocab_size: int) -> bytes:
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type="unigram",
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      character_coverage=0.9995,
      required_chars=SPACE,  # spelt in bytes it would decode to U+2581
      byte_fallback=True,
      user_defined_symbols=list(_BREAKS),
      unk_id=0,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      max_sentence_length=16_384,  # bytes; a chunk has at most 8,000
      num_threads=2,
      minloglevel=2,
    )
  except RuntimeError as e:
    raise UserError(
      f"SentencePiece can't train on {len(lines)} lines of text; set"
      " tokenizer.kind=byte"
    ) from e
  return model.getvalue()
