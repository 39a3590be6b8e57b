"""Running one command as a user would: with a time limit, and with every process of it gone afterwards."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from common import events, now

MARKER = "LAUNCHLAB_RUN"  # in the environment of every process of a run, however far it has moved from its parent
LINGER_S = 5.0  # after the command's end; on a busy machine a forkserver that holds torch takes more than a second
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    command: list[str]
    status: int
    """As a shell has it: 128 + signal for a signal."""
    seconds: float
    stdout: str
    stderr: str
    timed_out: bool
    left_behind: list[str]
    """Command lines of processes that outlived the command and had to be killed."""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with status 0, and left nothing behind."""
        return self.status == 0 and not self.timed_out and not self.left_behind

    def tail(self, lines: int = 15) -> str:
        """The last lines that it printed, stderr last."""
        return "\n".join((self.stdout + self.stderr).rstrip().splitlines()[-lines:])


class Running:
    """A command that has been started."""

    def __init__(
        self,
        command: Sequence[str | Path],
        limit_s: float,
        variables: Mapping[str, str | None] | None = None,
        folder: Path = REPOSITORY,
    ) -> None:
        """Starts ``command`` in ``folder``, in a session of its own, and tells it when that was.

        Args:
            command: the command line.
            limit_s: seconds that it may take.
            variables: set in its environment, or taken away where None.
            folder: where it runs.
        """
        self.command = [str(word) for word in command]
        self.limit_s = limit_s
        self._marker = uuid.uuid4().hex
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # not pipes: whoever outlives the command cannot block it
        # SAVE: a job that saves its model by itself does not when it is measured.
        given = os.environ | {"PYTHONUNBUFFERED": "1", "SAVE": "none"} | dict(variables or {}) | {MARKER: self._marker}
        environment = {name: value for name, value in given.items() if value is not None}
        environment[events.STARTED] = f"{events.clock_id()}:{now()}"
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            self.command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether the command is over, or its time is up."""
        return self._process.poll() is not None or time.perf_counter() > self._began + self.limit_s

    def wait(self) -> Outcome:
        """Until it ends or its time is up. However this is left, no process of it stays."""
        timed_out = False
        try:
            if not self._ended_within(self._began + self.limit_s - time.perf_counter()):
                timed_out = True
            seconds = time.perf_counter() - self._began
            # What a clean end leaves for a moment (the watcher, an MPI helper, a forkserver) may go by itself.
            left = [] if timed_out else self._linger(LINGER_S)
        finally:
            self.kill()
        output = []
        for file in self._files:
            file.seek(0)
            output.append(file.read().decode(errors="replace"))
            file.close()
        status = self._process.returncode
        return Outcome(self.command, 128 - status if status < 0 else status, seconds, output[0], output[1], timed_out, left)

    def _ended_within(self, seconds: float) -> bool:
        """Wakes at the end itself: Popen.wait with a time limit polls, up to 50 ms late."""
        if self._process.poll() is not None:
            return True
        seconds = max(0.0, seconds)
        if hasattr(os, "pidfd_open"):
            descriptor = os.pidfd_open(self._process.pid)
            try:
                if not select.select([descriptor], [], [], seconds)[0]:
                    return False
            finally:
                os.close(descriptor)
            self._process.wait()
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _linger(self, seconds: float) -> list[str]:
        """Command lines of the run's processes that are still there after ``seconds``; [] as soon as there are none."""
        until = time.monotonic() + seconds
        while members := self.members():
            if time.monotonic() > until:
                return [line for p in members if (line := _command_line(p))]
            time.sleep(0.02)
        return []

    def members(self) -> list[psutil.Process]:
        """The run's processes that are there now, wherever they have got to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == self._marker:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Ends every process of the run, wherever it has got to, and does not return before."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if self._process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            members = self.members()
            for member in members:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            if not members and self._process.poll() is not None:
                return
            time.sleep(0.02)


def _command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    return ""


def run(
    command: Sequence[str | Path],
    limit_s: float = 120.0,
    variables: Mapping[str, str | None] | None = None,
    folder: Path = REPOSITORY,
) -> Outcome:
    """Runs ``command`` to its end or for ``limit_s`` seconds, whichever comes first."""
    return Running(command, limit_s, variables, folder).wait()
