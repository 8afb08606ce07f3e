"""launch/docker: what the images hold, and how their first process behaves."""

import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tomllib

import pytest
from launch_harness import LAUNCH, TIMEOUT, Stage
from paths import ROOT

ENTRYPOINT = LAUNCH / "docker" / "entrypoint.sh"
FILES = sorted((LAUNCH / "docker").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ACCELERATOR = {"Dockerfile.tpu": "tpu", "Dockerfile.gpu": "cuda12"}

PROGRAM = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def file(request):
  return request.param


def steps(file, name):
  """Returns the arguments of every such instruction."""
  text = file.read_text().replace("\\\n", " ")
  return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


# MARK: images


def test_the_python_is_the_oldest_that_is_promised(file):
  [base] = steps(file, "FROM")
  image, tag = base.split(":")
  version = re.fullmatch(r"(\d+\.\d+)\.\d+-slim-\w+", tag)  # pinned
  assert image == "python" and version
  assert PROJECT["requires-python"] == f">={version[1]}"


def test_the_extras_are_there(file):
  [install] = [x for x in steps(file, "RUN") if "pip install" in x]
  [extras] = re.findall(r"\.\[(.*)\]", install)
  extras = set(extras.split(","))
  assert extras <= set(PROJECT["optional-dependencies"])
  assert {"gs", ACCELERATOR[file.name]} <= extras


def test_it_runs_as_nobody_special_and_gets_signals(file):
  assert steps(file, "USER") == ["1000"]
  [entrypoint] = steps(file, "ENTRYPOINT")
  # A list, or there would be a shell in between that passes nothing on.
  assert entrypoint == '["/usr/local/bin/entrypoint.sh"]'
  copied = [shlex.split(x) for x in steps(file, "COPY")]
  assert any(x[-1] == "/usr/local/bin/entrypoint.sh" for x in copied)


def sources(file):
  parts = [shlex.split(x)[:-1] for x in steps(file, "COPY")]
  return [x for part in parts for x in part if not x.startswith("--")]


def test_what_is_copied_exists_and_nothing_else_is_sent(file):
  assert all((ROOT / source).exists() for source in sources(file))
  rules = (ROOT / ".dockerignore").read_text().splitlines()
  rules = [rule for rule in rules if not rule.startswith("#")]
  assert rules[0] == "*"
  kept = {rule[1:] for rule in rules if rule.startswith("!")}
  assert kept == set(sources(file))


@pytest.mark.slow
def test_what_is_copied_can_be_installed(file, tmp_path):
  context = tmp_path / "context"
  context.mkdir()
  for source in sources(file):
    target = context / pathlib.Path(source).name
    subprocess.run(["cp", "-r", ROOT / source, target], check=True)
  pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w"]
  subprocess.run([*pip, tmp_path, context], check=True, timeout=300)
  [wheel] = tmp_path.glob("mdm_jax-*.whl")
  listed = subprocess.check_output(
    [sys.executable, "-m", "zipfile", "-l", wheel], text=True
  )
  assert "mdm_jax/main.py" in listed and "mdm_jax/sampling/" in listed
  assert listed.count(".html") == len(list((ROOT / "mdm_jax").rglob("*.html")))


# MARK: the first process


@pytest.fixture
def start(tmp_path):
  """Starts the entrypoint around some lines of Python."""
  started = []

  def start(body, *args, before=(), **options):
    stage = Stage(tmp_path)
    python = stage.fake("python", body)
    started.append(
      subprocess.Popen(
        [*before, "bash", str(ENTRYPOINT), *args],
        env=stage.environment(PYTHON=str(python)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
      )
    )
    started[-1].stage = stage
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("code", [0, 1, 2, 42, 134])
def test_the_exit_code_comes_back(start, code):
  process = start(f"sys.exit({code})", "--config=a b", "")
  process.communicate(timeout=TIMEOUT)
  assert process.returncode == code
  expected = ["python", "-m", "mdm_jax.main", "--config=a b", ""]
  assert process.stage.calls() == [expected]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(start, number):
  process = start(PROGRAM)
  assert process.stdout.readline() == "ready\n"
  process.send_signal(number)
  process.communicate(timeout=TIMEOUT)
  assert process.returncode == 42


def test_a_second_signal_does_not_lose_the_exit_code(start):
  slow = PROGRAM.replace("sys.exit(42)", "(time.sleep(0.5), sys.exit(42))")
  process = start(slow)
  assert process.stdout.readline() == "ready\n"
  for _ in range(3):
    process.send_signal(signal.SIGTERM)
  process.communicate(timeout=TIMEOUT)
  assert process.returncode == 42


def test_the_terminal_reaches_the_program(start):
  process = start("print(sys.stdin.read())", stdin=subprocess.PIPE)
  told, _ = process.communicate("a prompt", timeout=TIMEOUT)
  assert told == "a prompt\n"


# MARK: as process 1


@pytest.fixture
def container():
  """How to start something as process 1, as in a container."""
  before = ["unshare", "--pid", "--fork", "--kill-child"]
  try:
    subprocess.run([*before, "true"], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no process can be number 1 here: {error}")
  return before


def test_an_abort_is_134_as_process_1_too(start, container):
  process = start("os.abort()", before=container)
  process.communicate(timeout=TIMEOUT)
  assert process.returncode == 134


def test_sigterm_before_the_program_listens_ends_it(start, container):
  body = 'import time; print("ready", flush=True); time.sleep(60)'
  process = start(body, before=container)
  assert process.stdout.readline() == "ready\n"
  children = f"/proc/{process.pid}/task/{process.pid}/children"
  [first] = pathlib.Path(children).read_text().split()
  subprocess.run(["kill", "-TERM", first], check=True)
  process.communicate(timeout=TIMEOUT)
  assert process.returncode == 143
