"""Processes in Linux namespaces of their own, and commands in those: what a virtual cluster is made of.

Sources: namespaces(7), user_namespaces(7), unshare(1).
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common import virtual_host
from common.errors import RunError

START_S = 20.0
PROGRAM = [sys.executable, "-I", "-S", virtual_host.__file__]
_SO_PASSCRED = 16
_NEW = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
_HOST_KINDS = ("ipc", "uts", "net", "pid", "mnt")


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the system administration's programs on the path, where an ordinary user has none."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return os.environ | {"PATH": path} | dict(more or {})


def program(name: str) -> str | None:
    """Where the program ``name`` is."""
    return shutil.which(name, path=environment()["PATH"])


def last_line(text: str) -> str:
    """Where a program that failed says why."""
    return ([row for row in text.strip().splitlines() if row] or ["no reason given"])[-1]


def unshare() -> list[str]:
    """The start of a command that runs in new namespaces; as an ordinary user, as the root of a new user namespace."""
    return [*_NEW, *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


class Space:
    """A program of ``virtual_host``, in namespaces of its own."""

    def __init__(self, words: list[str]) -> None:
        """Starts it with ``words``, and learns its process id.

        Raises:
            RunError: it did not start.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, _SO_PASSCRED, 1)
            ours.settimeout(START_S)
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=environment({virtual_host.FD: str(theirs.fileno())}),
                start_new_session=True,
            )
            theirs.close()
            data, sender = b"", b""
            with suppress(TimeoutError):
                data, ancillary, *_ = ours.recvmsg(64, socket.CMSG_SPACE(12))
                sender = ancillary[0][2] if data else b""
        if not data:
            self.process.kill()
            why = self.process.communicate(timeout=START_S)[1].decode(errors="replace")
            raise RunError(f"a virtual cluster's host could not be made: {last_line(why)}")
        self.pid: int = struct.unpack("3i", sender)[0]
        """Of its first process, as this process's namespace numbers it."""

    def enter(self, kinds: Iterable[str], words: Sequence[str], cwd: str | Path = "/", as_oneself: bool = False) -> list[str]:
        """The command that runs ``words`` in here.

        Args:
            kinds: of namespaces to enter (``virtual_host.KINDS``); as an ordinary user the user namespace too.
            words: program and arguments.
            cwd: where it starts.
            as_oneself: as the user that one is outside, not as the user namespace's root.
        """
        rootless = os.geteuid() != 0
        wanted = [kind for kind in kinds if kind != "user"] + (["user"] if rootless else [])
        who = [f"{os.geteuid()}:{os.getegid()}"] if rootless and as_oneself else []
        return [*PROGRAM, "enter", str(self.pid), ",".join(wanted), str(cwd), *who, "--", *words]

    def command(self, words: Sequence[str], cwd: Path) -> list[str]:
        """The command that runs ``words`` in here as a user of this host would."""
        return self.enter(_HOST_KINDS, words, cwd, as_oneself=True)

    def inner(self, *words: str) -> Space:
        """A program of ``virtual_host`` in further namespaces within these, which ends with them."""
        return Space(self.enter(virtual_host.KINDS, [*_NEW, *PROGRAM, *words]))

    def configure(self, tool: str, rows: Iterable[str]) -> str:
        """Has ``ip`` or ``tc`` carry out ``rows`` in this network; returns what went wrong, or ""."""
        words = self.enter(("net",), [tool, "-batch", "-"])
        text = "\n".join(rows) + "\n"
        ended = subprocess.run(words, input=text, capture_output=True, text=True, timeout=START_S, env=environment())
        return "" if ended.returncode == 0 else (ended.stderr.strip().splitlines() or ["no reason given"])[0]

    def must(self, tool: str, rows: Iterable[str]) -> None:
        """``configure``; RunError if it went wrong."""
        if why := self.configure(tool, rows):
            raise RunError(f"a virtual cluster's network could not be made: {tool}: {why}")

    def close(self) -> None:
        """Waits for its end, for which others have seen."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(START_S)
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe:
                pipe.close()
