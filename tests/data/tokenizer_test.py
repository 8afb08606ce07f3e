"""Tokenizers: exact round trips, the ids, files, and given models."""

import io
import json
import pydoc_data.topics

import numpy as np
import pytest
import sentencepiece
from absl import logging
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdm_jax.config import Config
from mdm_jax.core.errors import UserError
from mdm_jax.core.vocabulary import Vocabulary
from mdm_jax.data import sentencepiece_training
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig

TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]
KINDS = ("byte", "char", "sentencepiece")
HARD = (
  "a <0x41> b<unk></s><s><pad>",
  "\u2581space\u2581\u2581 symbol \u2581",
  "\0 NUL\0",
  "lone \r and \r\n and \n\n\n\n",
  "  spaces   everywhere  \t\n ",
  "\ufeff\ufb01 e\u0301 \uff21 \u2047 \u2585",
  "\U0001f469\u200d\U0001f680 \U0010ffff",
  "x" * 2500 + " " + "word " * 900 + "\u4e2d" * 2100,
  "",
)


def _build(kind, texts=TEXTS, **fields):
  config = TokenizerConfig(kind=kind, **{"vocab_size": 512, **fields})
  return tokenizers.build(config, texts)


@pytest.fixture(scope="module")
def built():
  return {kind: _build(kind) for kind in KINDS}


def _train(**options):
  """Returns a SentencePiece model as others may have trained one."""
  model = io.BytesIO()
  options = {"byte_fallback": True, "vocab_size": 400, **options}
  lines = [line for text in TEXTS for line in text.split("\n") if line.strip()]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  return model.getvalue()


def text_ids(tokenizer):
  """How many ids stand for text."""
  return sum(map(bool, tokenizer.pieces))


# MARK: ids


@pytest.mark.parametrize("num_text", [1, 124, 125, 8191])
def test_ids_do_not_overlap_and_fit(num_text):
  v = Vocabulary.after_text(num_text)
  special = [v.end, v.separator, v.pad, v.mask]
  assert special == list(range(num_text, num_text + 4))
  assert v.predictable == v.pad and v.forbidden == ((v.pad, v.size),)
  assert v.size % 128 == 0 and v.mask < v.size <= v.mask + 128


def test_number_of_pieces(built):
  assert text_ids(built["byte"]) == 256
  characters = set().union(*TEXTS)
  assert text_ids(built["char"]) == 256 + len(characters)
  assert text_ids(built["sentencepiece"]) == 511  # without the unknown
  for tokenizer in built.values():
    assert all(tokenizer.pieces[: text_ids(tokenizer)])
    assert len(set(tokenizer.pieces)) >= text_ids(tokenizer) - 128


# MARK: round trips


def _check(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert np.all((ids >= 0) & (ids < text_ids(tokenizer)))
  assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text())
@settings(deadline=None, max_examples=150)
def test_any_text_comes_back(built, kind, text):
  _check(built[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(built, kind, text):
  _check(built[kind], text)


@given(parts=st.lists(st.sampled_from([*HARD, *"ab .\n\u2581"]), max_size=8))
@example(parts=["\u2581", "\n"])
@settings(deadline=None, max_examples=100)
def test_mixtures_of_hard_texts_come_back(built, parts):
  _check(built["sentencepiece"], "".join(parts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_texts_one_by_one(built, kind):
  texts = [*HARD, *TEXTS]
  batch = built[kind].encode_batch(texts)
  assert len(batch) == len(texts)
  for ids, text in zip(batch, texts, strict=True):
    assert np.array_equal(ids, built[kind].encode(text))
    assert built[kind].decode(ids) == text
  assert built[kind].encode_batch([]) == []


def test_cutting_a_text_into_chunks_changes_no_id(built):
  tokenizer = built["sentencepiece"]
  text = "\n".join(TEXTS).replace("\n", " ", 5000)
  assert len(sentencepiece_training.chunks(text)) > 50
  whole = tokenizer._ids[tokenizer._model.encode(text)]
  # Sums over a whole text are rounded, so here and there a tie breaks apart.
  assert abs(len(whole) - len(tokenizer.encode(text))) <= 1e-3 * len(whole)


def test_bytes_are_the_ids_of_a_byte_tokenizer(built):
  text = "caf\u00e9 \U0001f600"
  assert bytes(built["byte"].encode(text).tolist()) == text.encode()


def test_unseen_characters_are_spelt_in_bytes(built):
  text = "a\u4e2db\u0416\U0001f600"
  ids = built["char"].encode(text)
  assert bytes(ids[ids < 256].tolist()) == "\u4e2d\u0416\U0001f600".encode()
  assert (ids >= 256).sum() == 2


def test_decode_leaves_out_special_ids_and_mends_bytes(built):
  tokenizer = built["byte"]
  v = tokenizer.vocab
  ids = [65, v.mask, 66, v.separator, v.pad, v.end, v.size - 1, 0xFF]
  assert tokenizer.decode(ids) == "AB\ufffd"
  assert tokenizer.decode(np.array(ids)) == "AB\ufffd"
  assert tokenizer.decode([]) == ""


# MARK: training


def test_training_is_deterministic_and_compresses(built):
  again = _build("sentencepiece")
  assert again.content == built["sentencepiece"].content
  ids = again.encode_batch(TEXTS)
  assert sum(map(len, ids)) < 0.6 * sum(map(len, TEXTS))


def test_line_breaks_are_pieces(built):
  pieces = built["sentencepiece"].pieces
  ids = built["sentencepiece"].encode("a\n\nb\n")
  assert [pieces[i] for i in ids] == [b"a", b"\n\n", b"b", b"\n"]


@pytest.mark.parametrize(
  "texts",
  [["a"], ["hello world\n"], ["<0x41> <s>"] * 9, ["\u4e2d\u6587\u3002"]],
)
def test_a_tiny_text_gives_a_smaller_vocabulary(texts):
  tokenizer = _build("sentencepiece", texts, vocab_size=8192)
  assert 258 < text_ids(tokenizer) < 400
  for text in (*texts, *HARD):
    _check(tokenizer, text)


def test_more_characters_than_pieces_are_spelt_in_bytes():
  text = "".join(map(chr, range(0x4E00, 0x5200))) + " plain words" * 50
  tokenizer = _build("sentencepiece", [text], vocab_size=400)
  assert text_ids(tokenizer) <= 400
  _check(tokenizer, text)


def test_a_vocabulary_too_small_is_refused():
  with pytest.raises(UserError, match="vocab_size=319 must be at least 320"):
    _build("sentencepiece", vocab_size=319)
  _check(_build("sentencepiece", vocab_size=320), TEXTS[0])


def test_no_text_to_train_on_is_reported():
  with pytest.raises(UserError, match="can't train on 0 lines"):
    _build("sentencepiece", ["\n \n"])


# MARK: files


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(built, kind, tmp_path):
  built[kind].save(tmp_path / "new")
  (file,) = (tmp_path / "new").iterdir()
  assert file.name == built[kind].filename
  loaded = tokenizers.load_tokenizer(tmp_path / "new")
  assert loaded.kind == kind and type(loaded) is type(built[kind])
  assert loaded.pieces == built[kind].pieces
  assert loaded.sha256 == built[kind].sha256
  for text in HARD:
    assert np.array_equal(loaded.encode(text), built[kind].encode(text))


def test_hashes_tell_tokenizers_apart(built):
  others = [_build("char", ["abc"]), _build("char", ["abd"])]
  hashes = {t.sha256 for t in [*built.values(), *others]}
  assert len(hashes) == 5


def test_a_folder_without_tokenizer_is_reported(tmp_path):
  with pytest.raises(UserError, match="contains neither tokenizer.model"):
    tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
  "content",
  ["", "{", "[]", '{"kind": "byte"}']
  + [json.dumps({"kind": "char", "characters": 3})],
)
def test_a_damaged_file_is_reported(tmp_path, content):
  (tmp_path / "tokenizer.json").write_text(content)
  with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
    tokenizers.load_tokenizer(tmp_path)


# MARK: given models


def _given(tmp_path, content):
  path = tmp_path / "given.model"
  path.write_bytes(content)
  return _build("sentencepiece", path=str(path))


def test_a_given_model_is_used_as_it_is(built, tmp_path):
  tokenizer = _given(tmp_path, built["sentencepiece"].content)
  assert tokenizer.sha256 == built["sentencepiece"].sha256


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 99])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
  with pytest.raises(UserError, match="given.model is not a SentencePiece"):
    _given(tmp_path, content)


def test_a_missing_model_is_refused(tmp_path):
  with pytest.raises(UserError, match="none.model: there is no such file"):
    _build("sentencepiece", path=f"{tmp_path}/none.model")


def test_a_model_without_byte_fallback_is_refused(tmp_path):
  with pytest.raises(UserError, match="has no byte fallback"):
    _given(tmp_path, _train(byte_fallback=False))


def test_a_model_that_changes_text_is_warned_about(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda m, *a: said.append(m % a))
  tokenizer = _given(tmp_path, _train(pad_id=3))
  assert len(said) == 1 and "given.model changes text" in said[0]
  assert not tokenizer.lossless
  # Its four special symbols are no text; what it normalises it keeps.
  assert text_ids(tokenizer) == len(tokenizer._model) - 4
  text = "Words  and\n\n \u2581 \U0001f600 more <s>" + "x" * 3000
  model = tokenizer._model
  assert tokenizer.decode(tokenizer.encode(text)).lstrip() == model.decode(
    model.encode(text)
  )


def test_no_warning_about_a_lossless_model(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda m, *a: said.append(m % a))
  content = _train(
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    model_type="bpe",
  )
  tokenizer = _given(tmp_path, content)
  assert tokenizer.lossless and not said
  for text in HARD:
    _check(tokenizer, text)


def test_found_B7_words_that_take_long_are_announced(monkeypatch):
  said, train = [], sentencepiece_training._train_on
  monkeypatch.setattr(logging, "warning", lambda m, *a: said.append(m % a))
  monkeypatch.setattr(
    sentencepiece_training,
    "_train_on",
    lambda *a: said.append("trained") or train(*a),
  )
  prose = "Words of a usual length, and one " + "of" * 40 + ".\n"
  for text in (prose * 40 + "GATTACA" * 99, TEXTS[0], "\u7684\u4eba" * 999):
    tokenizers.build(TokenizerConfig(vocab_size=400), [text])
  hint, *others = said
  assert "words of 50 characters or more, which are 74 % of the text" in hint
  assert "tokenizer.kind=char" in hint and others == ["trained"] * 3


# MARK: kinds of one's own


class Letters(tokenizers.Tokenizer):
  """One id a letter of an alphabet; nothing else is text."""

  kind = "letters"

  def __init__(self, alphabet):
    content = json.dumps({"kind": "letters", "alphabet": alphabet}).encode()
    super().__init__(tuple(c.encode() for c in alphabet), content)
    self.alphabet = alphabet

  def encode_batch(self, texts):
    return [
      np.array([self.alphabet.index(c) for c in text], np.int32)
      for text in texts
    ]


def test_a_kind_of_your_own_is_built_saved_and_loaded(tmp_path, monkeypatch):
  kinds = tokenizers.TOKENIZERS
  monkeypatch.setattr(kinds, "_pieces", dict(kinds._pieces))
  kinds.register(
    "letters",
    tokenizers.Kind(
      build=lambda config, texts: Letters("".join(sorted(set("".join(texts))))),
      load=lambda fields: Letters(fields["alphabet"]),
      planned=lambda config: Vocabulary.after_text(26),
    ),
  )
  config = TokenizerConfig(kind="letters")
  assert Config(tokenizer=config).tokenizer.kind == "letters"
  assert tokenizers.planned_vocabulary(config) == Vocabulary.after_text(26)
  built = tokenizers.build(config, ["cab", "bad"])
  built.save(tmp_path)
  loaded = tokenizers.load_tokenizer(tmp_path)
  assert loaded.alphabet == "abcd" and loaded.sha256 == built.sha256
  assert loaded.decode(loaded.encode("dabc")) == "dabc"


def test_a_saved_kind_that_nobody_registered_is_reported(tmp_path):
  Letters("ab").save(tmp_path)
  with pytest.raises(UserError, match="'letters': unknown kind of tokenizer"):
    tokenizers.load_tokenizer(tmp_path)


# MARK: GPT-2's

MERGES = (
  *("\u0120 t", "\u0120 a", "h e", "i n", "\u0120t he"),
  *("a b", "ab c", "b c"),
)


def _gpt2(folder, *merges):
  path = folder / "merges.txt"
  path.write_text("\n".join(["#version: 0.2", *merges, ""]))
  return _build("gpt2", path=str(path))


def test_gpt2s_ids_are_its_bytes_then_its_merges(tmp_path):
  tokenizer = _gpt2(tmp_path, *MERGES)
  ids = lambda text: tokenizer.encode(text).tolist()
  # As in its own vocabulary.
  assert ids("!") == [0] and ids("\n") == [198] and ids(" ") == [220]
  assert ids(" the") == [260] and ids("the")[1:] == [258]
  assert ids("in the in") == [259, 260, 220, 259]
  assert ids("abcab") == [262, 261]  # from the left, the first merge first
  assert ids("ab's") == [261, 6, 82]
  assert tokenizer.vocab.end == 256 + len(MERGES)
  for text in HARD:
    assert tokenizer.decode(ids(text)) == text
  tokenizer.save(tmp_path / "new")
  (tmp_path / "merges.txt").unlink()
  loaded = tokenizers.load_tokenizer(tmp_path / "new")
  assert loaded.sha256 == tokenizer.sha256
  assert loaded.encode(" the in").tolist() == ids(" the in")


@pytest.mark.parametrize(
  "merges, told",
  [(("a b c",), "merge 1, 'a b c',"), (("a b", "ab cd"), "merge 2, 'ab cd',")],
)
def test_a_file_that_is_not_of_merges_is_reported(tmp_path, merges, told):
  with pytest.raises(UserError, match=f"merges.txt: {told}"):
    _gpt2(tmp_path, *merges)


@pytest.mark.parametrize("path", ["", "none/merges.txt"])
def test_gpt2_without_its_file_is_reported(path):
  with pytest.raises(UserError, match=f"tokenizer.path={path}: .*merges.txt"):
    _build("gpt2", path=path)
