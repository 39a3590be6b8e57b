"""What the benchmarks' command lines share: values are refused in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from common.errors import UsageError

T = TypeVar("T")
HARNESS_FLAGS = ("--result", "--events", "--plot", "--save", "--inspect", "--world_size", "--nproc_per_node", "--nnodes",
                 "--node_rank", "--master_port", "--start_method", "--max_restarts")  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def __init__(self, name: str, usage: str, description: str) -> None:
        """``name`` is the script's; ``description`` its docstring."""
        super().__init__(
            prog=name,
            usage=usage,
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UsageError(f"{message}; see --help")


def converted(name: str, text: str, convert: Callable[[str], T]) -> T:
    """``convert(text)``.

    Raises:
        UsageError: it is not allowed for the flag ``name``.
    """
    try:
        return convert(text)
    except ValueError as allowed:
        raise UsageError(f"--{name} {text}: not allowed; give {allowed}") from None


def refuse_taken(script: str, flags: Sequence[str], also: Sequence[str] = ()) -> None:
    """Raises UsageError for a training flag that ``script`` sets itself: one of ``HARNESS_FLAGS`` or of ``also``."""
    if taken := next((name for name in (*HARNESS_FLAGS, *also) for word in flags if word.partition("=")[0] == name), None):
        raise UsageError(f"{taken}: {script} sets it itself; leave it out")


def output_folder(text: str) -> Path:
    """The folder of ``--output``, made.

    Raises:
        UsageError: it cannot be made.
    """
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be made ({error.strerror}); name another folder") from None
    return folder


def without(flags: Sequence[str], name: str) -> list[str]:
    """``flags`` less ``name`` and its value."""
    out, skip = [], False
    for word in flags:
        if skip:
            skip = False
        elif word == name:
            skip = True
        elif not word.startswith(f"{name}="):
            out.append(word)
    return out
