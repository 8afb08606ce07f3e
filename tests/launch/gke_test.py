"""launch/gke: manifests that the schemas and the controllers accept."""

import copy
import http.server
import math
import os
import re
import subprocess
import sys
import threading

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import (
  JobsetV1alpha2JobSet,
)
from launch_harness import LAUNCH, TIMEOUT, VALUES, Stage, restarts

SCRIPT = LAUNCH / "gke" / "jobset.sh"
KINDS = ("tpu", "gpu")
ARGS = ["--config=a b.py", '--prompt=it\'s $HOME; "x" `id` \\']


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
  """What the cluster is given, by kind."""
  stage = Stage(tmp_path_factory.mktemp("stage"))
  texts = {k: stage.run("bash", SCRIPT, k, DRY_RUN="1") for k in KINDS}
  assert all(told.returncode == 0 for told in texts.values()), texts
  return {k: yaml.safe_load(told.stdout) for k, told in texts.items()}


@pytest.fixture(params=KINDS)
def manifest(request, manifests):
  return copy.deepcopy(manifests[request.param])


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


def inner(manifest):
  """Returns the set's only job."""
  [replicated] = manifest["spec"]["replicatedJobs"]
  return replicated["template"]


def pod(manifest):
  return inner(manifest)["spec"]["template"]["spec"]


def container(manifest):
  [own] = pod(manifest)["containers"]
  return own


def flags(manifest):
  return dict(arg[2:].split("=", 1) for arg in container(manifest)["args"])


# MARK: schemas


def validate_job(manifest):
  job = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "x"},
    **inner(manifest),
  }
  kubernetes_validate.validate(job, "1.32", strict=True)


def lost(given, kept, path=""):
  """Yields what does not come back from the typed models as it went in.

  They forget fields that they do not know, and add defaults.
  """
  if isinstance(given, dict):
    for name, value in given.items():
      yield from lost(value, (kept or {}).get(name), f"{path}.{name}")
  elif isinstance(given, list):
    for i, value in enumerate(given):
      yield from lost(value, kept[i] if kept else None, f"{path}[{i}]")
  elif given != kept:
    yield path


def unknown(manifest):
  return list(
    lost(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict())
  )


def test_the_job_inside_fits_the_schema_of_kubernetes(manifest):
  validate_job(manifest)


def test_the_set_around_it_fits_the_models_of_jobset(manifest):
  assert unknown(manifest) == []


@pytest.mark.parametrize(
  ("path", "old", "new"),
  [
    (("spec",), "completions", "complitions"),
    (("spec",), "podFailurePolicy", "podFailurePolice"),
    (("spec", "template", "spec"), "restartPolicy", "restartpolicy"),
    (("spec", "template", "spec"), "nodeSelector", "nodeSelectors"),
  ],
)
def test_a_typo_in_the_job_is_seen(manifest, path, old, new):
  part = inner(manifest)
  for name in path:
    part = part[name]
  part[new] = part.pop(old)
  with pytest.raises(kubernetes_validate.ValidationError):
    validate_job(manifest)


@pytest.mark.parametrize(
  ("path", "old", "new"),
  [
    ((), "metadata", "metedata"),
    (("spec",), "network", "networks"),
    (("spec", "network"), "enableDNSHostnames", "enableDnsHostnames"),
    (("spec", "failurePolicy"), "maxRestarts", "maxRestart"),
    (
      ("spec", "failurePolicy", "rules", 0),
      "onJobFailureReasons",
      "onJobFailureReason",
    ),
    (("spec", "replicatedJobs", 0), "replicas", "replica"),
  ],
)
def test_a_typo_in_the_set_is_seen(manifest, path, old, new):
  part = manifest
  for name in path:
    part = part[name]
  part[new] = part.pop(old)
  try:
    assert all(new in place for place in unknown(manifest))
    assert unknown(manifest)
  except ValueError as error:  # a field that has to be there
    assert old in str(error)


# MARK: what no schema tells


def test_every_exit_code_leads_where_it_should(manifest):
  [rule] = inner(manifest)["spec"]["podFailurePolicy"]["rules"]
  codes = rule["onExitCodes"]
  assert (rule["action"], codes["operator"]) == ("FailJob", "In")
  assert codes["containerName"] == container(manifest)["name"]
  final = {code for code, again in restarts().items() if not again}
  assert set(codes["values"]) == final - {0}
  # The job fails of the rule: the set must not start it again then.
  policy = manifest["spec"]["failurePolicy"]
  [rule] = policy["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert policy["maxRestarts"] > 0


def test_only_the_set_starts_again(manifest):
  spec = inner(manifest)["spec"]
  assert pod(manifest)["restartPolicy"] == "Never"  # for podFailurePolicy
  assert spec["backoffLimit"] == 0
  assert spec["completionMode"] == "Indexed"


def test_sigterm_has_time_and_arrives(manifest):
  assert pod(manifest)["terminationGracePeriodSeconds"] == 600
  assert "command" not in container(manifest)  # the image's entrypoint


def test_shared_memory_is_not_64_mb(manifest):
  [mount] = container(manifest)["volumeMounts"]
  [volume] = pod(manifest)["volumes"]
  assert mount["mountPath"] == "/dev/shm"
  assert mount["name"] == volume["name"]
  assert volume["emptyDir"] == {"medium": "Memory"}


def test_the_hosts_are_those_of_the_topology(manifests):
  spec = inner(manifests["tpu"])["spec"]
  topology = pod(manifests["tpu"])["nodeSelector"][
    "cloud.google.com/gke-tpu-topology"
  ]
  chips = container(manifests["tpu"])["resources"]["limits"]["google.com/tpu"]
  hosts = math.prod(map(int, topology.split("x"))) / chips
  assert spec["parallelism"] == spec["completions"] == hosts == 4


def test_gpu_processes_know_each_other(manifests):
  manifest = manifests["gpu"]
  spec, given = inner(manifest)["spec"], flags(manifest)
  count = int(given["num_processes"])
  assert count == spec["parallelism"] == spec["completions"]
  assert given["process_id"] == "$(JOB_COMPLETION_INDEX)"
  name, _, port = given["coordinator"].partition(":")
  [variable] = container(manifest)["env"]
  assert name == f"$({variable['name']})"
  path = variable["valueFrom"]["fieldRef"]["fieldPath"]
  assert path == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
  assert manifest["spec"]["coordinator"]["podIndex"] == 0  # process 0
  [replicated] = manifest["spec"]["replicatedJobs"]
  assert manifest["spec"]["coordinator"]["replicatedJob"] == replicated["name"]
  assert int(port) == container(manifest)["ports"][0]["containerPort"]


DETECT = """
from jax._src import cloud_tpu_init, clusters
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = {tpu}
detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
print(detect(None, None, None, None, None, 1))
"""


def detected(tpu, **variables):
  """Returns what JAX finds where only these variables are set."""
  told = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", DETECT.format(tpu=tpu)],
    env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", **variables},
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  assert told.returncode == 0, told.stderr
  return told.stdout.strip()


@pytest.fixture
def metadata():
  """The address of a metadata server that knows of no other slices."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(200)
      self.end_headers()

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("localhost", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()


def test_jax_finds_the_hosts_of_a_tpu(manifests, metadata):
  found = detected(
    True,
    TPU_WORKER_HOSTNAMES="localhost,b,c,d",
    TPU_WORKER_ID="2",
    GCE_METADATA_IP=metadata,
  )
  port = container(manifests["tpu"])["ports"][0]["containerPort"]
  assert found == f"('localhost:{port}', 4, 2, None)"
  assert not {"coordinator", "process_id"} & set(flags(manifests["tpu"]))


def test_jax_finds_no_gpu_hosts_without_its_optional_package():
  found = detected(False, KUBERNETES_SERVICE_HOST="x", JOB_COMPLETION_INDEX="1")
  assert found == "(None, None, None, None)"


# MARK: filling in


def test_every_value_is_filled_in(manifest):
  assert manifest["metadata"]["name"] == VALUES["JOB_NAME"]
  assert container(manifest)["image"] == VALUES["IMAGE"]
  assert flags(manifest)["config"] == VALUES["CONFIG"]
  assert flags(manifest)["workdir"] == VALUES["WORKDIR"]
  assert not re.search(r"\$\{", yaml.dump(manifest))


def test_the_cluster_is_given_what_a_dry_run_prints(stage, manifests):
  body = 'open(folder + "/given", "w").write(sys.stdin.read())'
  stage.fake("kubectl", body)
  assert stage.run("bash", SCRIPT, "gpu").returncode == 0
  assert stage.calls() == [["kubectl", "apply", "-f", "-"]]
  given = yaml.safe_load((stage.folder / "given").read_text())
  assert given == manifests["gpu"]


@pytest.mark.parametrize("value", ['x"\n  y: 1', "a b", "${IMAGE}", "*"])
def test_a_value_that_would_break_the_manifest_is_refused(stage, value):
  told = stage.run("bash", SCRIPT, "tpu", CONFIG=value, DRY_RUN="1")
  assert told.returncode == 2 and "CONFIG=" in told.stderr
  assert not told.stdout


# MARK: xpk


def test_xpk_gets_the_program_as_the_process_it_signals(stage):
  stage.fake("xpk")
  python = stage.fake("python", "print(os.getpid())")
  told = stage.run("bash", LAUNCH / "gke" / "xpk.sh", *ARGS)
  assert told.returncode == 0, told.stderr
  [[_, *argv]] = stage.calls()
  given = dict(arg[2:].split("=", 1) for arg in argv if "=" in arg)
  assert argv[:2] == ["workload", "create"] and "--spot" in argv
  assert given["docker-image"] == VALUES["IMAGE"]
  assert given["termination-grace-period-seconds"] == "600"
  assert int(given["max-restarts"]) > 0
  assert given["command"].startswith("exec ")  # most shells do it unasked
  wrapped = f"({given['command']}) & echo $!; wait $!"
  told = stage.run("bash", "-c", wrapped, PYTHON=str(python))
  [started, own] = told.stdout.split()
  assert started == own
  assert stage.calls() == [["python", "-m", "mdm_jax.main", *ARGS]]


@pytest.mark.slow
def test_xpk_itself_makes_a_manifest_of_it(tmp_path):
  environment = tmp_path / "venv"
  pip = environment / "bin" / "pip"
  subprocess.run([sys.executable, "-m", "venv", environment], check=True)
  subprocess.run([pip, "install", "-q", "xpk==1.16.0"], check=True)
  stage = Stage(tmp_path)
  stage.fake("xpk")
  stage.run("bash", LAUNCH / "gke" / "xpk.sh", *ARGS)
  [[_, *argv]] = stage.calls()
  config = str(tmp_path / "config")
  xpk = environment / "bin" / "xpk"
  told = stage.run(xpk, *argv, "--dry-run", CLOUDSDK_CONFIG=config)
  assert told.returncode == 0, told.stderr
  for line in ("terminationGracePeriodSeconds: 600", "maxRestarts: 100"):
    assert line in told.stdout
  assert "(exec python -m mdm_jax.main --config=a\\ b.py" in told.stdout
  codes = re.search(r"operator: NotIn\s+values: \[([0-9,]+)\]", told.stdout)
  again = {int(code) for code in codes[1].split(",")}
  for code, expected in restarts().items():
    assert (code in again) == expected, code
  refused = stage.run(xpk, *argv, "--docker-imag", CLOUDSDK_CONFIG=config)
  assert refused.returncode == 2
