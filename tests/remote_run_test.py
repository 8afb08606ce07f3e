"""Whole runs in a bucket of a real server on this machine."""

import json
import re
import signal
import subprocess

import command_harness
import faults_harness as harness
import pytest
import remote_harness
from apart_harness import python_with
from paths import TESTS

from mdm_jax.core import files

pytestmark = pytest.mark.slow
RUN = f"{remote_harness.BUCKET}/run"
ALL = ("--config.train.keep_latest=9",)
SLOW = harness.SLOW_UPDATES.format(seconds=0.1)
# Each time another name: a process's number, or one that is random.
RANDOM = "checkpoints/", "tensorboard/"


def test_s3_in_an_environment_of_its_own(tmp_path):
  """Its server wants an older package than the library does."""
  if remote_harness.why_not("s3") is None:
    pytest.skip("the server is installed here: the tests of s3 are run here")
  python = python_with(tmp_path, "quickstart,moto", "S3_PYTHON")
  # One after the other: s3fs stays with the first server that it has met.
  for name in ("remote_files_test.py", "remote_run_test.py"):
    done = subprocess.run(
      [python, "-m", "pytest", "-q", "-n0", "-m", "", "-k", "s3", name],
      cwd=TESTS,
      capture_output=True,
      text=True,
      timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-500:]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
  folder = tmp_path_factory.mktemp("remote")
  return harness.make_place(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=remote_harness.SERVERS)
def scheme(request):
  if why_not := remote_harness.why_not(request.param):
    pytest.skip(why_not)
  return request.param


@pytest.fixture(scope="module")
def place(disk, scheme):
  log = disk.folder / f"log.{scheme}"
  with (
    remote_harness.serve(scheme, log) as env,
    pytest.MonkeyPatch.context() as patch,
  ):
    for name, value in env.items():
      patch.setenv(name, value)
    yield remote_harness.Place(disk.folder, disk.env | env)


@pytest.fixture(scope="module")
def run(scheme):
  return f"{scheme}://{RUN}"


@pytest.fixture(scope="module")
def whole(disk):
  """The run in a folder of this machine that nobody hurt."""
  ended = disk.run("local", *ALL)
  assert ended.code == 0, ended.err
  return ended.workdir


@pytest.fixture(scope="module")
def hurt(place, run):
  """The run in a bucket: SIGTERM, SIGKILL between saves, and to its end."""
  process = place.start(run, *ALL, patch=SLOW)
  process.wait_for_checkpoint(10)
  process.signal(signal.SIGTERM)
  stopped = process.end()
  assert stopped.code == 42, stopped.err

  # A second an update: it is not at 30 before it is killed.
  slower = harness.SLOW_UPDATES.format(seconds=1.0)
  process = place.start(run, *ALL, patch=slower)
  process.wait_for(lambda: _lock(process.workdir).get("pid") == process.pid)
  second = place.run(run, *ALL)
  assert second.code == 2, second.err
  assert f"in use by process {process.pid} on" in second.err
  assert second.err.count("\n") == 1
  process.wait_for_checkpoint(20)
  process.wait_for(lambda: _lock(process.workdir)["update"] > 20)
  assert process.kill().code == -signal.SIGKILL

  ended = place.run(run, *ALL)
  assert ended.code == 0, ended.err
  assert "at update 20" in ended.said
  return ended.workdir


def _lock(workdir):
  return files.read_json(workdir / "lock.json") or {}


def _call(place, run, *args):
  return command_harness.call(
    place.folder, place.env, *args, f"--workdir={run}"
  )


def _stable(names):
  return {name for name in names if not name.startswith(RANDOM)}


def test_a_run_in_a_bucket_is_that_of_a_folder(place, whole, hurt, tmp_path):
  """Killed and gone on with, every bit of the run on a disk, and every file."""
  here = remote_harness.download(hurt, tmp_path / "run")
  assert harness.numbers(here) == harness.numbers(whole)
  for step in (10, 20, 30, 40):
    assert harness.state_hash(here, step) == harness.state_hash(whole, step)
  assert harness.steps(here)[-1] == harness.UPDATES
  local = _stable(remote_harness.files_of(whole))
  assert _stable(remote_harness.files_of(here)) == local
  for name in ("config.json", "data.json", "tokenizer.json", "versions.json"):
    assert (here / name).read_bytes() == (whole / name).read_bytes(), name
  a, b = (json.loads((w / "results.json").read_text()) for w in (here, whole))
  for name in ("nelbo_per_token", "ce_by_mask_rate", "samples", "tokens_seen"):
    assert a[name] == b[name], name


def test_its_log_files_have_everything_once(hurt, tmp_path):
  accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
  )
  here = remote_harness.download(hurt, tmp_path / "run")
  found = accumulators.EventAccumulator(str(here / "tensorboard")).Reload()
  updates = list(range(1, harness.UPDATES + 1))
  assert [e.step for e in found.Scalars("train/loss")] == updates
  logged = [x["step"] for x in harness.lines(here) if "train/loss" in x]
  assert logged == updates
  attempts = [
    json.loads(line)
    for line in (here / "attempts.jsonl").read_text().splitlines()
  ]
  assert [a["code"] for a in attempts] == [42, None, 0]
  assert json.loads((here / "exit.json").read_text())["code"] == 0


def test_a_finished_run_is_sampled_measured_and_reported(place, run, hurt):
  sampled = _call(place, run, "--mode=sample", "--trace", "--num_samples=1")
  assert sampled.returncode == 0, sampled.stderr
  assert "samples.json" in files.names(hurt / "samples")
  assert _call(place, run, "--mode=eval").returncode == 0
  assert _call(place, run, "--mode=report").returncode == 0
  assert "<html" in files.read_text(hurt / "report.html")
  again = place.run(run, *ALL)
  assert again.code == 0 and "nothing to train" in again.said


def test_a_bucket_that_is_not_there_ends_a_training(place, scheme):
  ended = place.run(f"{scheme}://no-such-bucket/run")
  assert ended.code == 4, ended.err
  assert ended.err.endswith("there is no bucket no-such-bucket\n")
  assert ended.err.count("\n") == 1


def test_a_store_that_does_not_answer_is_reported_in_one_line(
  place, scheme, run
):
  gone = remote_harness.environment(scheme, "http://127.0.0.1:9")
  ended = place.start(run, **gone).end()
  assert ended.code == 4, ended.err
  assert ended.err.startswith(f"error: workdir {run} can't be written by ")
  assert ended.err.count("\n") == 1


def test_a_store_that_goes_away_ends_it(place, scheme, run, tmp_path):
  """A training that can't save stops, instead of going on for nothing."""
  if scheme == "gs":
    pytest.skip("its packages go on trying for more than two minutes")
  sealed = "run/checkpoints/10/manifest.json"
  with remote_harness.serve(scheme, tmp_path / "log") as env:
    process = place.start(run, *ALL, patch=SLOW, **env)
    process.wait_for(lambda: remote_harness.has(env, sealed))
  ended = process.end()
  assert ended.code == 4, ended.err
  told = ended.err.splitlines()
  assert any(line.startswith("error: ") for line in told), ended.err
  assert "Traceback" not in ended.err
