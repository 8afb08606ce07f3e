"""launch/slurm on a real Slurm: one node, two processes, nothing stands in.

It needs Slurm's two daemons (Debian: slurm-wlm), which it runs as this user, on
the loopback interface only.
"""

import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import time

import pytest
from launch_harness import LAUNCH
from processes_harness import free_port

SCRIPT = LAUNCH / "slurm" / "train.sbatch"
TIMEOUT = 120.0  # seconds; Slurm looks at time limits now and then
DAEMONS = [
  shutil.which(name) or shutil.which(f"{name}-wlm")
  for name in ("slurmctld", "slurmd")
]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(None in DAEMONS, reason="Slurm is not installed here"),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
KillWait=15
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES
"""

# Ends by itself only after it was requeued.
PROGRAM = """#!/usr/bin/env bash
trap 'sleep 1; echo "task $SLURM_PROCID saved"; exit 42' TERM
echo "task $SLURM_PROCID of $SLURM_NTASKS: $*"
((${SLURM_RESTART_COUNT:-0})) && exit 0
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


class Cluster:
  """A Slurm of one node."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    own = pathlib.Path(DAEMONS[0]).parents[1]
    config = CONFIG.format(
      folder=folder,
      host=socket.gethostname(),
      user=getpass.getuser(),
      ports=[free_port(), free_port()],
      plugins=next(own.glob("lib/*/slurm-wlm")),
    )
    (folder / "slurm.conf").write_text(config)
    for name in ("state", "spool"):
      (folder / name).mkdir()
    self.environment = os.environ | {
      "SLURM_CONF": str(folder / "slurm.conf"),
      "PYTHON": str(folder / "program"),
    }
    self.program(PROGRAM)
    stepd = DAEMONS[1].replace("slurmd", "slurmstepd")
    commands = [[DAEMONS[0], "-D", "-c"], [DAEMONS[1], "-D", "-d", stepd]]
    self.daemons = [self._start(command) for command in commands]
    self.wait_for(lambda: "idle" in self.ask("sinfo", "-h"))

  def _start(self, command: list[str]) -> subprocess.Popen:
    log = (self.folder / f"{len(command)}.log").open("w")
    return subprocess.Popen(
      command, env=self.environment, stdout=log, stderr=log
    )

  def program(self, text: str) -> None:
    """Sets what the job runs instead of Python."""
    path = self.folder / "program"
    path.write_text(text)
    path.chmod(0o755)

  def ask(self, *command: str) -> str:
    """Returns what one of Slurm's commands prints."""
    return subprocess.run(
      command,
      env=self.environment,
      cwd=self.folder,
      capture_output=True,
      text=True,
      timeout=TIMEOUT,
    ).stdout

  def submit(self, *options: str) -> str:
    """Returns the number of a job of two processes."""
    shape = ("--nodes=1", "--gres=none", "--ntasks-per-node=2")
    shape += ("--cpus-per-task=1", "--parsable")
    return self.ask("sbatch", *shape, *options, str(SCRIPT), "--x=a b").strip()

  def output(self, job: str) -> str:
    path = self.folder / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""

  def tell(self, job: str) -> str:
    return self.ask("scontrol", "show", "job", job)

  def wait_for(self, condition) -> None:
    until = time.monotonic() + TIMEOUT
    while not condition():
      assert time.monotonic() < until, list(self.folder.glob("*.out"))
      time.sleep(0.2)

  def close(self) -> None:
    self.ask("scancel", "--full", "--signal=KILL", "--user", str(os.getuid()))
    for daemon in self.daemons:
      daemon.terminate()
    for daemon in self.daemons:
      daemon.wait(TIMEOUT)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  cluster = Cluster(tmp_path_factory.mktemp("slurm"))
  yield cluster
  cluster.close()


def started(cluster, job):
  return lambda: cluster.output(job).count("of 2: -m mdm_jax.main --x=a b") >= 2


def test_before_the_time_limit_it_saves_and_resumes(cluster):
  job = cluster.submit("--time=1", "--signal=TERM@50")
  cluster.wait_for(lambda: "requeued" in cluster.output(job))
  told = cluster.output(job)
  assert told.count("saved") == 2 and "exit code 42: requeued" in told
  assert "Restarts=1" in cluster.tell(job)
  # Slurm waits for two minutes by itself.
  cluster.wait_for(lambda: "JobState=PENDING" in cluster.tell(job))
  cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
  cluster.wait_for(lambda: "exit code 0" in cluster.output(job))
  assert cluster.output(job).startswith(told)  # appended
  cluster.wait_for(lambda: "JobState=COMPLETED" in cluster.tell(job))


def test_what_is_cancelled_stays_cancelled(cluster):
  job = cluster.submit("--time=5")
  cluster.wait_for(started(cluster, job))
  cluster.ask("scancel", job)
  cluster.wait_for(lambda: "exit code" in cluster.output(job))
  assert "exit code 42: Slurm ended the job" in cluster.output(job)
  cluster.wait_for(lambda: "JobState=CANCELLED" in cluster.tell(job))
  assert "Restarts=0" in cluster.tell(job)


def test_what_ends_for_good_is_not_started_again(cluster):
  cluster.program("#!/usr/bin/env bash\nexit 2\n")
  job = cluster.submit("--time=5")
  cluster.wait_for(lambda: "exit code 2: not started" in cluster.output(job))
  cluster.wait_for(lambda: "JobState=FAILED" in cluster.tell(job))
  assert "ExitCode=2:0" in cluster.tell(job)
