"""A tokenizer as tokenizer.json: the same ids, or what is inexact is said."""

import io
import pydoc_data.topics
import random

import huggingface_harness as harness
import pytest
import scripts_harness
import sentencepiece

from mdm_jax.data import byte_pairs, huggingface_tokenizer, tokenizer_json
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.huggingface_tokenizer import parsed

PAGES = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
SCRIPTS = [
  "".join(getattr(scripts_harness, name)(random.Random(0), 30))
  for name in ("chinese", "hindi", "arabic", "thai", "english")
]
# One run of thousands of characters without a space.
LONG = "".join(scripts_harness.chinese(random.Random(1), 400))
SPECIAL = ["a<|mask|> <|end|>b", "\u2581 <0x41>", "\n" * 9, ""]
TIES = "tokenizer.json may order pieces of a run, as of '=', differently"


def gpt2():
  """GPT-2's rules, with a few merges."""
  merges = ["t h", "th e", "\u0120 the", "i n", "1 2", "' t"]
  assert all(len(m.split(" ")) == 2 for m in merges)
  assert byte_pairs.BytePairs(merges).pieces[258] == b" the"
  return tokenizers.BytePairTokenizer(merges)


def trained(kind, texts):
  config = TokenizerConfig(kind=kind, vocab_size=1000)
  return tokenizers.build(config, texts)


BUILT = {
  "byte": lambda: trained("byte", []),
  "char": lambda: trained("char", SCRIPTS),
  "sentencepiece": lambda: trained("sentencepiece", SCRIPTS),
  "gpt2": gpt2,
}


@pytest.mark.parametrize("kind", BUILT)
def test_ids_are_ours(kind):
  tokenizer = BUILT[kind]()
  made = tokenizer_json.written(tokenizer)
  assert made.why == ""
  file = parsed(made.content, "tokenizer.json")
  for text in (*PAGES, *SCRIPTS, *SPECIAL, LONG[:9000]):
    ids = file.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text).tolist()
    assert file.decode(ids) == text
  vocab = tokenizer.vocab
  for name in ("end", "separator", "pad", "mask"):
    assert file.token_to_id(made.names[name]) == getattr(vocab, name)


def test_equally_likely_splits_are_said():
  """Lines of = and - in a manual: SentencePiece rounds, we add exactly."""
  tokenizer = trained("sentencepiece", PAGES)
  made = tokenizer_json.written(tokenizer)
  assert made.why == TIES
  file = parsed(made.content, "tokenizer.json")
  text = "\n".join("=" * n for n in range(1, 100))
  ids, ours = file.encode(text).ids, tokenizer.encode(text).tolist()
  assert ids != ours and sorted(ids) == sorted(ours)


def test_a_given_model_that_changes_text_has_no_file():
  model = io.BytesIO()
  lines = [line for text in PAGES for line in text.split("\n") if line.strip()]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    byte_fallback=True,
    vocab_size=400,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  tokenizer = tokenizers.SentencePieceTokenizer(model.getvalue())
  made = tokenizer_json.written(tokenizer)
  assert made.content is None and "would give other ids for" in made.why


def test_a_file_that_was_read_goes_out_as_it_was(tmp_path):
  harness.save(tmp_path, {})
  file = tmp_path / "tokenizer.json"
  # Written in another way than any library would.
  file.write_text(file.read_text().replace("{", "{ ", 1))
  config = TokenizerConfig(kind="huggingface", path=str(file))
  tokenizer = huggingface_tokenizer.KIND.build(config, [])
  made = tokenizer_json.written(tokenizer)
  assert made.content == file.read_text() and not made.why
  assert made.names == {"end": "<end>"}
