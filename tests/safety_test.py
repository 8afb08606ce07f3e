"""What SECURITY.md promises: nothing that is read is run, nothing leaks."""

import ast
import hashlib
import json
import pathlib
import shutil

import faults_harness
import numpy as np
import pytest
from command_harness import call, check_mistake
from paths import ROOT

from mdm_jax import config as config_lib
from mdm_jax.core import safe_files
from mdm_jax.core.errors import UserError
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.config import TokenizerConfig
from mdm_jax.data.prepared import prepare

SOURCES = sorted(
  path.relative_to(ROOT)
  for folder in ("mdm_jax", "configs", "tests")
  for path in (ROOT / folder).rglob("*.py")
)
PICKLES = {
  *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib"),
  *("marshal", "shelve", "jsonpickle"),
}
RUNS = {
  *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
  *("runpy.run_path", "pandas.read_pickle", "code.interact"),
  *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
  *("yaml.full_load", "yaml.full_load_all"),
}
# Keywords that say whether something may be run: the value that says no.
SAFE = {"allow_pickle": False, "trust_remote_code": False, "shell": False}
# Calls that run what they read unless a keyword says otherwise.
NEEDED = {
  "numpy.load": ("allow_pickle", False),
  "torch.load": ("weights_only", True),
}
ALLOWED = {
  # The file of --config.
  "mdm_jax/studies/ablate.py": ["runpy.run_path"],
  # Our own sampler, in a folder that the test has just exported.
  "tests/huggingface/export_peer.py": [
    "model.generate(trust_remote_code=True)"
  ],
}
CANARY = "canary-5d1f0c"
SECRETS = {
  name: f"{CANARY}-{name}"
  for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
}
PLANTED = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()
"""


# MARK: S1 the code


def _risks(source):
  """What a module has that could run the data it reads."""
  tree = ast.parse(source)
  names = dict(_imported(tree))
  found = [name for name in names.values() if name.split(".")[0] in PICKLES]
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      found += _call_risks(node, names)
  return found


def _imported(tree):
  """Every imported name, and what it is in full."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        root = alias.name.partition(".")[0]
        yield alias.asname or root, alias.name if alias.asname else root
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _call_risks(node, names):
  root, dot, rest = ast.unparse(node.func).partition(".")
  called = (names.get(root, root) + dot + rest).removeprefix("builtins.")
  values = {k.arg: ast.unparse(k.value) for k in node.keywords}
  if called in RUNS:
    yield called
  for name, safe in SAFE.items():
    if values.get(name, str(safe)) != str(safe):
      yield f"{called}({name}={values[name]})"
  name, safe = NEEDED.get(called, (None, None))
  if name and values.get(name) != str(safe):
    yield f"{called} without {name}={safe}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_safety_S1_nothing_that_is_read_is_run(path):
  allowed = ALLOWED.get(path.as_posix(), [])
  assert _risks((ROOT / path).read_text()) == allowed


def test_safety_S1_all_sources_are_looked_at():
  names = {path.as_posix() for path in SOURCES}
  assert {"mdm_jax/data/prepared.py", "mdm_jax/main.py"} <= names
  assert {"configs/quickstart.py", "tests/safety_test.py"} <= names


@pytest.mark.parametrize(
  "source",
  [
    *(f"import {name}" for name in sorted(PICKLES)),
    *("import dill as json", "from pickle import loads as read"),
    *("from joblib import load", "def f():\n  import marshal"),
    *("eval('1')", "exec(text)", "__import__('os')", "compile(t, '', 'exec')"),
    *("import builtins\nbuiltins.eval(x)", "import builtins as b\nb.exec(x)"),
    *("import yaml\nyaml.load(f)", "from yaml import load\nload(f)"),
    *("import yaml as y\ny.unsafe_load(f)", "import os\nos.system('ls')"),
    *("import numpy as np\nnp.load(p)", "from numpy import load\nload(p)"),
    "import numpy as np\nnp.load(p, allow_pickle=True)",
    "import numpy as np\nnp.load(p, allow_pickle=flag)",
    *("import torch\ntorch.load(p)", "import torch\ntorch.load(p, 'cpu')"),
    "import torch\ntorch.load(p, weights_only=False)",
    "Model.from_pretrained(p, trust_remote_code=True)",
    "subprocess.run(c, shell=True)",
  ],
)
def test_safety_S1_a_planted_risk_is_found(source):
  assert _risks(source)


@pytest.mark.parametrize(
  "source",
  [
    *("import json\njson.load(f)", "import re\nre.compile('x')"),
    *("model.eval()", "import yaml\nyaml.safe_load(f)", "from a import eval_"),
    "import numpy as np\nnp.load(p, allow_pickle=False)",
    "import torch\ntorch.load(p, weights_only=True)",
    "Model.from_pretrained(p, trust_remote_code=False)",
  ],
)
def test_safety_S1_what_is_safe_is_not_found(source):
  assert _risks(source) == []


# MARK: S2 config files, S4 secrets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A folder with the workdir `w` of a run, its environment, what it said."""
  folder = tmp_path_factory.mktemp("run")
  place = faults_harness.make_place(folder, folder / "cache")
  env = place.env | SECRETS
  (folder / "tiny.py").write_text(faults_harness.CONFIG + PLANTED)
  args = (f"--config.stages[{i}].updates=2" for i in range(2))
  done = call(folder, env, "--config=tiny.py", "--workdir=w", *args)
  assert done.returncode == 0, done.stderr
  return folder, env, done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["sample", "data", "train"])
def test_safety_S2_a_config_file_runs_only_where_it_is_named(
  run, mode, tmp_path
):
  folder, env, _ = run
  marker = folder / "tiny.ran"
  assert marker.exists()  # it ran when it was named
  marker.unlink()
  workdir = shutil.copytree(folder / "w", tmp_path / "w")
  for name in ("tiny.py", "config.py", "planted.py"):
    shutil.copy(folder / "tiny.py", workdir / name)
  done = call(folder, env, f"--mode={mode}", f"--workdir={workdir}")
  ran = [*folder.glob("*.ran"), *workdir.glob("*.ran")]
  marker.touch()
  assert done.returncode == 0, done.stderr
  assert ran == []


@pytest.mark.parametrize(
  "values",
  [
    {"__class__": "os.system"},
    {"data": {"corpus": "__import__('pathlib').Path('x.ran').touch()"}},
    {"data": {"corpus": {"py/object": "os.system"}}},
  ],
)
def test_safety_S2_a_saved_config_is_only_values(run, values, tmp_path):
  _, env, _ = run
  (tmp_path / "config.json").write_text(json.dumps(values))
  done = call(tmp_path, env, "--mode=data", "--workdir=.")
  check_mistake(done)
  assert not (tmp_path / "x.ran").exists()


def _holding(folder, words):
  """The files that hold the words, or are named by them."""
  return [
    path.relative_to(folder).as_posix()
    for path in sorted(folder.rglob("*"))
    if words in path.name
    or (path.is_file() and words.encode() in path.read_bytes())
  ]


def test_safety_S4_no_secret_of_the_environment_is_written(run):
  folder, _, said = run
  files = {p.name for p in (folder / "w").rglob("*") if p.is_file()}
  assert {"config.json", "metrics.jsonl", "results.json"} <= files
  assert any(name.startswith("events.out") for name in files)
  assert _holding(folder, CANARY) == []
  assert CANARY not in said


def test_safety_S4_a_planted_secret_is_found(run, tmp_path):
  folder, _, _ = run
  copy = shutil.copytree(folder / "w", tmp_path / "w")
  (event,) = (copy / "tensorboard").glob("events*")
  for path in (event, copy / "config.json"):
    with path.open("ab") as file:
      file.write(SECRETS["HF_TOKEN"].encode())
  (copy / CANARY).mkdir()
  assert _holding(copy, CANARY) == sorted(
    [CANARY, "config.json", event.relative_to(copy).as_posix()]
  )


# MARK: S3 files of strangers


@pytest.fixture
def config(tmp_path):
  """A few rows of bytes."""
  return config_lib.from_dict(
    {
      "data": {
        "corpus": "python_docs",
        "max_documents": 4,
        "cache_dir": str(tmp_path / "cache"),
      },
      "tokenizer": {"kind": "byte"},
    }
  )


def _folder(config):
  """Where the rows were prepared."""
  prepare(config.rows)
  (folder,) = pathlib.Path(config.data.cache_dir).iterdir()
  return folder


def _change(path, change):
  values = json.loads(path.read_text())
  change(values)
  path.write_text(json.dumps(values))


def _message(call, *args):
  with pytest.raises(UserError) as caught:
    call(*args)
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(
  "name",
  ["../../x", "/etc/hostname", "a/b", "..", ".", "", "C:\\x", "x\0", "a\\b"],
)
def test_safety_S3_a_manifest_names_only_files_beside_it(
  config, name, monkeypatch
):
  folder = _folder(config)
  seen = []
  monkeypatch.setattr("mdm_jax.data.prepared.file_sha256", seen.append)
  change = lambda values: values["files"].update({name: "0" * 64})
  _change(folder / "manifest.json", change)
  message = _message(prepare, config.rows)
  assert f"names the file {name!r}" in message
  assert seen == []  # nothing was opened, its hash is not told


@pytest.mark.parametrize(
  "change",
  [
    lambda values: values["files"].pop("stage_1.tokens.npy"),
    lambda values: values["rows"].pop("validation"),
    lambda values: values.update(files=["stage_1.tokens.npy"]),
    lambda values: values.update(files=3),
    lambda values: values.update(rows=None),
  ],
)
def test_safety_S3_rows_without_a_hash_are_not_read(config, change):
  folder = _folder(config)
  _change(folder / "manifest.json", change)
  assert "manifest.json; delete the folder" in _message(prepare, config.rows)
  folder.rename(folder.parent / "away")
  prepare(config.rows)  # made anew


@pytest.mark.parametrize("content", ["[" * 10**5, "[]", "3", "null", "\xff"])
def test_safety_S3_a_strange_manifest_is_reported(config, content):
  manifest = _folder(config) / "manifest.json"
  manifest.write_bytes(content.encode("latin1"))
  message = _message(prepare, config.rows)
  assert "prepared data is damaged" in message and "manifest.json" in message


class _Planted:
  """Unpickled, it would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_safety_S3_an_array_is_not_unpickled(config, tmp_path):
  folder = _folder(config)
  path, marker = folder / "stage_1.tokens.npy", tmp_path / "ran"
  np.save(path, np.array([[_Planted(marker)]], dtype=object))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  change = lambda values: values["files"].update({path.name: digest})
  _change(folder / "manifest.json", change)
  assert f"damaged: {path}" in _message(prepare, config.rows)
  assert not marker.exists()


def test_safety_S3_files_read_at_once_have_a_largest_size(config, monkeypatch):
  assert safe_files.MAX_BYTES == 256 * 2**20
  folder = _folder(config)
  tokenizers.load_tokenizer(folder)
  safe_files.read_json(folder / "manifest.json")
  for name, read in (
    ("tokenizer.json", lambda: tokenizers.load_tokenizer(folder)),
    ("manifest.json", lambda: prepare(config.rows)),
  ):
    size = (folder / name).stat().st_size
    with monkeypatch.context() as patch:
      patch.setattr(safe_files, "MAX_BYTES", size)
      read()
      patch.setattr(safe_files, "MAX_BYTES", size - 1)
      assert f"{folder / name} is larger than" in _message(read)


def test_safety_S3_a_tokenizer_model_has_a_largest_size(tmp_path, monkeypatch):
  texts = ["some words of a text\n" * 9]
  model = tokenizers.build(TokenizerConfig(vocab_size=320), texts)
  model.save(tmp_path)
  path = tmp_path / model.filename
  given = TokenizerConfig(path=str(path))
  assert tokenizers.build(given, texts).content == model.content
  monkeypatch.setattr(safe_files, "MAX_BYTES", len(model.content) - 1)
  assert "is larger than" in _message(tokenizers.build, given, texts)
  assert "is larger than" in _message(tokenizers.load_tokenizer, tmp_path)


def test_safety_S3_a_folder_in_the_place_of_a_file(tmp_path):
  (tmp_path / "tokenizer.model").mkdir()
  message = _message(tokenizers.load_tokenizer, tmp_path)
  assert "tokenizer.model can't be read" in message


# MARK: the page


def test_safety_the_page_says_what_is_run():
  text = (ROOT / "SECURITY.md").read_text()
  for word in ("--config=FILE", "config.json", "open an issue", "256 MiB"):
    assert word in text
