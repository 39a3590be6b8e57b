"""What is made once from a data set's files, and read by all ranks of a node and by the next run: plain arrays, mapped into memory.

The pages of a mapped file are in memory once, however many ranks map it; no process has to serve them or to clean up after them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UsageError

Arrays = dict[str, NDArray[np.uint8]]
_FORMAT = 3  # of what is kept; another number and everything is made again
_DIGEST = "digest.txt"


def key(name: str, files: Iterable[Path]) -> str:
    """A name that changes when one of ``files`` does."""
    facts = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return f"{name}-{hashlib.sha256(json.dumps([_FORMAT, *facts]).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Kept:
    """Arrays that are mapped, read-only in effect."""

    arrays: Arrays
    digest: str
    """Of their content: equal on two nodes if that is."""


def kept(where: Path, make: Callable[[Path], None]) -> Kept:
    """The arrays in the folder ``where``; made first if they are not there.

    Args:
        where: its name tells what they are made of.
        make: writes ``*.npy`` files into the folder that it is given. One process does, the others wait for it.

    Raises:
        UsageError: the folder cannot be written.
    """
    if not where.is_dir():
        from filelock import FileLock

        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{where}.lock"):
                if not where.is_dir():
                    part = where.with_name(f".{where.name}.{os.urandom(6).hex()}.part")
                    part.mkdir()
                    try:
                        make(part)
                        (part / _DIGEST).write_text(_digest(part))
                        part.rename(where)
                    finally:
                        shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            why = error.strerror or error
            raise UsageError(
                f"--cache_dir {where.parent}: decoded data cannot be kept there ({why}); name another folder"
            ) from None
    # "c": what a rank writes, by mistake, is its own; "r" would make torch warn.
    arrays = {file.stem: np.load(file, mmap_mode="c") for file in sorted(where.glob("*.npy"))}
    return Kept(arrays, (where / _DIGEST).read_text())


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.npy")):
        array = np.load(file, mmap_mode="r")
        total.update(f"{file.name} {array.shape}".encode())
        total.update(array)
    return total.hexdigest()[:16]


def write(path: Path, arrays: Mapping[str, NDArray[np.uint8]]) -> None:
    """Writes each as a file of its name."""
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
