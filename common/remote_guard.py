"""Runs a command on a host and leaves nothing of it behind, however its caller goes: ``python -I -S remote_guard.py COMMAND …``.

ssh ends a remote command only by taking its pipes away, and torchrun's workers, each in a session of its own, notice that late or
never. This program stands between: sshd's end of the connection is its standard input. When that ends (or has been silent for
``--silence`` seconds, where the caller promises a word each second), or a signal comes, or the command ends, it sees to it that
every descendant ends: the command is asked first, all are after 3 s, and get SIGKILL after 8 s. Then it returns the command's
status.

On Linux it is a "child subreaper" (prctl(2)): a descendant whose parent dies becomes its child, whatever session that is in, so
that none is lost. Elsewhere it looks at the process table each second and remembers its family. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

ALL_S = 3.0  # from the first request: the command and its own watchers have had their time, now everyone is asked
KILL_S = 8.0  # then SIGKILL
GIVE_UP_S = 20.0  # the kernel itself holds what is left (state D)
LOOK_S = 1.0  # between two looks where orphans do not come to us
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _prctl(option: int, value: int) -> bool:
    try:
        return sys.platform == "linux" and bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def adopt_orphans() -> bool:
    """Makes this process the parent of every descendant whose own has died; False where the system cannot."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


class _Process(NamedTuple):
    parent: int
    started: str
    zombie: bool


def _from_proc() -> dict[int, _Process]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):  # it may end while we read
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
                found[int(name)] = _Process(int(fields[1]), fields[19], fields[0] in "ZX")
    return found


def _from_ps() -> dict[int, _Process]:
    ps = subprocess.Popen(["ps", "-axo", "pid=,ppid=,state=,lstart="], stdout=subprocess.PIPE, text=True)
    rows = [row.split(None, 3) for row in ps.communicate()[0].splitlines()]
    return {int(r[0]): _Process(int(r[1]), r[3], r[2].startswith("Z")) for r in rows if len(r) == 4 and int(r[0]) != ps.pid}


class _Family:
    """This process's descendants: those that the process table shows, and those that it once showed."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}  # pid → when it started: a pid is used again

    def living(self) -> list[int]:
        """The pids of all that run."""
        table = _from_proc() if sys.platform == "linux" else _from_ps()
        me = os.getpid()
        family = {me, *(pid for pid, started in self.known.items() if pid in table and table[pid].started == started)}
        while more := {pid for pid, process in table.items() if process.parent in family} - family:
            family |= more
        family.discard(me)
        self.known = {pid: table[pid].started for pid in family}
        return [pid for pid in family if not table[pid].zombie]

    def signal(self, number: int) -> None:
        """Sends a signal to all that run."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"remote_guard.py: {text}.\n".encode(errors="replace"))


def _start(command: Sequence[str]) -> int:
    """Forks and executes ``command`` in a session of its own with an empty standard input; returns its pid."""
    pid = os.fork()
    return pid or _become(command)


def _become(command: Sequence[str]) -> NoReturn:
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # should somebody kill the guard
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.execvp(command[0], list(command))
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode(errors="replace"))
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)  # as a shell says it


class _Guard:
    def __init__(self, command: Sequence[str], silence: float) -> None:
        self.silence, self.heard_at = silence, time.monotonic()
        self.adopts = adopt_orphans()
        self.family = _Family()
        self.status: int | None = None
        self.asked_at = float("inf")
        self.all_asked = False
        kind = os.fstat(0).st_mode
        self.lifeline = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)  # a terminal sends signals, /dev/null has always ended
        self.bell, ring = os.pipe()
        for end in (self.bell, ring):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to pass them on to
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self._ask(number))
        self.pid = _start(command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def run(self) -> int:
        """Until nothing is left; the command's status as a shell has it."""
        while True:
            self._reap()
            now = time.monotonic()
            ending = self.asked_at < float("inf")
            if self.status is not None and not self.family.living():
                return self.status
            if self.status is not None and not ending:
                self.asked_at = now  # who outlives the command has this long
            elif not self.adopts:
                self.family.living()
            if ending and now > self.asked_at + ALL_S and not self.all_asked:
                self.all_asked = True
                self.family.signal(signal.SIGTERM)
            if ending and now > self.asked_at + KILL_S:
                self.family.signal(signal.SIGKILL)
            if ending and now > self.asked_at + GIVE_UP_S:
                return 1 if self.status is None else self.status
            self._wait(0.05 if self.asked_at < float("inf") else LOOK_S if self.silence or not self.adopts else None)

    def _wait(self, seconds: float | None) -> None:
        ready = select.select([self.bell, *([0] if self.lifeline else [])], [], [], seconds)[0]
        if self.bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self.bell, 4096)
        if 0 in ready:
            self.heard_at = time.monotonic()
            try:
                self.lifeline = bool(os.read(0, 4096))
            except OSError:
                self.lifeline = False
            if not self.lifeline:
                self._ask(signal.SIGTERM)
        elif self.lifeline and self.silence and time.monotonic() > self.heard_at + self.silence:
            self._ask(signal.SIGTERM)

    def _ask(self, number: int) -> None:
        """The command is to end; a second request changes nothing."""
        if self.asked_at == float("inf"):
            self.asked_at = time.monotonic()
            if self.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, number)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.pid:
                    code = os.waitstatus_to_exitcode(ended[1])
                    self.status = code if code >= 0 else 128 - code
                    if code < 0 and self.asked_at == float("inf"):
                        _say(f"the command was killed by {signal.Signals(-code).name}; ending what it has left")


def main(words: Sequence[str]) -> int:
    """Runs ``[--silence SECONDS] COMMAND …`` and returns its exit status, 128 + N after signal N."""
    silence = 0.0
    if words[:1] == ["--silence"]:
        silence, words = float(words[1]), words[2:]
    if not words:
        os.write(2, b"error: remote_guard.py needs a command to run: remote_guard.py [--silence SECONDS] COMMAND ...\n")
        return 2
    return _Guard(words, silence).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
