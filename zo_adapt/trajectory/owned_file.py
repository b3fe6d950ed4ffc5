"""A file with one writer: a second one is refused, and what others do to it is noticed."""

import errno
import os
import weakref
from pathlib import Path
from typing import Self

from zo_adapt.errors import TrajectoryInUseError, TrajectoryWriteError
from zo_adapt.trajectory.safe_file import new_scratch, sync_folder, write_all, write_errors

try:
    import fcntl
except ImportError:  # Windows: what others do is noticed, but not kept from happening
    fcntl = None  # type: ignore[assignment]


class OwnedFile:
    """An open file that this process alone writes, until it is closed or the process ends.

    The lock (``flock``) is one that other programs may ignore, and that some network file systems
    do not have. So before every write the file is looked at: another one under its name, or
    another length, is an error, and nothing is written.

    Args:
        path: A file that is there.
        fsync: Wait for the disk at every write.

    Raises:
        TrajectoryInUseError: Another process, or another run of this one, is writing it.
        TrajectoryWriteError: It cannot be opened.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path, self._fsync = path, fsync
        with write_errors(path):
            self._own(os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0)))
            if not self._is_in_place():  # replaced between opening and locking
                self.close()
                raise TrajectoryInUseError(f"{path} is just being replaced by another run")

    @classmethod
    def created(cls, path: Path, data: bytes, *, replace: bool, fsync: bool = False) -> Self:
        """A new file, locked before it has its name, and in place whole or not at all.

        Args:
            path: Its name; the folder is made.
            data: Its first content.
            replace: Whether there may be a file of that name, which goes.
            fsync: Wait for the disk, here and at every write.

        Raises:
            TrajectoryInUseError: There is one and it may not go.
            TrajectoryWriteError: The folder cannot be written to, or the disk is full.
        """
        made = cls.__new__(cls)
        made.path, made._fsync = path, fsync
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, scratch = new_scratch(path)
            made._own(descriptor)
            try:
                write_all(descriptor, data)
                if fsync:
                    os.fsync(descriptor)
                made._name(scratch, replace)
            except BaseException:
                made.close()
                scratch.unlink(missing_ok=True)
                raise
            if fsync:
                sync_folder(path.parent)
        return made

    def _name(self, scratch: Path, replace: bool) -> None:
        if not replace:
            try:
                os.link(scratch, self.path)  # unlike renaming, it never replaces
            except FileExistsError:
                if self.path.is_symlink() and not self.path.exists():
                    raise TrajectoryWriteError(
                        f"{self.path} is a link to what is not there; remove it, or choose "
                        "another name"
                    ) from None
                raise TrajectoryInUseError(
                    f"{self.path} has just been begun by another run; choose another name"
                ) from None
            except OSError:  # a file system without links
                pass
            else:
                scratch.unlink()
                return
        os.replace(scratch, self.path)

    def _own(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """Give the file up; called when the object goes, too."""
        _open.add(self)
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise TrajectoryInUseError(
                f"{self.path} is being written by another run; wait for its end, or choose another "
                "name"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                self.close()
                raise

    def _is_in_place(self) -> bool:
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def _check(self, length: int) -> None:
        if not self._is_in_place():
            raise TrajectoryWriteError(
                f"{self.path} was moved, deleted or replaced while the run was writing it; nothing "
                "more is written"
            )
        found = os.fstat(self._descriptor).st_size
        if found != length:
            raise TrajectoryWriteError(
                f"{self.path} was changed by another program: it has {found} bytes, and the run "
                f"wrote {length}; nothing more is written"
            )

    def append(self, data: bytes, length: int) -> None:
        """Write at the end, whole or not at all.

        Args:
            data: What to write.
            length: Of the file so far, as its writer knows it.

        Raises:
            TrajectoryWriteError: Another program changed the file, or the disk is full; it ends
                where it did.
        """
        with write_errors(self.path):
            self._check(length)
            try:
                os.lseek(self._descriptor, length, os.SEEK_SET)
                write_all(self._descriptor, data)
                if self._fsync:
                    os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, length)
                raise

    def cut(self, length: int) -> None:
        """Drop what follows so many bytes.

        Raises:
            TrajectoryWriteError: The file cannot be written to, or is another one by now.
        """
        with write_errors(self.path):
            if not self._is_in_place():
                self._check(length)
            os.ftruncate(self._descriptor, length)


_open: "weakref.WeakSet[OwnedFile]" = weakref.WeakSet()


def _give_up() -> None:
    """A forked child keeps no lock: it would outlast a killed parent."""
    for file in list(_open):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up)
