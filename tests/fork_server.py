"""Starts programs of the package in milliseconds, each a process of its own.

  python fork_server.py SOCKET FOLDER MODULE...

Half of what a short command costs is to import JAX. This process imports the
modules once, asks JAX for no device (a process with threads must not fork), and
forks for every line of JSON that comes through the socket. The child is what
`python -m` would have started, with its own process id, signals, current
folder, standard streams and exit code; that lands in FOLDER when it has ended.

What JAX reads as it is imported is that of this process's environment; see
`command_harness.Command`.
"""

import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import sys

_POLL = 0.005  # seconds


def serve(requests: socket.socket, folder: pathlib.Path) -> None:
  """Forks for every request until there are no more; ends what then runs."""
  numbers: dict[int, int] = {}
  while True:
    if select.select([requests], [], [], _POLL if numbers else None)[0]:
      text, streams, *_ = socket.recv_fds(requests, 1 << 20, 3)
      if not text:
        break
      while not text.endswith(b"\n"):
        text += requests.recv(1 << 20)
      request = json.loads(text)
      pid = os.fork()
      if not pid:
        return _become(streams, **request["program"])
      for stream in streams:
        os.close(stream)
      numbers[pid] = request["number"]
      _tell(folder / f"{request['number']}.pid", pid)
    while numbers:
      pid, status = os.waitpid(-1, os.WNOHANG)
      if not pid:
        break
      code = os.waitstatus_to_exitcode(status)
      _tell(folder / f"{numbers.pop(pid)}.code", code)
  for pid in numbers:
    os.kill(pid, signal.SIGKILL)


def _tell(path: pathlib.Path, number: int) -> None:
  """Writes a file that is whole as soon as it is there."""
  new = path.with_suffix(".new")
  new.write_text(str(number))
  new.rename(path)


def _become(
  streams: list[int], folder: str, env: dict[str, str], argv: list[str]
) -> None:
  """Does in a child what `python -m MODULE ARGS` does in a new process."""
  for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
  os.chdir(folder)
  os.environ.clear()
  os.environ.update(env)
  sys.path[0] = folder
  module, *sys.argv[1:] = argv
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  for module in sys.argv[3:]:
    importlib.import_module(module)
  gc.freeze()
  with socket.socket(fileno=int(sys.argv[1])) as requests:
    serve(requests, pathlib.Path(sys.argv[2]))
