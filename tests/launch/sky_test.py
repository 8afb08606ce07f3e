"""launch/sky: tasks that SkyPilot itself accepts."""

import json
import subprocess
import sys

import pytest
import yaml
from launch_harness import LAUNCH, OUT_OF_MEMORY, VALUES, Stage, restarts
from paths import ROOT

KINDS = ("tpu", "gpu")
ADDRESSES = "a.example\nb.example"

# The task's schema, and what SkyPilot makes of the task.
READ = """
import copy, json, sys
import jsonschema, sky
from sky.utils import schemas

def refusal(task):
  try:
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
  except jsonschema.ValidationError as error:
    return error.message

def read(task):
  read = sky.Task.from_yaml_config(copy.deepcopy(task), json.loads(sys.argv[2]))
  [resources] = read.resources
  return {
    "hosts": read.num_nodes,
    "spot": resources.use_spot,
    "recovery": resources.job_recovery,
    "accelerators": resources.accelerators,
    "mounts": {k: v.source for k, v in read.storage_mounts.items()},
  }

def work(task):
  typo = {**task, "nmae": task["name"]}
  inside = copy.deepcopy(task)
  inside["resources"]["use_spto"] = True
  kinds = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"]
  return {
    "task": read(task),
    "refused": [refusal(task), refusal(typo), refusal(inside)],
    "recovery": [name for kind in kinds for name in kind.get("properties", ())],
  }

print(json.dumps([work(task) for task in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def tasks():
  return {
    kind: yaml.safe_load((LAUNCH / "sky" / f"{kind}.yaml").read_text())
    for kind in KINDS
  }


@pytest.fixture(params=KINDS)
def task(request, tasks):
  return tasks[request.param]


def recovery(task):
  return task["resources"]["job_recovery"]


def test_every_exit_code_leads_where_it_should(task):
  again = {code for code, yes in restarts().items() if yes}
  # SkyPilot gives 137 to all hosts where one has failed, for whatever reason.
  expected = again - {OUT_OF_MEMORY}
  assert set(recovery(task)["recover_on_exit_codes"]) == expected
  assert "max_restarts_on_errors" not in recovery(task)  # none for the others
  assert task["resources"]["use_spot"]


def test_the_run_is_kept_in_the_bucket(task):
  [(folder, mount)] = task["file_mounts"].items()
  assert mount == {"source": "${BUCKET_URI}", "mode": "MOUNT"}
  assert f"--workdir={folder}/" in task["run"]
  assert task["envs"] == {"BUCKET_URI": None, "CONFIG": None}  # to be given


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_knows_the_other_processes(kind, tasks, tmp_path):
  stage = Stage(tmp_path)
  (tmp_path / "venv").mkdir()
  (tmp_path / "bin").rename(tmp_path / "venv" / "bin")
  (tmp_path / "bin").symlink_to(tmp_path / "venv" / "bin")
  stage.fake("python", "sys.exit(42)")
  told = stage.run(
    "bash",
    "-c",
    tasks[kind]["run"],
    SKYPILOT_NODE_IPS=ADDRESSES,
    SKYPILOT_NUM_NODES="2",
    SKYPILOT_NODE_RANK="1",
  )
  assert told.returncode == 42
  [[_, *argv]] = stage.calls()
  config = f"--config={VALUES['CONFIG']}"
  expected = ["-m", "mdm_jax.main", config, "--workdir=/run-storage/run"]
  if kind == "gpu":
    expected.append("--coordinator=a.example:8476")
    expected += ["--num_processes=2", "--process_id=1"]
  assert argv == expected


@pytest.mark.slow
def test_skypilot_itself_reads_the_tasks(tasks, tmp_path):
  """In an environment of its own: it brings seventy packages."""
  environment = tmp_path / "venv"
  pip = environment / "bin" / "pip"
  subprocess.run([sys.executable, "-m", "venv", environment], check=True)
  subprocess.run([pip, "install", "-q", "skypilot==0.14.1"], check=True)
  values = {name: VALUES[name] for name in ("BUCKET_URI", "CONFIG")}
  told = Stage(tmp_path).run(
    environment / "bin" / "python",
    *("-c", READ, json.dumps([tasks[kind] for kind in KINDS])),
    json.dumps(values),
    cwd=ROOT,
  )
  assert told.returncode == 0, told.stderr
  for kind, result in zip(
    KINDS, json.loads(told.stdout.splitlines()[-1]), strict=True
  ):
    fits, *refused = result["refused"]
    assert fits is None
    assert "nmae" in refused[0] and "use_spto" in refused[1]
    # Of these alone it takes any name, and does nothing with it.
    assert set(recovery(tasks[kind])) <= set(result["recovery"])
    read = result["task"]
    assert read["spot"] and read["hosts"] == (2 if kind == "gpu" else 1)
    assert read["mounts"] == {"/run-storage": VALUES["BUCKET_URI"]}
    codes = recovery(tasks[kind])["recover_on_exit_codes"]
    assert read["recovery"]["recover_on_exit_codes"] == codes
