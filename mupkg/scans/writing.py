"""Files that are whole or not there, a fingerprint of what they hold, and locks."""

from __future__ import annotations

import errno
import getpass
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock

if TYPE_CHECKING:  # slow to import, and `mupkg.batch` does without
    import pandas as pd

FINGERPRINT = "fingerprint.json"  # beside a cohort, a stage 1, or nnU-Net's copy of one


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` only if the block ends well.

    The temporary name keeps the file's ending, because writers choose the format by it.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".*.part.{glob.escape(path.name)}"):
            if not psutil.pid_exists(int(left.name.split(".")[1])):  # of a process killed while it wrote
                left.unlink()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (temporary, path, *path.parents):
            raise  # of another file, which was to be read
        where = "" if error.filename is None or Path(error.filename) not in path.parents else f": {error.filename}"
        raise OSError(
            error.errno or errno.EIO,
            f"{path}: cannot be written ({error.strerror or error}{where}); make room, or choose a folder that "
            "can be written to, and run again: what is done is kept",
        ) from error
    finally:
        with suppress(OSError):  # there is nothing to remove where a file stands in the folder's place
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_table(table: pd.DataFrame, path: str | Path, *, index: bool = True) -> pd.DataFrame:
    """Write a table as CSV, whole, and give it back for display."""
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=index)
    return table


def fingerprint(paths: Iterable[Path]) -> str:
    """A short SHA-256 over the contents of files: the same data give the same fingerprint anywhere.

    Raises:
        ValueError: naming the file that is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error}); make it again") from error
    return digest.hexdigest()[:16]


def machine_lock(name: str, timeout_s: float = 0.0) -> FileLock:
    """A lock of this name for all of a user's processes on this machine; it ends with its process, however that ends.

    `acquire()` raises filelock.Timeout if another one holds it for `timeout_s` longer; -1: it waits.
    """
    short = hashlib.sha256(name.encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return FileLock(Path(tempfile.gettempdir()) / f"mupkg-{user}-{short}.lock", timeout_s)
