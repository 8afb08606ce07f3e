"""--mode=prepare as users run it: workers, kills, signals, what follows."""

import json
import os
import pathlib
import signal
import time

import command_harness as commands
import prepare_harness as harness
import pytest

COPIES = 12  # of the texts, for a program that is to be killed on its way
TINY = """
from mdm_jax.config import default_config, stage, quick

def get_config(arg=""):
  config = default_config()
  config.stages = (
    stage(unit="sentences", length=48, min_words=3, easiest=0.5),
    stage(length=64),
  )
  config.data.update(block_megabytes=0.03, batch_size=2, eval_fraction=0.25)
  config.data.corpus = "text:texts/*"
  config.data.prepared = "rows"
  config.tokenizer.vocab_size = 400
  config = quick(config)
  config.data.max_documents = None
  return config
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  """The environment of all commands."""
  return commands.environment(tmp_path_factory.mktemp("cache"))


def _place(folder, copies):
  """Makes a folder with a config and texts, all of them different."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.py").write_text(TINY)
  (folder / "texts").mkdir()
  for copy in range(copies):
    lines = [
      json.dumps({"text": f"Copy {copy}.\n{text}"}) for text in harness.TOPICS
    ]
    (folder / "texts" / f"{copy:02d}.jsonl").write_text("\n".join(lines))
  return folder


def _arguments(*more):
  return ["--mode=prepare", "--config=config.py", *more]


def _start(place, env, *more):
  return commands.Command(place, env, "mdm_jax.main", *_arguments(*more))


def _wait_for(process, place, pattern, count):
  """Waits until so many files that match are there."""
  until = time.monotonic() + 120
  while len(list((place / "rows").glob(pattern))) < count:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < until
    time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, env):
  """A folder prepared by one worker, and what was printed."""
  place = _place(tmp_path_factory.mktemp("undisturbed") / "place", COPIES)
  done = commands.call(place, env, *_arguments("--workers=1"))
  assert done.returncode == 0, done.stderr
  return place, done.stdout


def test_it_prints_what_it_does(undisturbed):
  place, told = undisturbed
  for word in (
    "count: ",
    "rows: ",
    "stage_2: ",
    "validation: ",
    "prepared: rows",
  ):
    assert word in told
  assert not (place / "rows" / "work").exists()


def test_two_workers_write_the_same_bytes(undisturbed, tmp_path, env):
  place = _place(tmp_path / "place", COPIES)
  done = commands.call(place, env, *_arguments("--workers=2"))
  assert done.returncode == 0, done.stderr
  assert harness.contents(place / "rows") == harness.contents(
    undisturbed[0] / "rows"
  )


@pytest.mark.slow
def test_after_kills_it_resumes_with_the_same_bytes(undisturbed, tmp_path, env):
  place = _place(tmp_path / "place", COPIES)
  for pattern, count in [("work/count.*", 5), ("work/rows.*", 3)]:
    process = _start(place, env, "--workers=2")
    _wait_for(process, place, pattern, count)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  assert not (place / "rows" / "manifest.json").exists()
  _wait_for_orphans(place)
  kept = _times(place)
  assert len(kept) >= 3
  done = commands.call(place, env, *_arguments("--workers=2"))
  assert done.returncode == 0, done.stderr
  now = _shard_times(place)
  assert all(now[name] == when for name, when in kept.items())
  assert harness.contents(place / "rows") == harness.contents(
    undisturbed[0] / "rows"
  )


def _wait_for_orphans(place):
  """Waits until the workers of a killed program have ended, too."""
  until = time.monotonic() + 30
  while _working_in(place):
    assert time.monotonic() < until, "a worker outlives its program"
    time.sleep(0.05)


def _working_in(place):
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if os.readlink(path / "cwd") == str(place):
        found.append(path.name)
    except OSError:
      pass
  return found


def _shard_times(place):
  paths = (place / "rows").glob("*.npy")
  return {path.name: path.stat().st_mtime_ns for path in paths}


def _times(place):
  """Returns when the shards of finished blocks were written."""
  blocks = [
    path.name.split(".")[1] for path in (place / "rows/work").glob("rows.*")
  ]
  return {
    name: when
    for name, when in _shard_times(place).items()
    if name.split(".")[1] in blocks
  }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_42_and_one_line(tmp_path, env, number):
  place = _place(tmp_path / "place", COPIES)
  process = _start(place, env, "--workers=1")
  _wait_for(process, place, "work/sample.*", 1)
  process.send_signal(number)
  told, errors = process.communicate(timeout=60)
  assert process.returncode == 42, errors
  assert told.splitlines()[-1].startswith(f"{signal.Signals(number).name}: ")
  assert "Traceback" not in told + errors
  _wait_for_orphans(place)


def test_a_dead_worker_is_reported(tmp_path, env):
  place = _place(tmp_path / "place", COPIES)
  process = _start(place, env, "--workers=1")
  _wait_for(process, place, "work/count.*", 1)
  os.kill(_worker(process.pid), signal.SIGKILL)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 134
  assert errors.startswith("error: a worker died, perhaps for lack of memory")


def _worker(number):
  """Returns the newest child: the first one only watches over semaphores."""
  tasks = pathlib.Path(f"/proc/{number}/task").glob("*/children")
  return max(int(child) for path in tasks for child in path.read_text().split())


@pytest.mark.parametrize(
  "more, told",
  [
    (["--config.data.prepared="], "--config.data.prepared=FOLDER"),
    (
      ["--config.data.corpus=text:none/*", "--config.data.prepared=other"],
      "matches no file",
    ),
    (["--config.data.prepared=gs://a/b"], "is a bucket"),
    (["--config.data.block_megabytes=0"], "must be in (0, "),
  ],
)
def test_a_mistake_is_one_line(undisturbed, env, more, told):
  done = commands.call(undisturbed[0], env, *_arguments("--workers=1", *more))
  commands.check_mistake(done, told)


@pytest.mark.slow
def test_all_modes_read_what_was_prepared(undisturbed, env):
  place, _ = undisturbed
  call = lambda *more: commands.call(
    place, env, "--config=config.py", "--workdir=run", *more
  )
  modes = ("data", "plan", "train", "eval", "sample", "report")
  for mode in modes:
    done = call(f"--mode={mode}")
    assert done.returncode == 0, done.stderr
  assert (place / "run" / "results.json").exists()
  other = "--workdir=other", "--config.tokenizer.vocab_size=300"
  commands.check_mistake(
    call("--mode=train", *other), "tokenizer.vocab_size is 400, here 300"
  )
