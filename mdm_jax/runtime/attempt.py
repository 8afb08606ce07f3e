"""The workdir's lock, and the record of a run's attempts.

lock.json       the running attempt, renewed every few seconds as a heartbeat
attempts.jsonl  all attempts that ended, in order
exit.json       how the last one ended

A killed attempt leaves its lock behind. The next one writes it to
attempts.jsonl, so killed attempts are counted like all others.
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

_BEAT = 5.0  # seconds between two heartbeats
_STALE = 60.0  # seconds without a heartbeat until another host's lock is stale
# Exit codes that count towards a crash loop; None is a kill.
_DIED = (None, Exit.BUG, Exit.ABORTED)


class Attempt:
  """One attempt at a run: the time from a start of the program to its exit.

  A context manager. Entering takes the workdir's lock; leaving releases it and
  records how the attempt ended.

  Attributes:
    number: index of the attempt, from 1.
    ledger: the attempt's time by cause.
    start: number of updates done when it started.
    update: number of updates done now.
    committed: number of updates in the newest complete checkpoint.
    rows: indices of the rows of the update that failed, if one did.
    changes: how the config differs from the last attempt's, if it does.
    before: the records of all earlier attempts.
  """

  def __init__(
    self, folder: epath.Path, config: str, max_attempts: int, process: int = 0
  ):
    """Initializes an attempt; entering the context starts it.

    Args:
      folder: the workdir.
      config: a hash of the config. A changed config resets the crash count.
      max_attempts: number of consecutive attempts that may die without saving
        anything new.
      process: index of this process. Process 0 holds the lock and records the
        attempt; the others only write how they ended.
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
      UserError: another process holds it.
      CrashLoop: too many attempts with this config died.
    """
    if self._process:
      return self
    with _exclusive(self._folder):
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
    code = exit_code(error and (memory.as_user_error(error) or error))
    reason, trace = _reason(error) if error else "done", None
    if code == Exit.BUG:
      trace = "".join(traceback.format_exception(error))
    self.finish(code, reason, trace)

  def finish(self, code: Exit, reason: str, trace: str | None = None) -> None:
    """Records how the attempt ended and releases the lock, once.

    Args:
      code: the exit code.
      reason: one line.
      trace: the traceback of a bug.
    """
    # The watchdog's or the signals' thread may have been first.
    if not self._end():
      return
    end = {"ended": True, "code": int(code), "reason": reason}
    more = {"rows": self.rows, "changes": self.changes}
    record = self._record() | end
    record |= {k: v for k, v in more.items() if v is not None}
    result = {"code": int(code), "name": code.name.lower(), **record}
    result |= {"traceback": trace} if trace else {}
    suffix = f".process_{self._process}" if self._process else ""
    # A full disk must not change the exit code, so try each file by itself.
    with contextlib.suppress(OSError):
      files.write_json(self._folder / f"exit{suffix}.json", result)
    if self._process:
      return
    with contextlib.suppress(OSError):
      files.append_line(self._folder / "attempts.jsonl", record)
    with contextlib.suppress(OSError):
      files.delete(self._folder / "lock.json")

  def _end(self) -> bool:
    """Stops the heartbeat; returns whether it was running.

    Waits for a heartbeat that is being written: it would recreate lock.json
    after we delete it.
    """
    # With a timeout, since writing to a bucket that doesn't answer may hang.
    alone = self._writing.acquire(timeout=_BEAT)
    try:
      first = not self._over.is_set()
      self._over.set()
      return first
    finally:
      if alone:
        self._writing.release()

  def begin(self, update: int) -> None:
    """Sets the update that the attempt starts or resumes from."""
    self.start = self.update = self.committed = update
    self._renew()

  def commit(self, update: int) -> None:
    """Records that a checkpoint is complete. Thread-safe."""
    self.committed = max(self.committed, update)
    # Now: a kill before the next heartbeat would count as one without progress.
    self._renew()

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of the whole run by cause, over all attempts."""
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
      self._renew()

  def _renew(self) -> None:
    if self._process:
      return
    with contextlib.suppress(OSError):
      owner = files.read_json(self._folder / "lock.json")
      if owner and (owner["host"], owner["pid"]) != _me():
        self._lose(owner)
      with self._writing:
        if not self._over.is_set():
          self._beat()

  def _lose(self, owner: dict[str, Any]) -> None:
    """Exits at once, because another process has taken the lock over.

    That happens if this process was silent for too long, e.g. suspended.
    """
    print(
      f"error: {self._folder} was taken over by {_who(owner)}, because this"
      " process did not renew its lock in time",
      file=sys.stderr,
      flush=True,
    )
    os._exit(Exit.STORAGE)

  def _take_over(self) -> None:
    """Records a dead attempt from its lock; raises UserError if it is alive."""
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
    """Writes the first heartbeat; raises UserError if another process did.

    Only in a bucket: on a file system `_exclusive` keeps other processes out.
    """
    try:
      files.create_json(self._folder / "lock.json", self._record())
    except FileExistsError:
      raise self._in_use("a process that started at the same time") from None

  def _in_use(self, by: str) -> UserError:
    return UserError(
      f"workdir {self._folder} is in use by {by}; wait for it, stop it, or use"
      " another --workdir"
    )

  def _check_crash_loop(self) -> None:
    # From the newest attempt back to the last one with progress or another
    # config. Orderly ends in between, such as a stop, don't count.
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
    rows = f" It read rows {last['rows']}." if "rows" in last else ""
    at = last["update"]
    first = max(at - 1, 0)
    raise CrashLoop(
      f"{len(died)} attempts in a row died without saving anything new, the"
      f" last after update {at}: {last['reason']}.{rows} Fix the cause; or skip"
      " the update that failed and the one before it, whose error may show one"
      f" update late, with --config.train.skip_updates={first}:{at + 1};"
      " or allow more attempts with"
      f" --config.train.max_attempts={2 * self._max_attempts}"
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
  # Another process may have the pid by now, even this one: in containers the
  # first process always has the same. So compare when the processes started.
  return pid == os.getpid() or _born(pid) != owner.get("born")


def _born(pid: int) -> str | None:
  """Returns the start time of a local process, or None if it is gone.

  Without /proc, as on macOS, it is "?" for every process that is alive.
  """
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    # The second field is the command in brackets, which may hold spaces; after
    # it come the state (Z: a zombie) and, 19 further, the start time.
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
def _exclusive(folder: epath.Path) -> Iterator[None]:
  """Lets one process at a time check and take the lock, by `flock`.

  Raises:
    StorageError: the folder can't be opened.
  """
  # In a bucket creating lock.json fails if it exists, which is enough.
  if not files.is_local(folder):
    yield
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
