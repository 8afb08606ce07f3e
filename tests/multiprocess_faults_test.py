"""Faults of several processes: the whole program, on two devices each."""

import json
import signal

import faults_harness as harness
import pytest
from processes_harness import free_port


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  return harness.make_place(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def pair(place):
  """Starts a training in two processes; kills what is left of them."""
  started = []

  def start(name, *args, patch=""):
    port = free_port()
    for i in range(2):
      started.append(
        place.start(
          name,
          *(f"--coordinator=localhost:{port}", "--num_processes=2"),
          *(f"--process_id={i}", "--heartbeat_seconds=10", *args),
          patch=patch,
          JAX_NUM_CPU_DEVICES="2",
          JAX_PLATFORMS="cpu",
        )
      )
    return started[-2:]

  yield start
  for process in started:
    process.signal(signal.SIGCONT)
    process.kill()


def _losses(workdir):
  found = {}
  for line in harness.lines(workdir):
    if "train/loss" in line:
      assert line["step"] not in found, "logged twice"
      found[line["step"]] = line["train/loss"]
  return found


@pytest.mark.slow
def test_fault_02_38_two_stop_one_resumes_then_two(place, pair):
  """A signal to one stops both; whoever goes on sees what all would have."""
  slow = harness.SLOW_UPDATES.format(seconds=0.2)
  first, second = pair("w", patch=slow)
  first.wait_for_update(12)
  second.signal(signal.SIGTERM)
  ended = [process.end() for process in (first, second)]
  assert [e.code for e in ended] == [42, 42], ended[0].err + ended[1].err
  at = ended[0].exit["update"]
  told = json.loads((place.workdir("w") / "exit.process_1.json").read_text())
  assert told["code"] == 42 and told["update"] == at
  assert harness.steps(place.workdir("w"))[-1] == at >= 12
  assert "resumes" in ended[0].out and "saved update" not in ended[1].out
  alone = place.start("w", patch=slow, JAX_NUM_CPU_DEVICES="4")
  alone.wait_for_update(at + 8)
  alone.signal(signal.SIGTERM)
  ended = alone.end()
  assert ended.code == 42 and f"at update {at}" in ended.said, ended.err
  after = ended.exit["update"]
  assert at < after < 40
  first, second = (process.end(200) for process in pair("w"))
  assert (first.code, second.code) == (0, 0), first.err + second.err
  assert f"at update {after}" in first.said
  whole = place.run("whole")
  assert whole.code == 0, whole.err
  losses, expected = (_losses(place.workdir(w)) for w in ("w", "whole"))
  assert list(losses) == list(expected) == list(range(1, 41))
  assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_fault_02_two_resume_with_the_same_bits(place, pair):
  for process in pair("two_whole"):
    ended = process.end(200)
    assert ended.code == 0, ended.err
  slow = harness.SLOW_UPDATES.format(seconds=0.2)
  first, second = pair("two", patch=slow)
  first.wait_for_update(13)
  first.signal(signal.SIGTERM)
  assert [process.end().code for process in (first, second)] == [42, 42]
  for process in pair("two"):
    ended = process.end(200)
    assert ended.code == 0, ended.err
  a, b = (place.workdir(name) for name in ("two", "two_whole"))
  assert harness.numbers(a) == harness.numbers(b)
  assert harness.state_hash(a, 40) == harness.state_hash(b, 40)


@pytest.mark.slow
def test_fault_08_a_killed_peer_ends_the_other(place, pair):
  slow = harness.SLOW_UPDATES.format(seconds=0.2)
  first, second = pair("killed", patch=slow)
  first.wait_for_checkpoint(10)
  second.kill()
  ended = first.end(60)
  assert ended.code in (-signal.SIGABRT, 134)  # to a shell both are 134
  if ended.code == 134:  # else the runtime was faster, and aborted
    assert "no sign of process 1" in ended.exit["reason"]
  # It is only a killed attempt to the next one.
  again = place.run("killed", JAX_NUM_CPU_DEVICES="4")
  assert again.code == 0, again.err


@pytest.mark.slow
def test_fault_09_a_stuck_peer_is_named(place, pair):
  slow = harness.SLOW_UPDATES.format(seconds=0.2)
  # Shorter than the runtime's own limit, which is that of a peer that is gone.
  args = ["--config.train.watchdog_seconds=45", "--heartbeat_seconds=100"]
  first, second = pair("stuck", *args, patch=slow)
  first.wait_for_update(12)
  second.signal(signal.SIGSTOP)
  ended = first.end(120)
  assert ended.code == 134, ended.err
  assert "no sign of process 1" in ended.err
  assert "no sign of process 1" in ended.exit["reason"]
