"""launch/slurm: which ends are requeued, and what JAX reads of Slurm."""

import re
import signal
import subprocess

import pytest
from launch_harness import LAUNCH, TIMEOUT, Stage, restarts

from mdm_jax.core import jax_internals

SCRIPT = LAUNCH / "slurm" / "train.sbatch"
ARGS = ["--config=a b.py", "--prompt=it's $HOME"]
OPTIONS = dict(
  option.partition("=")[::2]
  for option in re.findall(r"^#SBATCH --(\S+)$", SCRIPT.read_text(), re.M)
)


@pytest.fixture
def stage(tmp_path):
  stage = Stage(tmp_path)
  stage.fake("scontrol")
  return stage


def submit(stage, *args, code=0, **changes):
  stage.fake("srun", f"sys.exit({code})")
  changes = {"SLURM_JOB_ID": "5000", **changes}
  return stage.run("bash", SCRIPT, *(args or ARGS), **changes)


@pytest.mark.parametrize("code", restarts())
def test_what_a_code_leads_to(stage, code):
  told = submit(stage, code=code)
  assert told.returncode == code
  expected = [["scontrol", "requeue", "5000"]] * restarts()[code]
  srun, *others = stage.calls()
  assert others == expected
  assert srun[-4:] == ["-m", "mdm_jax.main", *ARGS]
  assert told.stdout.startswith(f"exit code {code}: ")


def test_it_is_not_requeued_for_ever(stage):
  for count, expected in (("99", 1), ("100", 0)):
    stage.calls()
    submit(stage, code=42, SLURM_RESTART_COUNT=count)
    assert len(stage.calls()) == 1 + expected


def test_what_slurm_ends_is_not_requeued_by_itself(stage):
  """scancel gives SIGTERM to the shell too; the time limit's does not."""
  body = 'print("ready", flush=True); import time; time.sleep(1); sys.exit(42)'
  stage.fake("srun", body)
  process = subprocess.Popen(
    ["bash", str(SCRIPT), *ARGS],
    env=stage.environment(SLURM_JOB_ID="5000"),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  told, _ = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 42 and "Slurm ended the job" in told
  assert [call[0] for call in stage.calls()] == ["srun"]


def test_without_arguments_it_says_how(stage):
  told = stage.run("bash", SCRIPT)
  assert told.returncode == 2 and told.stderr.startswith("usage: ")


# MARK: options


def test_the_signal_is_for_the_programs(stage):
  assert OPTIONS["signal"] == "TERM@300"  # with B: only the shell gets it
  assert {"requeue", "open-mode"} <= set(OPTIONS)
  assert OPTIONS["open-mode"] == "append"
  submit(stage)
  assert "--kill-on-bad-exit=0" in stage.calls()[0]


def test_there_is_a_process_for_every_gpu():
  assert OPTIONS["gres"] == f"gpu:{OPTIONS['ntasks-per-node']}"
  assert not [name for name in OPTIONS if "per-gpu" in name or "gpus" in name]


def test_all_options_come_before_the_first_command():
  """Slurm reads none after it."""
  lines = SCRIPT.read_text().splitlines()
  command = next(i for i, x in enumerate(lines) if x and x[0] != "#")
  assert not [x for x in lines[command:] if x.startswith("#SBATCH")]
  assert OPTIONS


# MARK: JAX


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node7", "node7"),
    ("node7,other2", "node7"),
    ("node[007-015],other2", "node007"),
    ("gpu-a[3,5-9]", "gpu-a3"),
    ("gpu-a[3-4,9],b1", "gpu-a3"),
  ],
)
def test_jax_reads_the_nodes(monkeypatch, nodes, first):
  variables = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": nodes,
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  address, count, own, devices = jax_internals.find_cluster(seconds=1)
  assert address == f"{first}:{65535 - 2**12 + 1 + 5000 % 2**12}"
  assert (count, own) == (16, 11)
  assert devices == [3]  # the reason for a task for every GPU
