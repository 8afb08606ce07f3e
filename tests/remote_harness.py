"""Object stores on this machine: real processes that speak S3 or GCS."""

import contextlib
import dataclasses
import importlib.util
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import faults_harness
from etils import epath
from paths import TESTS

from mdm_jax.core import files

BUCKET = "bucket"
GCS_SERVER = TESTS / "gcs_server.py"
SERVERS = {
  "s3": ("-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"),
  "gs": (str(GCS_SERVER), "{port}", BUCKET),
}
EXTRAS = {"s3": "moto", "gs": "dev"}
PACKAGES = {
  "s3": ("s3fs", "moto", "flask_cors"),
  "gs": ("gcsfs", "gcp_storage_emulator"),
}


def why_not(scheme: str) -> str | None:
  """Returns why there is no such store here, None if there is one."""
  missing = [p for p in PACKAGES[scheme] if not importlib.util.find_spec(p)]
  if not missing:
    return None
  return f"no {', '.join(missing)}: pip install -e '.[{EXTRAS[scheme]}]'"


@contextlib.contextmanager
def serve(scheme: str, log: pathlib.Path) -> Iterator[dict[str, str]]:
  """Runs a store with one bucket; yields the environment that leads to it."""
  port = _free_port()
  with log.open("w") as out:
    process = subprocess.Popen(
      [sys.executable, *(a.format(port=port) for a in SERVERS[scheme])],
      stdout=out,
      stderr=subprocess.STDOUT,
    )
  try:
    _wait_for(port, process, log)
    url = f"http://127.0.0.1:{port}"
    if scheme == "s3":
      request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
      urllib.request.urlopen(request).close()
    yield environment(scheme, url)
  finally:
    process.kill()
    process.wait()


def environment(scheme: str, url: str) -> dict[str, str]:
  """Returns what leads all packages to a store at a URL."""
  if scheme == "s3":
    return {
      "AWS_ENDPOINT_URL": url,
      "AWS_ACCESS_KEY_ID": "key",
      "AWS_SECRET_ACCESS_KEY": "secret",
      "AWS_DEFAULT_REGION": "us-east-1",
    }
  return {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    # It would look for credentials to ask what kind of bucket it is.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }


def has(env: dict[str, str], name: str) -> bool:
  """Whether the bucket of a store that is led to has an object."""
  url = env.get("AWS_ENDPOINT_URL") or env["STORAGE_EMULATOR_HOST"]
  try:
    urllib.request.urlopen(f"{url}/{BUCKET}/{name}").close()
  except urllib.error.HTTPError as error:
    return error.code == 403  # there, but not for a stranger; else 404
  return True


@dataclasses.dataclass(frozen=True)
class Place(faults_harness.Place):
  """A place whose workdirs may be in a bucket."""

  def workdir(self, name: str) -> epath.Path:
    return epath.Path(name) if "://" in name else epath.Path(self.folder, name)


def download(source: epath.Path, target: pathlib.Path) -> pathlib.Path:
  """Copies a folder from a bucket; returns where it is."""
  files.copy_files(source, epath.Path(target), files.sizes(source))
  return target


def files_of(folder: pathlib.Path) -> set[str]:
  """Returns the names of all files below a folder."""
  found = (path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix() for path in found}


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen, log: pathlib.Path) -> None:
  until = time.monotonic() + 60
  while time.monotonic() < until and process.poll() is None:
    with contextlib.suppress(OSError):
      socket.create_connection(("127.0.0.1", port)).close()
      return
    time.sleep(0.05)
  raise AssertionError(log.read_text())
