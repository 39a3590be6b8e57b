"""Several commands side by side, one a host: their output line by line behind the host's name, their ends gathered.

Standard library only. Used by what runs one command per host: ``launchers/ssh.py`` and the virtual cluster.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

COLOURS = (36, 33, 35, 32, 34, 31)  # of ECMA-48 (SGR), a host each, then again
LONGEST_LINE = 1 << 20  # bytes; a longer one is cut, so that a command which never ends its line cannot fill the memory
DRAIN_S = 0.5  # what a command leaves running may hold its output open; that long is waited for a rest
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
BEAT_S = 1.0  # between two words down a lifeline


class _Lines:
    """One output stream of one command, cut into lines."""

    def __init__(self, source: IO[bytes], number: int, prefix: bytes) -> None:
        self.source, self.number, self.prefix, self.rest = source, number, prefix, b""
        self.muted = False
        os.set_blocking(source.fileno(), False)

    def read(self) -> bool:
        """Passes on the whole lines that have come; False at the end of the stream, BlockingIOError where nothing has come."""
        data = os.read(self.source.fileno(), 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) > LONGEST_LINE):
            lines, self.rest = [*lines, self.rest], b""
        self._show(lines)
        return bool(data)

    def _show(self, lines: list[bytes]) -> None:
        # A progress bar redraws its line after a \r: its last state is what a terminal would show.
        shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
        if not self.muted:
            _write(self.number, b"".join(self.prefix + line + b"\n" for line in shown))

    def close(self) -> None:
        """Passes on what is there without waiting for more."""
        with contextlib.suppress(BlockingIOError, ValueError):
            while self.read():
                pass
        if self.rest:
            self._show([self.rest])
        self.source.close()


def _write(number: int, data: bytes) -> None:
    """All of ``data`` to a file descriptor: whole lines, so that the lines of two hosts never run into each other.

    Raises:
        BrokenPipeError: nobody reads it any more; what comes later goes nowhere.
    """
    try:
        while data:
            data = data[os.write(number, data) :]
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        raise


class _Commands:
    """The running commands."""

    def __init__(self, commands: Mapping[str, Sequence[str]], lifeline: bool, hush: bool, **options: Any) -> None:
        self.lifeline, self.hush = lifeline, hush
        self.statuses: dict[str, int] = {}
        self.selector = selectors.DefaultSelector()
        self.lines: dict[str, list[_Lines]] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.ended_at: dict[str, float] = {}
        self.beaten_at = 0.0
        width = max((len(name) for name in commands), default=0)
        prefixes = [_prefixes(name, width, position) for position, name in enumerate(commands)]
        for (name, words), (for_out, for_err) in zip(commands.items(), prefixes, strict=True):
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE if lifeline else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which passes it on in its way
                    **options,
                )
            except OSError as error:
                _write(2, for_err + f"{words[0]}: {error.strerror}\n".encode(errors="replace"))
                self.statuses[name] = 127 if isinstance(error, FileNotFoundError) else 126  # as a shell says it
                continue
            assert process.stdout and process.stderr
            if process.stdin:
                os.set_blocking(process.stdin.fileno(), False)
            self.running[name] = process
            self.lines[name] = [_Lines(process.stdout, 1, for_out), _Lines(process.stderr, 2, for_err)]
            for stream in self.lines[name]:
                self.selector.register(stream.source, selectors.EVENT_READ, (name, stream))

    def pass_on(self, seconds: float) -> None:
        """Passes on output as it comes, for at most ``seconds``, and notes who has ended."""
        if self.lifeline and time.monotonic() > self.beaten_at + BEAT_S:
            self._beat()
        if self.selector.get_map():
            for key, _ in self.selector.select(seconds):
                name, stream = key.data
                if not stream.read():
                    self._forget(name, stream)
        else:
            time.sleep(seconds)
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            since = time.monotonic() - self.ended_at.setdefault(name, time.monotonic())
            if not self.lines[name] or since > DRAIN_S:
                for stream in list(self.lines[name]):
                    self._forget(name, stream)
                if process.stdin:
                    with contextlib.suppress(OSError):
                        process.stdin.close()
                del self.running[name]
                self.statuses[name] = process.returncode

    def _beat(self) -> None:
        """A word down each lifeline: whoever hears none knows that the connection is dead, which TCP alone tells after minutes."""
        self.beaten_at = time.monotonic()
        for process in self.running.values():
            if process.stdin and not process.stdin.closed:
                with contextlib.suppress(OSError):
                    os.write(process.stdin.fileno(), b"\n")

    def _forget(self, name: str, stream: _Lines) -> None:
        self.selector.unregister(stream.source)
        self.lines[name].remove(stream)
        stream.close()

    def ask(self, number: int) -> None:
        """Asks all to end: through the end of their standard input, or with a signal to their process groups."""
        for streams in self.lines.values() if self.hush else ():
            for stream in streams:
                stream.muted |= stream.number == 2
        for process in self.running.values():
            if process.stdin and number != signal.SIGKILL:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            elif process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def close(self) -> None:
        """Leaves nothing running and nothing open, whatever happened."""
        self.ask(signal.SIGKILL)
        for process in self.running.values():
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with contextlib.suppress(OSError):
                        stream.close()
        self.selector.close()


def _prefixes(name: str, width: int, position: int) -> tuple[bytes, bytes]:
    """What stands before a line on stdout and on stderr: the name, in a colour of its own where that is a terminal."""
    found = []
    for number in (1, 2):
        text = f"[{name}]" + " " * (width - len(name) + 1) if name else ""
        if name and os.isatty(number) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            text = f"\033[{COLOURS[position % len(COLOURS)]}m{text}\033[0m"
        found.append(text.encode(errors="replace"))
    return found[0], found[1]


def run_prefixed(
    commands: Mapping[str, Sequence[str]],
    *,
    lifeline: bool = False,
    hush: bool = False,
    patience: float | None = 5.0,
    leave: float = 10.0,
    ended: Callable[[str, int], None] = lambda name, status: None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> dict[str, int]:
    """Runs all commands at once, shows their output, and waits until every one has ended.

    Each line of a command goes to this process's stdout or stderr, whole, behind ``[name]``. The commands are in sessions of their
    own; Ctrl-C, SIGTERM and SIGHUP are passed on to them (by the main thread, which alone hears them), a second one ends them with
    SIGKILL.

    Args:
        commands: name (of the host; "" where there is nothing to tell apart) → the words of its command.
        lifeline: their standard input stays open as long as they are to run, and its end is the request to leave, which also comes
            when this process is killed (``common/remote_guard.py`` heeds it, through ssh too). Otherwise it is empty, and they are
            asked with signals.
        hush: once they have been asked to leave, what they write to stderr is not shown: it is how they take it.
        patience: seconds that the others get to end by themselves after one has failed, before they are asked to; None: for ever.
        leave: seconds from being asked to leave until SIGKILL.
        ended: called with (name, status) when a command has ended that had not been asked to.
        env: their environment; by default this process's.
        cwd: their folder; by default this process's.

    Returns:
        The exit status of each command, negative for a signal, in the order in which they ended; 127 and 126 for one that could
        not be started.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once all have ended.
        SystemExit: 128 + N after signal N, likewise; 141 if nobody reads this process's output any more.
    """
    got: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        got.append(number)

    heard = STOPS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for name in heard if (number := getattr(signal, name, None)) is not None}
    if heard and lifeline and hasattr(signal, "SIGTSTP"):  # Ctrl-Z would stop the words down the lifelines
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    group, unread = None, False
    try:
        group = _Commands(commands, lifeline, hush, env=env, cwd=cwd)
        told = reported = 0
        asked_at = failed_at = float("inf")
        while True:
            for name in list(group.statuses)[reported:]:
                reported += 1
                if asked_at == float("inf"):
                    ended(name, group.statuses[name])
                if group.statuses[name]:
                    failed_at = min(failed_at, time.monotonic())
            if not group.running:
                break
            now = time.monotonic()
            if len(got) > told:  # a second request means at once
                group.ask(signal.SIGKILL if told else got[0])
                asked_at = min(asked_at, now)
                told = len(got)
            elif patience is not None and asked_at == float("inf") and now > failed_at + patience:
                group.ask(signal.SIGTERM)
                asked_at = now
            if now > asked_at + leave:
                group.ask(signal.SIGKILL)
            try:
                group.pass_on(0.05)
            except BrokenPipeError:
                unread = True
                group.ask(signal.SIGTERM)
                asked_at = min(asked_at, now)
    finally:
        try:
            if group:
                group.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if got:
        if got[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + got[0])
    if unread:
        raise SystemExit(128 + signal.SIGPIPE)
    return group.statuses
