"""Steps on their way to and from a bucket that Orbax can't write to.

Orbax knows file systems and gs://. For s3://, a step's folder lies on this
machine while it is written or read, and its files are copied.
"""

import tempfile

from etils import epath

from mdm_jax.core import distributed, files
from mdm_jax.core.errors import UserError


class Staging:
  """Where Orbax finds the folder of a step; at most one is on this machine."""

  def __init__(self, workdir: epath.Path):
    """Looks at where a workdir is.

    Raises:
      UserError: several processes can't write there together.
    """
    self._scratch: tempfile.TemporaryDirectory | None = None
    self._step: int | None = None
    if files.is_local(workdir) or str(workdir).startswith("gs://"):
      return
    if distributed.count() > 1:
      raise UserError(
        f"workdir {workdir}: {distributed.count()} processes can't write their"
        " checkpoints there together; use a gs:// bucket or a shared folder"
      )
    self._scratch = tempfile.TemporaryDirectory(prefix="mdm_jax-")

  @property
  def room(self) -> epath.Path | None:
    """The folder that needs room for a step, if that is not the workdir."""
    return epath.Path(self._scratch.name) if self._scratch else None

  def begin(self, folder: epath.Path) -> epath.Path:
    """Returns where to write a step that belongs into `folder`."""
    self.clear()
    return self._place(folder)

  def send(self, folder: epath.Path) -> epath.Path:
    """Brings what was written to where it belongs; returns where it was."""
    place = self._place(folder)
    if place != folder:
      files.copy_files(place, folder, files.sizes(place))
    return place

  def fetch(self, folder: epath.Path) -> epath.Path:
    """Returns where a step can be read; it stays there for a second look."""
    place = self._place(folder)
    if place != folder and self._step != int(folder.name):
      self.clear()
      files.copy_files(folder, place, files.sizes(folder))
      self._step = int(folder.name)
    return place

  def clear(self) -> None:
    """Deletes what is on this machine."""
    self._step = None
    for name in files.names(self.room) if self.room else ():
      (self.room / name).rmtree()

  def close(self) -> None:
    """Deletes all that was ever needed."""
    if self._scratch:
      self._scratch.cleanup()

  def _place(self, folder: epath.Path) -> epath.Path:
    return self.room / folder.name if self.room else folder
