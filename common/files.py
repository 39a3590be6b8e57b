"""Files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def beside(path: Path) -> Path:
    """A temporary name beside ``path`` that no other process has: not on another host either, where process ids are the same."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it: nobody ever sees half a file."""
    path = Path(path).absolute()
    part = beside(path)
    try:
        with part.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _strict(value: Any) -> Any:
    """``value`` with None for what JSON cannot say: a loss that has become infinite or no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def json_text(value: Any) -> str:
    """``value`` as JSON, one top-level key a line so that result files can be read and diffed."""
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(_strict(item), allow_nan=False)}" for key, item in value.items())
    return f"{{\n{rows}\n}}\n"


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``json_text(value)``."""
    write_whole(path, lambda stream: stream.write(json_text(value).encode()))
