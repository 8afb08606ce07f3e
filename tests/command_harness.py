"""Commands as a user gives them: real processes, with a cache of their own."""

import atexit
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

import jax
from paths import ROOT, TESTS

QUICK = f"--config={ROOT / 'configs' / 'quickstart.py'}:quick"
# What the program imports late; `mdm_jax.main` itself is run, not imported.
PROGRAMS = (
  *("evaluate", "export", "fit", "interactive", "plan", "prepare"),
  *(
    "preview",
    "report",
    "sample",
    "training_loop",
    "studies.compare",
    "studies.frontier",
  ),
  *("studies.tune", "tuned_sampling"),
)
# Not read while Python starts or JAX is imported.
_LATE = ("XDG_CACHE_HOME",)
_TIMEOUT, _POLL = 300.0, 0.003  # seconds


def environment(cache, **more):
  """Returns the environment of a command: conftest.py's, and a cache."""
  return (
    os.environ
    | {
      "XDG_CACHE_HOME": str(cache),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    | more
  )


class _Server:
  """A process that forks for every command; see fork_server.py."""

  servers = {}

  def __init__(self, env):
    self._numbers, self._files = (
      itertools.count(),
      tempfile.TemporaryDirectory(),
    )
    self.folder = pathlib.Path(self._files.name)
    modules = (f"mdm_jax.{name}" for name in PROGRAMS)
    self._requests, theirs = socket.socketpair()
    script, number = TESTS / "fork_server.py", theirs.fileno()
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, script, str(number), self.folder, *modules],
        env=env,
        pass_fds=[number],
        # Pipes, as the commands' own: Python remembers whether it may seek.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    atexit.register(self._end)

  @classmethod
  def of(cls, env):
    """Returns the one with an environment, started if there is none."""
    key = tuple(sorted((k, v) for k, v in env.items() if k not in _LATE))
    if key not in cls.servers:
      cls.servers[key] = cls(env)
    return cls.servers[key]

  def start(self, streams, **program):
    """Asks for a command; returns its number."""
    number = next(self._numbers)
    request = json.dumps({"number": number, "program": program}) + "\n"
    text = request.encode()
    sent = socket.send_fds(self._requests, [text], streams)
    self._requests.sendall(text[sent:])
    return number

  def read(self, number, kind):
    """Returns the pid or exit code of a command, or None until there is one."""
    assert self._process.poll() is None, self._process.stderr.read().decode()
    path = self.folder / f"{number}.{kind}"
    return int(path.read_text()) if path.exists() else None

  def _end(self):
    self._requests.close()
    self._process.communicate()
    self._files.cleanup()


class Command:
  """A program that runs: the part of `subprocess.Popen` that tests need.

  It is forked off a process that has imported everything, which takes
  milliseconds instead of seconds.
  """

  def __init__(self, folder, env, *argv, typed=""):
    """Starts `python -m` with arguments, of which the first is the module."""
    self.args, self._server, self.returncode = argv, _Server.of(env), None
    self._texts, self._threads = {}, []
    with tempfile.TemporaryFile() as file:
      file.write(typed.encode())
      file.seek(0)
      streams = [file.fileno(), self._pipe("out"), self._pipe("err")]
      self._number = self._server.start(
        streams,
        folder=str(folder),
        env=env,
        argv=[str(arg) for arg in argv],
      )
    for stream in streams[1:]:
      os.close(stream)
    self.pid = self._wait(lambda: self._read("pid"), _TIMEOUT)

  def _pipe(self, name):
    """Returns the end to write to; what comes is kept."""
    read, write = os.pipe()

    def keep():
      with open(read, encoding="utf-8") as file:
        self._texts[name] = file.read()

    self._threads.append(threading.Thread(target=keep, daemon=True))
    self._threads[-1].start()
    return write

  def _read(self, kind):
    return self._server.read(self._number, kind)

  def _wait(self, found, timeout):
    until = time.monotonic() + timeout
    while (value := found()) is None:
      if time.monotonic() > until:
        raise subprocess.TimeoutExpired(self.args, timeout)
      time.sleep(_POLL)
    return value

  def poll(self):
    """Returns the exit code, or None while it runs."""
    self.returncode = self._read("code")
    return self.returncode

  def wait(self, timeout=_TIMEOUT):
    """Returns the exit code."""
    return self._wait(self.poll, timeout)

  def send_signal(self, number):
    """Sends a signal, unless it has ended."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    """Ends it at once, if it hasn't ended."""
    self.send_signal(9)

  def communicate(self, timeout=_TIMEOUT):
    """Waits for the end; returns what it printed and its errors."""
    self.wait(timeout)
    for thread in self._threads:
      thread.join(timeout)
    return self._texts["out"], self._texts["err"]


def call(folder, env, *args, typed="", module="mdm_jax.main"):
  """Runs the program in a folder; returns the finished process."""
  command = Command(folder, env, module, *args, typed=typed)
  try:
    out, err = command.communicate()
  finally:
    command.kill()
  return subprocess.CompletedProcess(args, command.returncode, out, err)


def check_mistake(done, *words):
  """Checks for one line that holds the words, exit code 2, no traceback."""
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
  assert "Traceback" not in done.stderr + done.stdout
  for word in words:
    assert word in done.stderr, word
