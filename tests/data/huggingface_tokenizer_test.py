"""A tokenizer.json gives its own ids, and every special id a place."""

import json
import sys

import huggingface_harness as harness
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from mdm_jax.core.errors import UserError
from mdm_jax.data import huggingface_tokenizer
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.huggingface.folder import open_folder

TEXT = "the caf\u00e9 \U0001f600\r\n <end> th\ufb01 "


def load(folder, tokenizer=None, **config):
  config = {"vocab_size": 300, "eos_token_id": 256} | config
  (folder / "config.json").write_text(json.dumps(config))
  (tokenizer or harness.tokenizer()).save(str(folder / "tokenizer.json"))
  return huggingface_tokenizer.from_folder(open_folder(f"hf:{folder}"))


def test_ids_are_the_files_and_text_comes_back(tmp_path):
  found = load(tmp_path)
  theirs = harness.tokenizer()
  assert found.encode("the th").tolist() == theirs.encode("the th").ids
  # `theirs` would make one id of <end>: a text that forges a document's end.
  assert 256 in theirs.encode(TEXT).ids
  assert 256 not in found.encode(TEXT)
  assert found.decode([256, *found.encode(TEXT).tolist(), 299]) == TEXT
  assert found.lossless
  assert len(found.pieces) == 300 and found.pieces[257] == b"th"
  assert b"".join(found.pieces[i] for i in found.encode(TEXT)) == TEXT.encode()


def test_a_mask_and_padding_get_rows_that_the_file_does_not_use(tmp_path):
  found = load(tmp_path)
  vocab = found.vocab
  assert (vocab.end, vocab.begin, vocab.mask, vocab.pad) == (
    256,
    None,
    258,
    259,
  )
  assert found.fresh == (258, 259)
  assert (vocab.size, vocab.forbidden) == (300, ((258, 300),))


def test_a_full_embedding_grows(tmp_path):
  vocab = load(tmp_path, vocab_size=258).vocab
  assert (vocab.mask, vocab.pad, vocab.size) == (258, 259, 384)


def test_special_ids_may_be_anywhere(tmp_path):
  found = load(tmp_path, mask_token_id=3, pad_token_id=256, bos_token_id=9)
  vocab = found.vocab
  assert (vocab.mask, vocab.begin, vocab.end) == (3, 9, 256)
  # Padding that also ends texts would make the end unpredictable.
  assert vocab.pad == 258 and found.fresh == (258,)
  assert vocab.forbidden == ((3, 4), (258, 300))


def test_names_in_the_tokenizers_config_count_as_well(tmp_path):
  names = {"pad_token": {"content": "th"}, "chat_template": "{{ messages }}"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
  found = load(tmp_path, eos_token_id=[256, 7])
  assert (found.vocab.end, found.vocab.pad) == (256, 257)
  assert found.chat_template == "{{ messages }}"


def test_it_is_saved_with_all_of_this(tmp_path):
  found = load(tmp_path, mask_token_id=3)
  found.save(tmp_path / "run")
  again = tokenizers.load_tokenizer(tmp_path / "run")
  assert again.sha256 == found.sha256 and again.vocab == found.vocab
  assert again.encode(TEXT).tolist() == found.encode(TEXT).tolist()
  assert json.loads(again.file) == json.loads(found.file)


def test_it_can_be_used_without_a_model(tmp_path):
  load(tmp_path)
  path = str(tmp_path / "tokenizer.json")
  config = TokenizerConfig(kind="huggingface", path=path)
  found = tokenizers.build(config, [])
  assert found.vocab.size == 384
  assert tokenizers.planned_vocabulary(config) == found.vocab
  gone = TokenizerConfig(kind="huggingface", path=path + "x")
  with pytest.raises(UserError, match="there is no such file"):
    tokenizers.build(gone, [])


def test_a_tokenizer_that_normalises_decodes_by_its_own_rules(tmp_path, caplog):
  ids = {
    "<unk>": 0,
    "\u2581a": 1,
    "b": 2,
    "<0xC3>": 3,
    "<0xA9>": 4,
    "\u2581": 5,
    "a": 6,
  }
  merges = [("\u2581", "a")]
  tokenizer = Tokenizer(
    models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True)
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  found = load(tmp_path, tokenizer)
  assert found.decode(found.encode("a\u00e9 ab")) == "a\u00e9 ab"
  pieces = [b"<unk>", b" a", b"b", b"\xc3", b"\xa9", b" ", b"a"]
  assert list(found.pieces[:7]) == pieces
  assert not found.lossless and "changes text" in caplog.text


DAMAGED = {
  "no JSON": ("{", "is not a tokenizer"),
  "no tokenizer": ('{"model": {"type": "BPE"}}', "is not a tokenizer"),
  "not UTF-8": (b"\xff", "is not UTF-8"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, what):
  content, message = DAMAGED[what]
  content = content if isinstance(content, bytes) else content.encode()
  load(tmp_path)
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    huggingface_tokenizer.from_folder(open_folder(f"hf:{tmp_path}"))
  assert "\n" not in str(error.value)


def test_fewer_rows_than_ids_are_refused(tmp_path):
  with pytest.raises(UserError, match="258 ids, the model only 200 rows"):
    load(tmp_path, vocab_size=200)


def test_without_the_package_one_line_says_what_to_install(
  tmp_path, monkeypatch
):
  load(tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match=r"pip install -e '.\[huggingface\]'"):
    huggingface_tokenizer.from_folder(open_folder(f"hf:{tmp_path}"))
