"""A process that is not our child, as the watcher (``common.watch``) sees it: whether it lives, how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import time
from typing import Any

WITHOUT_A_WORD = "ended without a word (killed, or left by os._exit)"
_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info), linux/pidfd.h; exit codes since Linux 6.15
_PIDFD_INFO_EXIT = 1 << 3
_SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5


class Member:
    """A rank of this node."""

    def __init__(self, connection: socket.socket) -> None:
        """``connection`` comes from the rank."""
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

    def read(self) -> list[dict[str, Any]]:
        """What it has said since; clears ``connected`` once it has hung up."""
        try:
            data = self.connection.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.connected = bool(data)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def answer(self, **message: Any) -> None:
        """Says that it was heard."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def kill(self, number: int) -> None:
        """Sends it a signal."""
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
