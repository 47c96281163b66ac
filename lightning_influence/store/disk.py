"""Disk blocks and durable renames: what the writer asks of the file system.

A memory map on a full disk does not raise, it ends the process with SIGBUS. So every block is
reserved before anything is mapped, and a full disk is an error like any other.
"""

import errno
import os
import shutil
from pathlib import Path

from lightning_influence.errors import StoreError

_CHUNK = 1 << 20


def reserve(path: Path, nbytes: int) -> None:
    """Make the file at `path` own disk blocks up to `nbytes`, so that writes there cannot fail.

    Copy-on-write file systems (btrfs, zfs, compressed ones) do not promise this.

    Args:
        path: an existing file.
        nbytes: its size afterwards, if it was smaller.

    Raises:
        StoreError: if the disk, a quota or a file size limit has no room.
    """
    try:
        with path.open("r+b") as file:
            if not _allocate(file.fileno(), nbytes):
                for start in range(file.seek(0, os.SEEK_END), nbytes, _CHUNK):
                    file.write(bytes(min(_CHUNK, nbytes - start)))
                file.flush()
                os.fsync(file.fileno())
    except OSError as err:
        free = shutil.disk_usage(path.parent).free
        raise StoreError(
            f"no room for {path}: it needs {nbytes} bytes, {free} bytes are free on its disk "
            f"({err.strerror}). Free space, raise the quota or file size limit, or store less."
        ) from err


def replace_durably(source: Path, target: Path) -> None:
    """Rename `source` to `target` so that after a power cut `target` is the old or the new file."""
    with source.open("r+b") as file:
        os.fsync(file.fileno())
    source.replace(target)
    if os.name == "posix":  # elsewhere a directory cannot be opened, nor needs to be
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _allocate(descriptor: int, nbytes: int) -> bool:
    """Reserve blocks without writing them; False where the system or file system cannot."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as err:
        if err.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True
