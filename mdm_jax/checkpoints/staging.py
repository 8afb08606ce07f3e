"""Local copies of checkpoints for buckets that Orbax can't write to (s3://).

Orbax supports file systems and gs://. For s3:// it writes and reads a step in a
temporary folder on this machine, and the files are copied to or from the
bucket.
"""

import tempfile

from etils import epath

from mdm_jax.core import distributed, files
from mdm_jax.core.errors import UserError


class Staging:
  """Maps a step's folder to the one that Orbax writes and reads.

  They differ only if the workdir needs staging. The temporary folder holds at
  most one step.
  """

  def __init__(self, workdir: epath.Path):
    """Creates a temporary folder if the workdir needs one.

    Raises:
      UserError: it needs one, and there are several processes.
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
    """The temporary folder, if there is one."""
    return epath.Path(self._scratch.name) if self._scratch else None

  def begin(self, folder: epath.Path) -> epath.Path:
    """Returns where to write the step that belongs to `folder`."""
    self.clear()
    return self._place(folder)

  def send(self, folder: epath.Path) -> epath.Path:
    """Copies a written step to `folder` if needed; returns where it was."""
    place = self._place(folder)
    if place != folder:
      files.copy_files(place, folder, files.sizes(place))
    return place

  def fetch(self, folder: epath.Path) -> epath.Path:
    """Returns where the step of `folder` can be read, copying it if needed.

    The copy is kept until the next step: a restore first reads its metadata.
    """
    place = self._place(folder)
    if place != folder and self._step != int(folder.name):
      self.clear()
      files.copy_files(folder, place, files.sizes(folder))
      self._step = int(folder.name)
    return place

  def clear(self) -> None:
    """Deletes the local copy."""
    self._step = None
    for name in files.names(self.room) if self.room else ():
      (self.room / name).rmtree()

  def close(self) -> None:
    """Deletes the temporary folder."""
    if self._scratch:
      self._scratch.cleanup()

  def _place(self, folder: epath.Path) -> epath.Path:
    return self.room / folder.name if self.room else folder
