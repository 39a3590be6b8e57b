"""One small process per node that sees to it that a run ends: who failed first and how, end the rest, leave.

Launchers differ in what they do when a rank dies: MPICH prints a process id, a Python exception under mpi4py waits in
MPI_Finalize, a shell waits for all. So each rank of a node reports to a watcher that stands apart from the launcher (in a session
of its own) and holds a pidfd (pidfd_open(2)) of each rank. The first rank to arrive binds the node's abstract Unix socket
(unix(7)) and starts the watcher on it; the others find the name taken and connect.

Linux only. Elsewhere each rank prints its own failure, and ending the others is left to the launcher.

This file is also the watcher's program (``python -I -S watch.py FD``) and imports the standard library only: it is up in
about 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

SETTLE_S = 0.3  # a dead rank's peers often report a broken connection before the kernel reports the death
TERM_S = 0.5  # then SIGTERM to whoever has not left
KILL_S = 2.5  # then SIGKILL
LEAVE_S = 4.5  # and to those that told of their own end, and are leaving or wait in MPI_Finalize: below the promised 5
REPLY_S = 2.0  # how long a failed rank waits to be heard
supported = hasattr(os, "pidfd_open") and hasattr(socket, "AF_UNIX") and sys.platform == "linux"

WITHOUT_A_WORD = "ended without a word (killed, or left by os._exit)"
_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info), linux/pidfd.h; exit codes since Linux 6.15
_PIDFD_INFO_EXIT = 1 << 3
_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5


# ---------------------------------------------------------------------------------------------------- in a rank


class Reporter:
    """A rank's line to its node's watcher."""

    def __init__(self, key: str, about: dict[str, Any]) -> None:
        """Connects, starting the watcher if this is the node's first rank.

        Args:
            key: names the run on this node; the same in all its ranks, and in no other run at the time.
            about: rank, host, and optionally parents (launchers' pids whose end ends the ranks), events (the rank's file) and
                launcher_kills (whether a launcher answers one rank's death by SIGKILL to the others).
        """
        import hashlib  # here only: the watcher itself is to be up quickly

        # A name may have 107 bytes (unix(7)), a host's name alone 253. Containers with one network share these names, but not
        # their processes: a watcher cannot end those of another PID namespace.
        with contextlib.suppress(OSError):
            key += os.readlink("/proc/self/ns/pid")
        address = f"\0launchlab-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(address)
            except OSError:
                pass  # another rank of this node was first
            else:
                listener.listen(1024)
                subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, str(listener.fileno())],
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                ).returncode = 0  # ours to start, not to wait for: it outlives us, and Popen need not warn of that
        self._socket = socket.socket(socket.AF_UNIX)
        for _ in range(200):  # bound by the other rank, not yet listening: microseconds
            try:
                self._socket.connect(address)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        self.tell(event="here", **about)

    def tell(self, **message: Any) -> None:
        """Sends one event; a watcher that is gone is no reason to fail."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def tell_and_wait(self, **message: Any) -> bool:
        """Sends one event and waits until the watcher has dealt with it; False if nobody did."""
        try:
            self.tell(**message)
            self._socket.settimeout(REPLY_S)
            return bool(self._socket.recv(16))
        except OSError:
            return False

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()


# ------------------------------------------------------------------------------------------------- in the watcher


class _Member:
    """A rank of this node, as the watcher sees it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)  # a forked child of the rank may hold the other end open after its death
        self.buffer = b""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid: int = struct.unpack("3i", credentials)[0]
        self.connected = self.alive = True
        try:
            self.pidfd = _peer_pidfd(connection, self.pid)
        except OSError:  # gone before we were up, and reaped by its parent
            self.alive = False
        self.finished = False
        self.about: dict[str, Any] = {}

    def kill(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, number)


def _peer_pidfd(connection: socket.socket, pid: int) -> int:
    """A pidfd of who connected; since Linux 6.16 also of one that died before we were up, and was reaped."""
    with contextlib.suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    return os.pidfd_open(pid)


def _exit_code_of(pidfd: int) -> int | None:
    try:
        import fcntl

        info = bytearray(struct.pack("Q", _PIDFD_INFO_EXIT) + bytes(56))
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except (OSError, ImportError):
        return None
    code: int = struct.unpack_from("i", info, 60)[0]
    return code if struct.unpack_from("Q", info)[0] & _PIDFD_INFO_EXIT else None


def _exit_code_of_zombie(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return int(fields[49]) if fields[0] == "Z" else None
    except (OSError, IndexError, ValueError):
        return None


def how_it_ended(pidfd: int, pid: int) -> str:
    """In words, how a process that is not our child ended.

    Asks the kernel, which knows once the parent has reaped it (PIDFD_INFO_EXIT, Linux 6.15 and later), and looks at the zombie
    until then (proc(5), field 52).
    """
    status = None
    for _ in range(10):  # its parent may reap it between the two questions
        status = _exit_code_of(pidfd)
        status = _exit_code_of_zombie(pid) if status is None else status
        if status is not None:
            break
        time.sleep(0.002)
    if status is None:
        return WITHOUT_A_WORD
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(number).name}"
        return f"was killed by signal {number}"
    return f"ended with exit status {os.WEXITSTATUS(status)} before its work was done"


class _Watcher:
    """Waits for the first failure among the ranks that connect, tells of it, and ends the others."""

    def __init__(self, listener: socket.socket) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, ("knock", None))
        self.members: list[_Member] = []
        self.failures: list[tuple[int, _Member | None, dict[str, Any]]] = []  # (distance from the cause, who, what)
        self.failed_at: float | None = None
        self.told = False
        self.steps = [(SETTLE_S + TERM_S, signal.SIGTERM, False), (KILL_S, signal.SIGKILL, False), (LEAVE_S, signal.SIGKILL, True)]
        self.waiting: list[_Member] = []
        self.parents: set[int] = set()
        self.orphaned = False

    def run(self) -> None:
        """Until every rank that came has left."""
        patience = time.monotonic() + 30  # in case whoever started us died before it connected
        while any(m.alive for m in self.members) or (not self.members and time.monotonic() < patience):
            for key, _ in self.selector.select(0.05 if self.failed_at else 1.0):
                what, member = key.data
                if what == "knock":
                    self._welcome()
                elif what == "word":
                    self._read(member)
                elif what == "end":
                    self._ended(member)
                elif what == "parent":
                    self.selector.unregister(key.fileobj)
                    self.orphaned = True
            if self.orphaned:
                self._launcher_is_gone()
            self._act()
        if self.failures:
            self._tell()

    def _launcher_is_gone(self) -> None:
        self.orphaned = False
        for member in self.members:
            if member.connected:
                self._read(member)  # a rank that said that it is done before that needs no launcher
        if any(m.alive and not m.finished for m in self.members):
            self._fail(0, None, {"cause": "the launcher that started this node's ranks is gone"})

    def _welcome(self) -> None:
        """Lets in all who wait: with the first of them gone already, nobody may stay outside."""
        with contextlib.suppress(BlockingIOError):
            while True:
                member = _Member(self.listener.accept()[0])
                self.members.append(member)
                self.selector.register(member.connection, selectors.EVENT_READ, ("word", member))
                if member.alive:
                    self.selector.register(member.pidfd, selectors.EVENT_READ, ("end", member))
                else:
                    self._read(member)
                    if not member.finished:
                        self._fail(0, member, {"event": "died", "cause": WITHOUT_A_WORD})

    def _read(self, member: _Member) -> None:
        try:
            data = member.connection.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(member.connection)
            member.connected = False
            return
        *lines, member.buffer = (member.buffer + data).split(b"\n")
        for line in lines:
            self._heard(member, json.loads(line))

    def _heard(self, member: _Member, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "here":
            member.about = message
            for parent in set(message.get("parents", [])) - self.parents:
                self.parents.add(parent)
                try:
                    self.selector.register(os.pidfd_open(parent), selectors.EVENT_READ, ("parent", None))
                except ProcessLookupError:
                    self.orphaned = True
        elif event == "done":
            member.finished = True
        else:
            member.finished = True
            self.waiting.append(member)
            self._fail({"failed": 0, "refused": 0, "interrupted": 1, "lost a peer": 2}[event], member, message)

    def _ended(self, member: _Member) -> None:
        if member.connected:
            self._read(member)  # its last words may be waiting
        member.alive = False
        self.selector.unregister(member.pidfd)
        if path := member.about.get("events"):
            line = json.dumps({"phase": "process_ended", "time": time.clock_gettime(time.CLOCK_BOOTTIME)})
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_WRONLY | os.O_APPEND)
                os.write(file, line.encode() + b"\n")
                os.close(file)
        if not member.finished:
            cause = how_it_ended(member.pidfd, member.pid)
            # A launcher may have been quicker than we to ask the others to leave, and mpirun, to make them.
            perhaps_theirs = ("SIGTERM", "SIGKILL") if member.about.get("launcher_kills") else ("SIGTERM",)
            self._fail(int(cause.endswith(perhaps_theirs)), member, {"event": "died", "cause": cause})

    def _fail(self, distance: int, member: _Member | None, what: dict[str, Any]) -> None:
        if not self.told:  # afterwards it is our own doing
            self.failures.append((distance, member, what))
        elif member in self.waiting:
            self._release()
        self.failed_at = self.failed_at or time.monotonic()

    def _act(self) -> None:
        if self.failed_at is None:
            return
        elapsed = time.monotonic() - self.failed_at
        # Nothing can be nearer to the cause than a death or a failure of one's own, and a launcher may stop listening soon.
        certain = any(distance == 0 for distance, _, _ in self.failures)
        if not self.told and (certain or elapsed > SETTLE_S or not any(m.alive and not m.finished for m in self.members)):
            self._tell()
        while self.told and self.steps and elapsed > self.steps[0][0]:
            _, number, also_leaving = self.steps.pop(0)
            for member in self.members:
                if also_leaving or not member.finished:
                    member.kill(number)

    def _tell(self) -> None:
        """One sentence about the failure nearest to the cause, earliest first; then the failed ranks may go."""
        if self.told:
            return
        self.told = True
        _, member, what = min(self.failures, key=lambda failure: failure[0])
        text = what.get("traceback") or ""
        if what.get("event") == "refused":
            text += f"error: {what['cause']}\n"
        elif what.get("event") != "interrupted":
            about = member.about if member else {}
            who = f"Rank {about.get('rank')} on {about.get('host')} (pid {member.pid})" if member else "Watch:"
            others = sum(1 for m in self.members if m is not member and m.alive)
            text += f"{who} {what['cause']}" + (
                f"; ending the other {others} rank{'s' * (others != 1)} here.\n" if others else ".\n"
            )
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="replace"))
        for other in self.members:  # those that only wait for others have nothing to add
            if other is not member and not other.finished and what.get("event") != "refused":
                other.kill(signal.SIGTERM)
        self._release()

    def _release(self) -> None:
        for member in self.waiting:
            with contextlib.suppress(OSError):
                member.connection.sendall(b"heard\n")
        self.waiting.clear()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _Watcher(socket.socket(fileno=int(sys.argv[1]))).run()
