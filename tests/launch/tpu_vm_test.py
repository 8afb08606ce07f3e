"""launch/tpu_vm: the sequence, the quoting, and gcloud's own word on flags."""

import json
import os
import shutil
import signal
import subprocess

import pytest
from launch_harness import LAUNCH, TIMEOUT, VALUES, Stage, restarts

SCRIPTS = LAUNCH / "tpu_vm"
ARGS = ["--config=a b.py", '--prompt=it\'s $HOME; "x" `id` * \\', "--n", ""]

# Plays a TPU of several lives: each goes through its states, one a look, and
# stays in the last. A run takes the next code, and the state it leaves behind.
GCLOUD = """
path = folder + "/plan.json"
plan = json.load(open(path))

def leave(code, told=""):
  json.dump(plan, open(path, "w"))
  if told:
    print(told, file=sys.stderr if code else sys.stdout)
  sys.exit(code)

what = argv[2:4]
alive = plan.get("life") is not None
if plan.get("broken"):
  leave(1, "ERROR: no active account")
if what == ["queued-resources", "create"]:
  if alive:
    leave(1, "ALREADY_EXISTS")
  plan["life"] = plan["lives"].pop(0)
elif not alive:
  leave(1, "ERROR: NOT_FOUND: the resource was not found")
elif what == ["queued-resources", "describe"]:
  state = plan["life"].pop(0)
  plan["life"] = plan["life"] or [state]
  print("Updates are available", file=sys.stderr)
  leave(0, state)
elif what == ["tpu-vm", "describe"]:
  leave(0, plan.get("node") or "READY")
elif what == ["queued-resources", "delete"]:
  plan["life"] = plan["node"] = None
elif plan["life"][0] != "ACTIVE":
  leave(1, "ERROR: it is not ready")
elif what == ["tpu-vm", "scp"]:
  import shutil
  shutil.copy(argv[4], folder + "/mdm_jax.tar.gz")
elif " train " in argv[-1]:
  code, state, plan["node"] = plan["runs"].pop(0)
  plan["life"] = [state]
  leave(code)
leave(0)
"""


@pytest.fixture
def stage(tmp_path):
  stage = Stage(tmp_path)
  stage.fake("gcloud", GCLOUD)
  stage.fake("git")
  return stage


def plan(stage, lives=(("ACTIVE",),), runs=(), **more):
  runs = [(*run, "ACTIVE", None)[:3] for run in runs]
  told = {"lives": lives, "runs": runs, **more}
  (stage.folder / "plan.json").write_text(json.dumps(told))


def babysit(stage, *args, **changes):
  stage.fake("scp")
  changes = {"POLL_SECONDS": "0", **changes}
  return stage.run(
    "bash", SCRIPTS / "babysit.sh", *(args or ("--config=x",)), **changes
  )


def short(calls):
  """Names what was asked of gcloud, without the looks at the state."""
  names = []
  for name, *argv in calls:
    what = argv[3] if name == "gcloud" else name
    if what == "ssh":
      what = "train" if " train " in argv[-1] else "install"
    if what != "describe":
      names.append(what)
  return names


SET_UP = ["git", "scp", "install"]


@pytest.fixture(autouse=True)
def archive(stage):
  """git only writes its archive down here; test_setup has the real one."""
  stage.fake("git", 'open(argv[-2].partition("=")[2], "w").close()')


# MARK: the babysitter


def test_it_creates_waits_sets_up_and_runs(stage):
  plan(stage, [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]], [(0,)])
  told = babysit(stage)
  assert told.returncode == 0, told.stdout + told.stderr
  assert short(stage.calls()) == ["create", *SET_UP, "train"]
  for state in ("MISSING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
    assert told.stdout.count(f"the-tpu: {state}\n") == 1


@pytest.mark.parametrize("code", [*restarts(), 255])
def test_what_a_code_leads_to(stage, code):
  again = restarts().get(code, True)
  plan(stage, runs=[(code,), (3,)])
  told = babysit(stage)
  assert told.returncode == (3 if again else code)
  trains = ["train"] * (2 if again else 1)
  assert short(stage.calls()) == ["create", *SET_UP, *trains]
  [line] = [x for x in told.stdout.splitlines() if f"exit code {code}:" in x]
  assert line.endswith("starts again" if again else "stops")


@pytest.mark.parametrize(
  "run",
  [
    (255, "SUSPENDED"),
    (255, "ACTIVE", "PREEMPTED"),
    (1, "SUSPENDED"),
    (42, "FAILED"),
  ],
  ids=["suspended", "preempted", "gone", "failed"],
)
def test_what_is_lost_is_created_again(stage, run):
  plan(stage, [["ACTIVE"], ["CREATING", "ACTIVE"]], [run, (0,)])
  told = babysit(stage)
  assert told.returncode == 0, told.stdout + told.stderr
  life = ["create", *SET_UP, "train"]
  assert short(stage.calls()) == [*life, "delete", *life]


def test_what_failed_before_it_was_there_is_created_again(stage):
  plan(stage, [["CREATING", "FAILED"], ["ACTIVE"]], [(0,)])
  assert babysit(stage).returncode == 0
  expected = ["create", "delete", "create", *SET_UP, "train"]
  assert short(stage.calls()) == expected


def test_a_tpu_that_is_there_is_used(stage):
  plan(stage, runs=[(0,)], life=["ACTIVE"])
  assert babysit(stage).returncode == 0
  assert short(stage.calls()) == [*SET_UP, "train"]


def test_where_gcloud_itself_fails_it_gives_up(stage):
  plan(stage, broken=True)
  told = babysit(stage, MAX_ERRORS="3")
  assert told.returncode == 1
  assert told.stderr.count("no active account") == 3
  assert "gives up" in told.stdout and len(stage.calls()) == 3


def test_where_nothing_can_be_created_it_gives_up(stage):
  plan(stage)
  stage.fake("gcloud", 'print("NOT_FOUND", file=sys.stderr); sys.exit(1)')
  told = babysit(stage, MAX_ERRORS="2")
  assert told.returncode == 1
  assert short(stage.calls()) == ["create", "create"]


# MARK: what arrives


def test_arguments_arrive_as_they_were_given(stage):
  plan(stage, runs=[(0,)], life=["ACTIVE"])
  stage.run("bash", SCRIPTS / "run.sh", *ARGS)
  [[_, *argv]] = stage.calls()
  assert argv[:5] == ["compute", "tpus", "tpu-vm", "ssh", VALUES["TPU_NAME"]]
  assert "--worker=all" in argv
  python = stage.fake("python")
  (stage.folder / "mdm_jax").symlink_to(SCRIPTS.parents[1])
  command = argv[-1].removeprefix("--command=")
  told = stage.run("bash", "-c", command, cwd=stage.folder, PYTHON=str(python))
  assert told.returncode == 0, told.stderr
  assert stage.calls() == [["python", "-m", "mdm_jax.main", *ARGS]]


def test_what_is_committed_arrives_and_is_installed(stage, tmp_path):
  plan(stage, life=["ACTIVE"])
  (stage.folder / "bin" / "git").unlink()
  root = tmp_path / "checkout"
  shutil.copytree(LAUNCH, root / "launch")
  (root / "old").write_text("")
  git = ("git", "-C", root, "-c", "user.name=x", "-c", "user.email=x")
  for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "x")):
    assert stage.run(*git, *command).returncode == 0
  (root / "draft").write_text("")
  assert stage.run("bash", root / "launch/tpu_vm/setup.sh").returncode == 0
  command = stage.calls()[-1][-1].removeprefix("--command=")
  (tmp_path / "mdm_jax").mkdir()
  (tmp_path / "mdm_jax" / "stale").write_text("")
  uv = stage.fake("uv")
  told = stage.run("bash", "-c", command, cwd=tmp_path, UV=str(uv))
  assert told.returncode == 0, told.stderr
  files = {path.name for path in (tmp_path / "mdm_jax").iterdir()}
  assert files == {"launch", "old"}
  [venv, install] = stage.calls()
  assert "--python=3.11" in venv and venv[-1] == f"{tmp_path}/venv"
  assert install[-1] == f"{tmp_path}/mdm_jax[tpu,gs]"


@pytest.mark.parametrize("script", ["create", "setup", "run", "delete"])
def test_a_dry_run_prints_what_a_run_does(stage, script):
  args = ARGS if script == "run" else []
  command = ("bash", SCRIPTS / f"{script}.sh", *args)
  told = stage.run(*command, DRY_RUN="1")
  assert told.returncode == 0 and stage.calls() == []
  plan(stage, runs=[(0,)], life=["ACTIVE"] * (script != "create") or None)
  printed = stage.run("bash", "-c", told.stdout)
  assert script == "setup" or printed.returncode == 0, printed.stderr
  as_printed = stage.calls()
  plan(stage, runs=[(0,)], life=["ACTIVE"] * (script != "create") or None)
  assert stage.run(*command).returncode == 0
  assert _without_folder(stage.calls()) == _without_folder(as_printed)


def _without_folder(calls):
  drop = lambda part: part.endswith("mdm_jax.tar.gz") and "/tmp" in part
  return [[part for part in call if not drop(part)] for call in calls]


def test_a_dry_babysitter_prints_all_of_a_run(stage):
  told = babysit(stage, *ARGS, DRY_RUN="1")
  assert told.returncode == 0 and stage.calls() == []
  verbs = [
    line.split()[4] for line in told.stdout.splitlines() if "tpus" in line
  ]
  assert verbs == ["create", "scp", "ssh", "ssh"]


# MARK: one host

PROGRAM = """
import signal, time
signal.signal(signal.SIGTERM, {handler})
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def host(stage):
  """Starts the program on a host, where one may run already."""

  def start(handler="signal.SIG_DFL", **changes):
    python = stage.fake("python", PROGRAM.format(handler=handler))
    return subprocess.Popen(
      ["bash", str(SCRIPTS / "worker.sh"), "train", "--x"],
      env=stage.environment(PYTHON=str(python), **changes),
      stdout=subprocess.PIPE,
      text=True,
    )

  started = []
  yield (
    lambda *args, **changes: (
      started.append(start(*args, **changes)) or started[-1]
    )
  )
  for process in started:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
  ("handler", "seconds", "code"),
  [("lambda *_: sys.exit(42)", "30", 42), ("signal.SIG_IGN", "1", -9)],
  ids=["saves", "hangs"],
)
def test_a_program_left_behind_is_ended_first(host, handler, seconds, code):
  first = host(handler)
  assert first.stdout.readline() == "ready\n"
  second = host(GRACE_SECONDS=seconds)
  told = second.stdout.readline()
  assert f"process {first.pid} still runs" in told
  assert first.wait(TIMEOUT) == code
  lines = [second.stdout.readline()]
  if code < 0:
    assert "SIGKILL" in lines[0]
    lines.append(second.stdout.readline())
  assert lines[-1] == "ready\n"


def test_a_process_that_only_has_the_number_is_left_alone(host, stage):
  other = subprocess.Popen(["sleep", "60"])
  (stage.folder / "mdm_jax.pid").write_text(f"{other.pid}\n")
  first = host()
  assert first.stdout.readline() == "ready\n"
  assert other.poll() is None
  other.kill()
  other.wait()
  assert (stage.folder / "mdm_jax.pid").read_text() == f"{first.pid}\n"


def test_the_program_gets_the_signal_and_its_code_comes_back(host):
  process = host("lambda *_: sys.exit(42)")
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert process.wait(TIMEOUT) == 42


# MARK: gcloud itself


@pytest.mark.slow
def test_gcloud_knows_every_flag(stage, tmp_path):
  gcloud = shutil.which("gcloud")
  if gcloud is None:
    pytest.skip("there is no gcloud here to ask about its flags")
  plan(stage, runs=[(0,)])
  assert babysit(stage).returncode == 0
  stage.run("bash", SCRIPTS / "delete.sh")
  commands = [argv for name, *argv in stage.calls() if name == "gcloud"]
  distinct = list({tuple(argv[:4]): argv for argv in commands}.values())
  assert len(distinct) == 6
  wrong = [*distinct[0], "--nodeid=x"]
  *told, refused = _ask_gcloud(gcloud, [*distinct, wrong], tmp_path)
  for argv, words in zip(distinct, told, strict=True):
    assert "do not currently have an active account" in words, argv
  assert "unrecognized arguments: --nodeid" in refused


def _ask_gcloud(gcloud, commands, folder):
  """Returns its words on each; without an account it only reads the flags."""
  environment = {
    **os.environ,
    "CLOUDSDK_CONFIG": str(folder / "config"),
    "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
    "CLOUDSDK_CORE_DISABLE_PROMPTS": "true",
  }
  processes = [
    subprocess.Popen(
      [gcloud, *argv], env=environment, stderr=subprocess.PIPE, text=True
    )
    for argv in commands
  ]
  return [process.communicate(timeout=TIMEOUT)[1] for process in processes]
