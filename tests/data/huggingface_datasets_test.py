"""Hugging Face datasets: folders, splits, mistakes, and a hub on this machine.

The hub is `hub_server.py`, which programs in processes of their own read.
"""

import gzip
import json
import subprocess
import sys

import command_harness as commands
import prepare_harness as harness
import pytest
from paths import TESTS

from mdm_jax.core import network
from mdm_jax.core.errors import UserError
from mdm_jax.data import blocks, corpora
from mdm_jax.data.config import DataConfig
from mdm_jax.data.text_files import Tally
from mdm_jax.workdir import Workdir

datasets = pytest.importorskip(
  "datasets", reason="needs: pip install -e '.[huggingface]'"
)
pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TEXTS = [
  *harness.TOPICS,
  *("نص عربي. جملة ثانية.", "这是中文。第二句。", "👩‍👩‍👧 emoji\r\n", "", " "),
]
FULL = [text for text in TEXTS if text.strip()]
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  """Nothing may leave this machine."""
  monkeypatch.setattr(network, "reaches", lambda url: False)


def _error(corpus, **data):
  with pytest.raises(UserError) as caught:
    config = corpora.settle(DataConfig(corpus=f"hf:{corpus}", **data))
    corpora.load_and_count(config.corpus, config)
  message = str(caught.value)
  assert "\n" not in message
  return message


def _parquet(path, texts=TEXTS, **columns):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.table({"id": range(len(texts)), "text": texts} | columns)
  parquet.write_table(table, path, row_group_size=5)


def _lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  write = gzip.open if path.suffix == ".gz" else open
  with write(path, "wt", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def _rows(texts):
  return [{"id": i, "text": text} for i, text in enumerate(texts)]


# MARK: folders


def _in_parts(write, names):
  def written(folder):
    for i, name in enumerate(names):
      write(folder / name, TEXTS[10 * i : 10 * i + 10 if i < 2 else None])

  return written


def _saved(folder):
  datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)


def _saved_splits(folder):
  whole = datasets.Dataset.from_dict({"text": TEXTS})
  datasets.DatasetDict(train=whole).save_to_disk(folder)


def _list(folder):
  (folder / "all.json").write_text(json.dumps(_rows(TEXTS)))


_json_lines = lambda path, texts: _lines(path, _rows(texts))
_NAMES = [f"train-{i:05d}-of-00003" for i in range(3)]
LAYOUTS = {
  "parquet": _in_parts(_parquet, [f"data/{n}.parquet" for n in _NAMES]),
  "json lines": _in_parts(_json_lines, ["a.jsonl", "b.jsonl", "c.jsonl"]),
  "gzip": _in_parts(_json_lines, [f"{n}.json.gz" for n in _NAMES]),
  "json list": _list,
  "saved": _saved,
  "saved splits": _saved_splits,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_holds_the_same_documents_whole_or_in_blocks(layout, tmp_path):
  LAYOUTS[layout](tmp_path)
  data = corpora.settle(
    DataConfig(corpus=f"hf:{tmp_path}", block_megabytes=0.005)
  )
  documents, tally = corpora.load_and_count(data.corpus, data)
  assert [document.text for document in documents] == FULL
  assert (tally.records, tally.bad) == (len(TEXTS), 0)
  assert len({document.name for document in documents}) == len(FULL)
  found = blocks.cut(data)
  assert len(found) >= {"parquet": 5, "json lines": 3, "gzip": 3}.get(layout, 1)
  parts = [blocks.read(data, block, Tally()) for block in found]
  assert [document for part in parts for document in part] == documents


def test_rows_are_those_of_the_same_text_files(tmp_path):
  files = tmp_path / "files"
  LAYOUTS["parquet"](files)
  made = {}
  for kind, corpus in (("text", f"{files}/**/*.parquet"), ("hf", files)):
    folder = tmp_path / kind
    corpus = f"{kind}:{corpus}"
    changes = {"data__corpus": corpus, "stage__easiest": 1.0}
    changes["tokenizer__kind"] = "byte"
    harness.fill(harness.make_config(files, folder, **changes))
    made[kind] = harness.contents(folder)
    made[kind].pop("manifest.json")
  assert made["text"] == made["hf"] and len(made["hf"]) > 10


def test_a_moved_folder_is_the_same_corpus(tmp_path):
  LAYOUTS["parquet"](tmp_path / "a")
  cut = lambda name: blocks.cut(
    corpora.settle(DataConfig(corpus=f"hf:{tmp_path / name}"))
  )
  before = blocks.files(cut("a"))
  (tmp_path / "a").rename(tmp_path / "b")
  assert blocks.files(cut("b")) == before
  _parquet(tmp_path / "b" / "data" / f"{_NAMES[0]}.parquet", ["other"])
  assert blocks.files(cut("b")) != before


# MARK: splits


@pytest.fixture
def split(tmp_path):
  """A folder of three splits."""
  for name in ("train", "validation", "test"):
    _lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} text"}])
  return tmp_path


def _texts(data):
  found = corpora.load_all(corpora.settle(data))
  return {side: documents[0].text for side, (documents, _) in found.items()}


def test_a_dataset_is_held_out_as_it_is_split(split):
  assert _texts(DataConfig(corpus=f"hf:{split}")) == {
    side: f"{side} text" for side in ("train", "validation", "test")
  }


def test_a_named_split_is_all_that_is_read(split):
  assert _texts(DataConfig(corpus=f"hf:{split},split=validation")) == {
    "train": "validation text"
  }


def test_held_out_corpora_of_the_config_come_first(split):
  (split / "own.txt").write_text("my own")
  data = DataConfig(
    corpus=f"hf:{split},split=train",
    validation_corpus=f"text:{split}/own.txt",
    test_corpus=f"hf:{split}",
  )
  wanted = {"train": "train text", "validation": "my own", "test": "test text"}
  assert _texts(data) == wanted


def test_a_dataset_without_a_train_split_asks_which(tmp_path):
  for name in ("test", "validation"):
    _lines(tmp_path / f"{name}.jsonl", [{"text": name}])
  message = _error(tmp_path)
  assert "no split 'train'; choose: split=validation, split=test" in message
  assert "did you mean 'test'" in _error(f"{tmp_path},split=tset")


def test_a_saved_dataset_has_its_own_splits(tmp_path):
  parts = {n: datasets.Dataset.from_dict({"text": [n]}) for n in ("en", "de")}
  datasets.DatasetDict(parts).save_to_disk(tmp_path)
  assert "choose: split=en, split=de" in _error(tmp_path)
  data = DataConfig(corpus=f"hf:{tmp_path},split=de")
  assert _texts(data)["train"] == "de"
  assert "without subsets" in _error(f"{tmp_path},subset=de")


def test_subsets(tmp_path):
  of = lambda name: f"- config_name: {name}\n  data_files: {name}/*.jsonl\n"
  card = f"---\nconfigs:\n{of('en')}{of('de')}---\n"
  (tmp_path / "README.md").write_text(card)
  for name in ("en", "de"):
    _lines(tmp_path / name / "a.jsonl", [{"text": name}])
  assert _texts(DataConfig(corpus=f"hf:{tmp_path},subset=de"))["train"] == "de"
  assert "several subsets; add ,subset= and one of en, de" in _error(tmp_path)
  assert "valid: de, en" in _error(f"{tmp_path},subset=fr")


# MARK: mistakes


def test_what_follows_hf_is_checked(tmp_path):
  LAYOUTS["json lines"](tmp_path)
  assert "did you mean 'split'?" in _error(f"{tmp_path},spilt=train")
  assert "a folder has no revision" in _error(f"{tmp_path}@main")
  assert f"write 'text:{tmp_path}/a.jsonl'" in _error(f"{tmp_path}/a.jsonl")
  assert "no folder and no name" in _error(f"{tmp_path}/nothing")


def test_a_missing_column_names_the_likeliest(tmp_path):
  row = {"id": 1, "title": "Short", "content": "This is much longer."}
  _lines(tmp_path / "a.jsonl", [row])
  message = _error(tmp_path)
  assert "no column 'text', only id (int64), title (string)" in message
  assert "set data.text_key=content" in message
  assert "'id' holds int64, not text" in _error(tmp_path, text_key="id")
  data = DataConfig(corpus=f"hf:{tmp_path}", text_key="content")
  assert _texts(data)["train"] == row["content"]


@pytest.mark.parametrize(
  "value", [["One.", "Two."], [{"role": "user", "content": "Hi."}]]
)
def test_lists_of_paragraphs_or_messages_are_refused(value, tmp_path):
  _lines(tmp_path / "a.jsonl", [{"turns": value, "text": "x"}])
  message = _error(tmp_path, text_key="turns")
  assert "'turns' holds lists or records (list<" in message
  assert "paragraphs or messages" in message


@pytest.mark.parametrize(
  "texts, reason",
  [
    (["a", None, "b"], "row 2: None instead of text"),
    ([b"a", b"\xff", b"b"], "row 2: not valid UTF-8"),
  ],
)
def test_a_bad_row_is_reported_or_left_out(texts, reason, tmp_path):
  raw = pa.array(texts, pa.binary()).cast(pa.string(), safe=False)
  _parquet(tmp_path / "a.parquet", raw)
  message = _error(tmp_path)
  assert f"a.parquet, {reason}" in message
  assert message.endswith("data.on_bad_record=skip leaves such records out")
  data = DataConfig(corpus=f"hf:{tmp_path}", on_bad_record="skip")
  documents, tally = corpora.load_and_count(data.corpus, data)
  assert [document.text for document in documents] == ["a", "b"]
  assert (tally.records, tally.bad) == (3, 1)


# Without the time of day, which would be in the test's name.
_CUT_OFF = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:20]


@pytest.mark.parametrize(
  "name, content, words",
  [
    ("a.jsonl", b"", "its first file is empty"),
    ("a.jsonl", b'{"text": 1', "JSON"),
    ("a.json.gz", _CUT_OFF, "ended before"),
    ("a.parquet", b"PAR1 and no more", "arquet"),
    ("a.txt", b"caf\xe9\n", "utf-8"),
    ("a.png", b"", "only tables with text"),
    ("state.json", b"{}", "_data_files"),
    ("other.bin", b"", "can't be read"),
  ],
)
def test_a_damaged_folder_is_one_line(name, content, words, tmp_path):
  (tmp_path / name).write_bytes(content)
  assert words in _error(tmp_path)


# MARK: the hub


def test_without_a_network_it_says_how_to_go_on(monkeypatch):
  message = _error("me/tiny@main,split=train")
  assert "huggingface.co can't be reached" in message
  download = "hf download me/tiny --repo-type=dataset --local-dir=FOLDER"
  assert download in message and "HF_DATASETS_OFFLINE=1" in message
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  message = _error("me/tiny")
  assert "not in the cache of datasets" in message and download in message


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  """A hub with two commits of a dataset, and the environment to read it."""
  folder = tmp_path_factory.mktemp("hub")
  dataset = folder / "hub" / "me" / "tiny"
  LAYOUTS["parquet"](dataset / OLD)
  _parquet(dataset / OLD / "data" / "test-00000-of-00001.parquet", FULL[:9])
  _parquet(dataset / NEW / "train.parquet", FULL[::-1])
  command = [sys.executable, TESTS / "hub_server.py", folder / "hub"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
    env = commands.environment(
      folder / "cache", HF_ENDPOINT=endpoint, HF_HOME=str(folder / "home")
    )
    yield dataset, env
    server.terminate()


def _prepare(hub, tmp_path, newest, *args):
  dataset, env = hub
  (dataset / "main").write_text(newest)
  args = (
    *("--mode=prepare", "--config=config.py", "--workers=1", *args),
    "--config.data.block_megabytes=0.06",
  )
  return commands.call(tmp_path, env, *args)


def _read_manifest(folder):
  return json.loads((folder / "manifest.json").read_text())


CONFIG = """
from mdm_jax.config import default_config, stage

def get_config(arg=""):
  config = default_config()
  config.data.update(corpus="hf:me/tiny", prepared="rows", batch_size=1)
  config.tokenizer.kind = "byte"
  config.stages = (stage(length=64),)
  return config
"""


def test_a_dataset_of_the_hub_is_read_at_one_commit(hub, tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  done = _prepare(hub, tmp_path, OLD)
  assert done.returncode == 0, done.stderr
  assert f"train is read from hf:me/tiny@{OLD}" in done.stdout
  manifest = _read_manifest(tmp_path / "rows")
  assert manifest["revisions"] == {
    side: f"me/tiny@{OLD}" for side in ("train", "test")
  }
  assert manifest["documents"]["bytes"] == sum(len(t.encode()) for t in FULL)
  assert manifest["split"]["given"] == ["test"]
  # Finished rows need no hub, but another revision is refused.
  assert _prepare(hub, tmp_path, NEW).returncode == 0
  pinned = f"--config.data.corpus=hf:me/tiny@{NEW}"
  refused = _prepare(hub, tmp_path, NEW, pinned)
  commands.check_mistake(refused, f"here 'hf:me/tiny@{NEW}'")


def test_a_run_refuses_another_commit_on_resume(tmp_path):
  workdir = Workdir(tmp_path)
  read = lambda name, commit: {"revisions": {"train": f"{name}@{commit}"}}
  workdir.check_revisions(read("me/tiny", NEW))  # a run that begins
  workdir.write("data.json", read("me/tiny", OLD))
  workdir.check_revisions(read("me/tiny", OLD))
  # Of another name or a folder only the rows are compared.
  workdir.check_revisions(read("me/moved", NEW))
  workdir.check_revisions({"files": {}})
  with pytest.raises(UserError, match=f"give hf:me/tiny@{OLD}") as caught:
    workdir.check_revisions(read("me/tiny", NEW))
  assert "\n" not in str(caught.value)


def test_mistakes_about_the_hub_are_one_line(hub, tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  for name, words in {
    "me/nothing": "'me/nothing' doesn't exist",
    "me/tiny@v2": "Revision 'v2' doesn't exist",
  }.items():
    done = _prepare(hub, tmp_path, OLD, f"--config.data.corpus=hf:{name}")
    commands.check_mistake(done, words)
