"""What the doctor's checks give back, and what they share: rows, commands with a time limit. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, FINDING, UNCHECKED = "ok", "finding", "not checked"
PURPOSES = ("torchrun", "mpi", "slurm", "ssh", "docker")
LIMIT_S = 20.0  # of a command


@dataclass(frozen=True)
class Row:
    """What one check came to."""

    check: str
    """Its name: ``port``."""
    state: str
    """``OK``, ``FINDING`` or ``UNCHECKED``."""
    found: str
    """One line; of what was not checked the reason."""
    mend: str = ""
    """The line to type that mends a finding."""
    host: str = ""
    """The host that it is about; empty: this machine."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers and names behind ``found``, fit for JSON."""

    def as_json(self) -> dict[str, Any]:
        """All of it, by field."""
        return dict(vars(self))


def ok(check: str, found: str, **facts: Any) -> Row:
    """Nothing to mend."""
    return Row(check, OK, found, facts=facts)


def finding(check: str, found: str, mend: str, **facts: Any) -> Row:
    """Something to mend, and the line that does it."""
    return Row(check, FINDING, found, mend, facts=facts)


def unchecked(check: str, why: str, **facts: Any) -> Row:
    """Not checked, and why."""
    return Row(check, UNCHECKED, why, facts=facts)


@dataclass(frozen=True)
class Subject:
    """What the doctor was asked about."""

    environment: Mapping[str, str]
    """The user's, over ``.env``."""
    purpose: str | None = None
    """``--for``: one of ``PURPOSES``; None: anything."""
    ranks: int = 2
    """Ranks on this machine."""
    several: bool = False
    """Whether ranks on other machines are meant too."""
    torch: Mapping[str, Any] = field(default_factory=dict)
    """What ``torch_facts`` found."""

    @property
    def port(self) -> int:
        """MASTER_PORT, else what launchers take on several hosts; 0 where MASTER_PORT is no port."""
        text = self.environment.get("MASTER_PORT") or "29500"
        return int(text) if text.isascii() and text.isdigit() and int(text) < 65536 else 0


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    status: int | None
    """Its exit status; None: it could not be started or was ended at its time limit."""
    out: str = ""
    err: str = ""
    why: str = ""
    """Why there is no status."""

    @property
    def last_line(self) -> str:
        """The last line that it said, for people; why it said nothing, if it did not."""
        lines = [line.strip() for text in (self.out, self.err) for line in text.splitlines() if line.strip()]
        return lines[-1][:200] if lines else self.why or f"exit status {self.status}"


def ask(words: Sequence[str], limit: float = LIMIT_S, env: Mapping[str, str] | None = None, text: str = "") -> Answer:
    """Runs a command to its end, or to its time limit: then it is killed with all of its process group. Raises nothing."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except (OSError, ValueError) as error:
        return Answer(None, why=getattr(error, "strerror", None) or str(error))
    try:
        out, err = process.communicate(text, timeout=limit)
        return Answer(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        _end(process)
        out, err = "", ""
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            out, err = process.communicate(timeout=1)
        return Answer(None, out, err, f"did not end within {limit:g} s")
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
