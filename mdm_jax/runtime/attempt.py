"""One attempt at a run: who has the workdir, how far it came, how it ended.

lock.json       the attempt that is running, renewed every few seconds
attempts.jsonl  all that ended, in order
exit.json       how the last one ended

Whoever finds the lock of an attempt that is dead ends it in its place, so a
killed attempt is counted like any other.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from etils import epath

from mdm_jax.core import files, memory
from mdm_jax.core.errors import (
  CrashLoop,
  Exit,
  StorageError,
  UserError,
  exit_code,
)
from mdm_jax.runtime import goodput

_BEAT = 5.0  # seconds between two renewals of the lock
_STALE = 60.0  # seconds without one after which another host's lock is dead
_DIED = (None, Exit.BUG, Exit.ABORTED)  # ends that count towards a crash loop


class Attempt:
  """One attempt, from the lock to the exit code; a `with` block around all.

  Attributes:
    number: of the attempt, from 1.
    ledger: where its time goes.
    start: updates that were done when it began.
    update: updates done now.
    committed: updates of the newest checkpoint that is safe.
    rows: of the update that failed, if one did.
    changes: of the config since the attempt before.
  """

  def __init__(
    self, folder: epath.Path, config: str, max_attempts: int, process: int = 0
  ):
    """Describes an attempt; entering it begins it.

    Args:
      folder: the workdir.
      config: a hash of the config; with another one, a crash loop is over.
      max_attempts: that may die in a row without saving anything new.
      process: of several; process 0 has the lock and writes the attempt down,
        the others only how they ended.
    """
    self._process = process
    self._folder, self._config = folder, config
    self._max_attempts = max_attempts
    self._over, self._writing = threading.Event(), threading.Lock()
    self._started = time.time()
    self.ledger = goodput.Ledger()
    self.number, self.start, self.update, self.committed = 1, 0, 0, 0
    self.rows: list[int] | None = None
    self.changes: str | None = None
    self.before: list[dict[str, Any]] = []

  def __enter__(self) -> "Attempt":
    """Takes the lock.

    Raises:
      UserError: another process has it.
      CrashLoop: attempts of this config died too often.
    """
    if self._process:
      return self
    with _alone(self._folder):
      self._take_over()
      self.before = files.read_lines(self._folder / "attempts.jsonl")
      self.number = len(self.before) + 1
      self._claim()
      # Delete the stale exit.json: if we are killed, it must not be read as our
      # result.
      with contextlib.suppress(OSError):
        files.delete(self._folder / "exit.json")
    try:
      self._check_crash_loop()
    except CrashLoop as error:
      self.finish(Exit.CRASH_LOOP, str(error))
      raise
    threading.Thread(target=self._keep, name="attempt", daemon=True).start()
    return self

  def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
    told = "".join(traceback.format_exception(error)) if error else None
    code = exit_code(error and (memory.told(error) or error))
    reason = _reason(error) if error else "done"
    self.finish(code, reason, told if code == Exit.BUG else None)

  def finish(self, code: Exit, reason: str, told: str | None = None) -> None:
    """Writes how the attempt ended and gives the lock back, once."""
    if not self._end():
      return
    record = self._record() | {
      "ended": True,
      "code": int(code),
      "reason": reason,
    }
    for name in ("rows", "changes"):
      if getattr(self, name) is not None:
        record[name] = getattr(self, name)
    told = {"code": int(code), "name": code.name.lower(), **record} | (
      {"traceback": told} if told else {}
    )
    name = (
      f"exit.process_{self._process}.json" if self._process else "exit.json"
    )
    # A full disk must not change the exit code; what fits is written.
    with contextlib.suppress(OSError):
      files.write_json(self._folder / name, told)
    if self._process:
      return
    with contextlib.suppress(OSError):
      files.append_line(self._folder / "attempts.jsonl", record)
    with contextlib.suppress(OSError):
      files.delete(self._folder / "lock.json")

  def _end(self) -> bool:
    """Sees to it that no beat comes any more; tells whether it did not before.

    A beat that is being written would bring the lock back behind us. One that a
    store does not let come to its end is not waited for.
    """
    alone = self._writing.acquire(timeout=_BEAT)
    try:
      first = not self._over.is_set()
      self._over.set()
      return first
    finally:
      if alone:
        self._writing.release()

  def begin(self, update: int) -> None:
    """Tells what the attempt goes on from."""
    self.start = self.update = self.committed = update

  def commit(self, update: int) -> None:
    """Tells that an update is safe; any thread may."""
    self.committed = max(self.committed, update)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of the whole run by cause, all attempts together."""
    return goodput.total([*self.before, self._record()])

  # MARK: the lock

  def _record(self) -> dict[str, Any]:
    return {
      "number": self.number,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "born": _born(os.getpid()),
      "started": self._started,
      "beat": time.time(),
      "config": self._config,
      "start": self.start,
      "update": self.update,
      "committed": self.committed,
      "seconds": self.ledger.seconds(),
    }

  def _beat(self) -> None:
    files.write_json(self._folder / "lock.json", self._record())

  def _keep(self) -> None:
    while not self._over.wait(_BEAT):
      with contextlib.suppress(OSError):
        owner = files.read_json(self._folder / "lock.json")
        if owner and (owner["host"], owner["pid"]) != _me():
          self._lose(owner)
        with self._writing:
          if not self._over.is_set():
            self._beat()

  def _lose(self, owner: dict[str, Any]) -> None:
    """Leaves a workdir that another process took for abandoned."""
    print(
      f"error: {self._folder} was taken over by {_who(owner)}, this process"
      " having been silent for too long",
      file=sys.stderr,
      flush=True,
    )
    os._exit(Exit.STORAGE)

  def _take_over(self) -> None:
    """Ends what a dead attempt left behind; refuses if it is alive."""
    path = self._folder / "lock.json"
    owner = files.read_json(path)
    if owner is None:
      return
    if not _is_dead(owner):
      raise self._in_use(_who(owner))
    ended = owner | {"ended": True, "code": None, "reason": "killed"}
    files.append_line(self._folder / "attempts.jsonl", ended)
    files.delete(path)

  def _claim(self) -> None:
    """Writes the first beat; in a bucket, another one may come before it."""
    try:
      files.create_json(self._folder / "lock.json", self._record())
    except FileExistsError:
      raise self._in_use("a process that began at the same time") from None

  def _in_use(self, by: str) -> UserError:
    return UserError(
      f"workdir {self._folder} is in use by {by}; wait for it, stop it, or give"
      " another --workdir"
    )

  def _check_crash_loop(self) -> None:
    died = []
    for attempt in reversed(self.before):
      if attempt.get("config") != self._config:
        break
      if attempt["committed"] > attempt["start"]:
        break
      if attempt["code"] in _DIED:
        died.append(attempt)
    if len(died) < self._max_attempts:
      return
    last = died[0]
    rows = f" Its rows: {last['rows']}." if "rows" in last else ""
    at = last["update"]
    raise CrashLoop(
      f"{len(died)} attempts in a row died without saving anything new, the"
      f" last after update {at}: {last['reason']}.{rows} Mend the cause, pass"
      f" over it with --config.train.skip_updates={at}:{at + 2}, or allow more"
      f" with --config.train.max_attempts={2 * self._max_attempts}"
    )


def _me() -> tuple[str, int]:
  return socket.gethostname(), os.getpid()


def _who(owner: dict[str, Any]) -> str:
  age = max(time.time() - owner["beat"], 0)
  return (
    f"process {owner['pid']} on {owner['host']} (lock renewed {age:.0f} s ago)"
  )


def _is_dead(owner: dict[str, Any]) -> bool:
  try:
    host, pid, beat = owner["host"], owner["pid"], owner["beat"]
  except KeyError:
    return True
  if host != socket.gethostname():
    return time.time() - beat > _STALE
  # A number may have been given to another process since, even to this one.
  return pid == os.getpid() or _born(pid) != owner.get("born")


def _born(pid: int) -> str | None:
  """Returns when a process of this machine began, None if it is gone.

  Where the system doesn't tell, all that are alive began at the same time.
  """
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
  except OSError:
    pass
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return None if os.path.isdir("/proc/self") else "?"


def _reason(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [""]
  return lines[0] or type(error).__name__


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
  """Lets one process of a machine at a time look at the lock and take it.

  Raises:
    StorageError: the folder can't be opened.
  """
  if not files.is_local(folder):
    yield  # a bucket: the lock is written where none is, or refused
    return
  try:
    descriptor = os.open(folder, os.O_RDONLY)
  except OSError as error:
    raise StorageError(f"workdir {folder}: {error.strerror}") from error
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)
