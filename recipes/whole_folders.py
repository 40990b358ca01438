"""Folders that are there whole or not at all, whatever is killed when.

A folder is filled under a name that starts with `.unfinished-` and is renamed when all of it is on disk. Whoever
writes holds a lock that the system drops when its process dies: what is found unfinished by the next holder is dead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs must not share a folder there
    fcntl = None

UNFINISHED = ".unfinished-"
_LOCK = ".saving"


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Be the only process that writes to `folder`.

    Args:
        folder: an existing folder; a file `.saving` lies in it for as long as the lock is held.
        wait: whether to wait for a process that holds the lock.

    Yields:
        whether this process has the lock, which it always has after waiting. Where the system has no such locks
        (Windows, some network file systems) it is taken to have it.
    """
    path = folder / _LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        if not _lock(file, wait):
            os.close(file)
            yield False
            return
        # Its last holder may have removed the file while this process waited for it.
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(file)):
            break
        os.close(file)
    try:
        yield True
    finally:
        with suppress(PermissionError):  # of Windows, where an open file cannot be removed
            path.unlink(missing_ok=True)
        os.close(file)


def _lock(file: int, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        # After hours of training, a file system without locks is no reason not to save.
        return True
    return True


def flush(path: Path) -> None:
    """Have the system write a file, or a folder with all that is in it, to disk."""
    if path.is_dir():
        for inner in path.iterdir():
            flush(inner)
        flush_names(path)
        return
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Have the system write to disk which files are in a folder, and not what is in them."""
    if os.name == "nt":  # which does not open folders
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that died left in `folder`; the caller holds its lock."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)
