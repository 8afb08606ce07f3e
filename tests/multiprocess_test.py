"""Two real processes of two devices each, against one process: the same run."""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from paths import ROOT
from processes_harness import TIMEOUT, environment, free_port, python, running

from mdm_jax.core import distributed, jax_internals
from mdm_jax.core.errors import UserError

LAUNCHER = ROOT / "launch" / "local" / "cpu_multiprocess.sh"

PAIR = """
import json, processes_harness as harness
harness.join()
import jax
from mdm_jax.config import MeshConfig
from mdm_jax.core.sharding import make_mesh

rows, model = make_mesh(MeshConfig(fsdp=4)), make_mesh(MeshConfig(tensor=4))
mixed = rows.devices[:, [0, 2, 1, 3]]  # as a TPU's wires may have them
mixed = jax.sharding.Mesh(mixed, rows.axis_names, rows.axis_types)
print(json.dumps({
  "fsdp": harness.measure(rows),
  "tensor": harness.measure_data(model),
  "mixed": harness.measure_data(mixed),
  "processes": [d.process_index for d in rows.devices.flat],
}))
"""

ALONE = """
import json, processes_harness as harness
from mdm_jax.config import MeshConfig
from mdm_jax.core.sharding import make_mesh

print(json.dumps(harness.measure(make_mesh(MeshConfig(fsdp=4)))))
"""

STOPPED = """
import json, os, signal, sys, time, processes_harness as harness
own = harness.join()
stopped = int(os.environ["STOPPED"])
import jax
from mdm_jax.core import distributed
from mdm_jax.runtime import signals
from mdm_jax.core.errors import Failure, StorageError, UserError
from mdm_jax.config import MeshConfig
from mdm_jax.core.sharding import make_mesh
from mdm_jax.sampling.generate import TextSampler

def told(function, *args, **kwargs):
  try:
    return function(*args, **kwargs)
  except Failure as error:
    return [str(error), int(error.code)]

def full():
  raise StorageError("no space")

result = {
  "count": distributed.count(),
  "first": distributed.is_first(),
  "broadcast": distributed.broadcast({"own": own, "x": 0.1}),
  "agree": told(distributed.agree, "the config", "abc"),
  "differ": told(distributed.agree, "the config", f"abc{own}"),
  "first_alone": told(distributed.first_alone, lambda: own),
  "full": told(distributed.first_alone, full),
  "mesh": told(make_mesh, MeshConfig(fsdp=1, tensor=3)),
}
mesh = make_mesh(MeshConfig())
result["watch"] = told(TextSampler, None, None, mesh, 4, watch=print)

with signals.SharedStopRequest() as stop:
  distributed.agree("readiness", True)
  print("polling", flush=True)
  polls = 1
  while not stop.poll():
    polls += 1
    time.sleep(0.02 * (1 + own))
  result |= {"polls": polls, "name": stop.name, "again": stop.poll()}
  result["check"] = told(stop.check)
  print(json.dumps(result), flush=True)

distributed.agree("the end", True)
time.sleep(0.5)  # process 0's answer has to get out before it stops
if own == stopped:
  os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.5)
began = time.monotonic()
missing = distributed.missing_peers(1.0)
print(json.dumps([missing, time.monotonic() - began]), flush=True)
distributed.leave(3)
"""

LONELY = """
import sys, processes_harness as harness
sys.argv[2:] = ["2", "1"]
harness.join(initialization_timeout=5)
"""


# MARK: the same numbers


@pytest.fixture(scope="module")
def runs():
  """What two processes of two devices, and one with all four, measure."""
  with running(python(PAIR, 2), devices=2) as pair:
    with running([[sys.executable, "-c", ALONE]], devices=4) as alone:
      assert [child.wait() for child in pair] == [0, 0], pair[0].output
      assert alone[0].wait() == 0, alone[0].output
      yield [child.result for child in pair], alone[0].result


@pytest.mark.parametrize("what", ["tokens", "masks"])
def test_fault_38_every_update_sees_the_same_rows_and_masks(runs, what):
  pair, alone = runs
  expected = alone[what]
  assert len(set(expected)) == len(expected) == 4
  for result in (child[mesh] for child in pair for mesh in child):
    if isinstance(result, dict):
      assert result[what] == expected


def test_losses_agree(runs):
  pair, alone = runs
  for child in pair:
    np.testing.assert_allclose(
      child["fsdp"]["losses"], alone["losses"], rtol=0, atol=1e-5
    )
  assert pair[0]["fsdp"]["losses"] == pair[1]["fsdp"]["losses"]


def test_where_devices_share_rows_processes_do(runs):
  pair, _ = runs
  assert [child["tensor"]["own_rows"] for child in pair] == [[[0, 8]]] * 2


def test_the_likelihood_agrees(runs):
  pair, alone = runs
  for child in pair:
    np.testing.assert_allclose(
      child["fsdp"]["likelihood"], alone["likelihood"], rtol=0, atol=1e-5
    )


def test_samples_are_whole_everywhere_and_the_same(runs):
  pair, alone = runs
  assert alone["samples"]["shape"] == [5, 3, 16]
  for child in pair:
    assert child["fsdp"]["samples"] == alone["samples"]


def test_each_process_has_a_run_of_the_rows(runs):
  pair, _ = runs
  assert pair[0]["processes"] == [0, 0, 1, 1]
  assert pair[0]["fsdp"]["own_rows"] == [[0, 2], [2, 4]]
  assert pair[1]["fsdp"]["own_rows"] == [[4, 6], [6, 8]]


def test_the_devices_of_a_process_may_lie_apart(runs):
  pair, _ = runs
  assert pair[0]["mixed"]["own_rows"] == [[0, 2], [4, 6]]
  assert pair[1]["mixed"]["own_rows"] == [[2, 4], [6, 8]]


def test_calibration_gives_all_the_same_time(runs):
  pair, _ = runs
  seconds = [child["fsdp"]["update_seconds"] for child in pair]
  assert seconds[0] == seconds[1] > 0


# MARK: faults


@pytest.fixture(scope="module")
def lonely():
  """Process 1 of 2 without process 0, started early as it takes a while."""
  with running(python(LONELY, 1)) as (child,):
    yield child


@pytest.fixture(scope="module")
def stopped(lonely):
  """For SIGTERM and SIGINT to process 1: what both tell, and who is missed.

  Of the first pair, process 1 stops in the end, of the second process 0.
  """
  del lonely
  with contextlib.ExitStack() as stack:
    pairs = []
    for who in (1, 0):
      with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOPPED", str(who))
        pairs.append(stack.enter_context(running(python(STOPPED, 2))))
    return [
      _stop(pair, number, who)
      for pair, number, who in zip(
        pairs, (signal.SIGTERM, signal.SIGINT), (1, 0), strict=True
      )
    ]


def _stop(pair, number, who):
  for child in pair:
    child.wait_for("polling")
  time.sleep(0.3)
  pair[1].process.send_signal(number)
  left = pair[1 - who]
  assert left.wait() == 3, left.output
  results = [
    json.loads(line)
    for child in pair
    for line in child.output.splitlines()
    if line.startswith("{")
  ]
  return results, left.result


@pytest.mark.parametrize("which", [0, 1], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_one_stops_both_at_the_same_poll(stopped, which):
  first, second = stopped[which][0]
  assert first["polls"] == second["polls"] > 5
  for result in (first, second):
    assert result["again"] and result["name"] == "SIGTERM"
    assert result["check"] == [
      "SIGTERM: nothing was lost; the same command resumes",
      42,
    ]


def test_values_go_from_the_first_process_to_all(stopped):
  results, _ = stopped[0]
  assert [r["first"] for r in results] == [True, False]
  assert [r["count"] for r in results] == [2, 2]
  assert [r["broadcast"] for r in results] == [{"own": 0, "x": 0.1}] * 2
  assert [r["first_alone"] for r in results] == [0, 1]


def test_a_broken_agreement_is_reported_to_all(stopped):
  results, _ = stopped[0]
  assert [r["agree"] for r in results] == [None, None]
  told = 'the config differs between processes: "abc0" in process 0, but "abc1"'
  assert [r["differ"] for r in results] == [[f"{told} in process 1", 2]] * 2


def test_what_fails_in_the_first_process_fails_in_all(stopped):
  first, second = stopped[0][0]
  assert first["full"] == ["no space", 4]
  assert second["full"] == ["process 0: no space", 4]


def test_what_is_impossible_is_an_error(stopped):
  for result in stopped[0][0]:
    assert result["mesh"][1] == 2 and "tensor=3" in result["mesh"][0]
    assert result["watch"][1] == 2 and "--trace" in result["watch"][0]


def test_a_stopped_process_is_named(stopped):
  (told, seconds), (told_of_first, _) = (left for _, left in stopped)
  assert told.startswith("no sign of process 1 (")
  assert seconds < 30  # bounded, on a busy machine too
  assert told_of_first.startswith("process 0 (localhost:")


def test_fault_10_without_a_coordinator_it_tells_what_it_waits_for(lonely):
  assert lonely.wait() == -signal.SIGABRT
  line = lonely.output.splitlines()[0]
  assert line.startswith(
    "process 1 of 2: joining the coordinator at localhost:"
  )
  assert "after 5 s" in line and "not started" in line


# MARK: one process


@pytest.mark.parametrize(
  "given, told",
  [
    (("h:1", None, None), "--num_processes and --process_id: not given"),
    ((None, 2, 0), "--coordinator: not given"),
    ((None, None, 0), "--coordinator and --num_processes: not given"),
    (("h", 2, 0), "--coordinator=h: write it as HOST:PORT"),
    ((":1", 2, 0), "--coordinator=:1: write it as HOST:PORT"),
    (("h:1", 2, 2), "it must be from 0 to 1"),
    (("h:1", 2, -1), "it must be from 0 to 1"),
  ],
)
def test_arguments_that_do_not_fit_are_reported(given, told):
  with pytest.raises(UserError, match=told) as error:
    distributed.initialize(*given)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [(None, 1, None), ("h:1", 1, 0)])
def test_one_process_joins_nothing(given, capsys):
  assert not distributed.initialize(*given)
  assert capsys.readouterr().out == ""


def test_where_no_cluster_is_found_there_is_one_process(monkeypatch, capsys):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_")):
      monkeypatch.delenv(name)
  assert not distributed.initialize()
  assert capsys.readouterr().out == ""


def test_a_cluster_that_jax_finds_is_joined(monkeypatch):
  joined = []
  monkeypatch.setenv("SLURM_JOB_ID", "5000")
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node[3-4]")
  monkeypatch.setenv("SLURM_NTASKS", "2")
  monkeypatch.setenv("SLURM_PROCID", "1")
  monkeypatch.setenv("SLURM_LOCALID", "0")
  monkeypatch.setattr(distributed, "_join", lambda *args: joined.append(args))
  assert distributed.initialize()
  [((address, *rest), *timeouts)] = joined
  assert address.startswith("node3:")
  assert rest == [2, 1, [0]] and timeouts == [300, 100]


def test_a_jax_without_its_search_is_one_process_and_says_so(
  monkeypatch, caplog
):
  monkeypatch.setattr(jax_internals, "_search", lambda: None)
  monkeypatch.setenv("SLURM_JOB_ID", "5000")
  assert not distributed.initialize()
  assert "lacks cluster detection" in caplog.text
  assert "--coordinator, --num_processes and --process_id" in caplog.text


def test_a_jax_without_its_service_has_no_second_process(monkeypatch, caplog):
  monkeypatch.setattr(jax_internals, "_state", lambda: None)
  assert distributed.count() == 1 and distributed.is_first()
  with pytest.raises(UserError, match="nearest valid: --num_processes=1"):
    distributed.initialize("localhost:1", 2, 0)
  assert "there can be only one process" in caplog.text


def test_this_jax_lacks_nothing():
  assert jax_internals.missing() == []


def test_one_process_needs_no_other():
  assert distributed.count() == 1 and distributed.is_first()
  assert distributed.broadcast("x") == "x"
  distributed.agree("x", object())
  assert distributed.first_alone(lambda: 5) == 5
  assert distributed.missing_peers(0.0) is None
  distributed.leave(1)


# MARK: the launcher

FAKE = """#!{python}
import os, signal, sys, time
if sys.argv[1] == "-c":
  print({port})
  sys.exit()
flags = dict(flag[2:].split("=") for flag in sys.argv[3:])
own = int(flags["process_id"])
print(sys.argv[1:3], flags, os.environ["JAX_NUM_CPU_DEVICES"], flush=True)
if flags.get("wait"):
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(42 - own))
  print("waiting", flush=True)
  time.sleep(60)
print("error", own, file=sys.stderr)
sys.exit(own * 2)
"""


@pytest.fixture
def launch(tmp_path):
  """Returns the launcher's command around a program that only tells."""
  fake = tmp_path / "python"
  fake.write_text(FAKE.format(python=sys.executable, port=free_port()))
  fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
  command = ["env", f"PYTHON={fake}", "bash", str(LAUNCHER)]
  return lambda *args: [*command, *args]


def test_the_launcher_starts_all_and_tells_who_says_what(launch):
  with running([launch("3", "--mode=plan")], devices=2) as (child,):
    assert child.wait() == 4
    lines = sorted(child.output.splitlines())
  assert len(lines) == 6
  for i in range(3):
    told, error = lines[2 * i : 2 * i + 2]
    assert told.startswith(f"[{i}] ['-m', 'mdm_jax.main'] {{'coordinator'")
    assert "'num_processes': '3'" in told and told.endswith(" 2")
    assert f"'process_id': '{i}', 'mode': 'plan'" in told
    assert error == f"[{i}] error {i}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_passes_signals_on(launch, number):
  with running([launch("2", "--wait=1")]) as (child,):
    child.wait_for("[0] waiting")
    child.wait_for("[1] waiting")
    child.process.send_signal(number)
    assert child.wait() == 42


def test_the_launcher_wants_a_number():
  told = subprocess.run(
    ["bash", LAUNCHER, "--mode=plan"],
    env=environment(1),
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert told.returncode == 2 and told.stderr.startswith("usage: ")
