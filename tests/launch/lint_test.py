"""launch/ as a whole: linters, usage, and nothing of anybody's own in it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from launch_harness import LAUNCH, SCRIPTS, VALUES, Stage
from paths import ROOT

FILES = sorted(p for p in LAUNCH.rglob("*") if p.is_file() and p.name != "env")
IN_BIN = f"{sys.prefix}/bin"
NEVER = {
  "an address": r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b",
  "a bucket": r"\b(gs|s3|r2|https)://(?!github\.com/AI-Hypercomputer/xpk)\w",
  "a project": r"(project|PROJECT)=[\"']?[a-z0-9]",
  "a registry": r"\b(gcr\.io|pkg\.dev|amazonaws\.com|azurecr\.io)\b",
  "a person": r"\b[\w.]+@[\w-]+\.\w",
}


def lint(name, *args, cwd=ROOT):
  """Returns what a linter of this environment says."""
  told = subprocess.run(
    [f"{IN_BIN}/{name}", *map(str, args)],
    cwd=cwd,
    capture_output=True,
    text=True,
  )
  return told.returncode, told.stdout + told.stderr


# MARK: linters


def test_shellcheck_has_nothing_to_say():
  assert len(SCRIPTS) >= 11
  assert lint("shellcheck", "-x", *SCRIPTS) == (0, "")


def test_yamllint_has_nothing_to_say():
  manifests = sorted(LAUNCH.rglob("*.yaml"))
  assert len(manifests) == 4
  assert lint("yamllint", "--strict", *manifests) == (0, "")


def test_hadolint_has_nothing_to_say():
  files = sorted(LAUNCH.rglob("Dockerfile.*"))
  assert len(files) == 2
  assert lint("hadolint", *files) == (0, "")


@pytest.mark.parametrize(
  ("linter", "name", "text"),
  [
    ("shellcheck", "x.sh", "#!/usr/bin/env bash\nrm -rf $1\n"),
    ("yamllint", "x.yaml", "---\na: 1\na: 2\n"),
    ("hadolint", "Dockerfile", "FROM python\nCMD python\n"),
  ],
)
def test_the_linters_would(tmp_path, linter, name, text):
  (tmp_path / name).write_text(text)
  code, told = lint(linter, tmp_path / name)
  assert code and told


# MARK: nothing of anybody's own


def secrets(folder):
  # From within: of files elsewhere it says nothing, without a word.
  _, told = lint("detect-secrets", "scan", "--all-files", ".", cwd=folder)
  return json.loads(told)["results"]


def test_there_are_no_secrets(tmp_path):
  assert secrets(LAUNCH) == {}
  shutil.copytree(LAUNCH, tmp_path / "launch")
  planted = tmp_path / "launch" / "tpu_vm" / "run.sh"
  with planted.open("a") as file:
    file.write('TOKEN="AKIA' + "IOSFODNN7" + 'QWERTYZ"\n')
  assert set(secrets(tmp_path / "launch")) == {"tpu_vm/run.sh"}


def finds(text):
  return {name for name, rule in NEVER.items() if re.search(rule, text)}


@pytest.mark.parametrize(
  "path", FILES, ids=lambda path: str(path.relative_to(LAUNCH))
)
def test_no_file_knows_a_project_a_bucket_or_an_address(path):
  assert finds(path.read_text()) == set()


@pytest.mark.parametrize(
  ("text", "name"),
  [
    ("--coordinator=10.0.0.2:8476", "an address"),
    ("WORKDIR=gs://mine/run", "a bucket"),
    ("gcloud x --project=mine-123", "a project"),
    ("image: gcr.io/x", "a registry"),
    ("--account=me@example.com", "a person"),
  ],
)
def test_the_rules_would_find_one(text, name):
  assert finds(text) == {name}


# MARK: variables


def given():
  """The variables that env.example names, with their values."""
  text = (LAUNCH / "env.example").read_text()
  return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def read():
  """The variables that the files ask for."""
  names = set()
  for path in SCRIPTS:
    for line in re.findall(r"^need (.*)$", path.read_text(), re.MULTILINE):
      names.update(re.findall(r"[A-Z_]+", line))
  for path in LAUNCH.rglob("*.yaml"):
    names.update(re.findall(r"\$\{(\w+)\}", path.read_text()))
    names.update(re.findall(r"^  (\w+): null$", path.read_text(), re.M))
  return names


def test_the_example_has_all_names_and_no_values():
  assert set(given().values()) == {""}
  assert set(given()) - {"DRY_RUN"} == read() == set(VALUES)


@pytest.mark.parametrize(
  "path",
  [p for p in SCRIPTS if re.search(r"^need ", p.read_text(), re.M)],
  ids=lambda path: path.name,
)
def test_a_missing_variable_is_reported_before_anything_runs(path, tmp_path):
  stage = Stage(tmp_path)
  for name in ("gcloud", "git", "kubectl", "xpk"):
    stage.fake(name)
  args = {"run": ["--x"], "babysit": ["--x"], "xpk": ["--x"], "jobset": ["tpu"]}
  told = stage.run(
    "bash", path, *args.get(path.stem, []), **dict.fromkeys(VALUES, "")
  )
  assert told.returncode == 2 and stage.calls() == []
  [line] = told.stderr.splitlines()
  told = re.fullmatch(r".*: not set: (.*) \(see launch/env.example\)", line)
  code = re.sub(r"^#.*$", "", path.read_text(), flags=re.MULTILINE)
  used = set(re.findall(r"\b[A-Z_]+\b", code)) & set(VALUES)
  assert set(told[1].split()) == used


@pytest.mark.parametrize(
  ("name", "args"),
  [
    ("tpu_vm/create.sh", ["x"]),
    ("tpu_vm/setup.sh", ["x"]),
    ("tpu_vm/delete.sh", ["x"]),
    ("tpu_vm/run.sh", []),
    ("tpu_vm/babysit.sh", []),
    ("tpu_vm/worker.sh", []),
    ("tpu_vm/worker.sh", ["train"]),
    ("tpu_vm/worker.sh", ["install", "x"]),
    ("gke/jobset.sh", []),
    ("gke/jobset.sh", ["cpu"]),
    ("gke/xpk.sh", []),
    ("slurm/train.sbatch", []),
  ],
)
def test_wrong_arguments_are_answered_with_the_usage(name, args, tmp_path):
  told = Stage(tmp_path).run("bash", LAUNCH / name, *args)
  assert told.returncode == 2
  [line] = told.stderr.splitlines()
  assert line.startswith("usage: ")
