"""A port for rank 0 that nobody else takes first. Standard library only: a parent that imports no torch needs it too."""

from __future__ import annotations

import socket
import sys

from common.errors import UsageError


class PortReservation:
    """A free port that nobody else is given until rank 0 listens on it.

    On Linux the port stays bound, but does not listen: the kernel hands it to no one, yet lets rank 0 bind it too (both sides set
    SO_REUSEADDR, socket(7); PyTorch's store does). Elsewhere the port is only looked up.
    """

    def __init__(self, wanted: int | None) -> None:
        """Reserves ``wanted``, or any free port for 0 or None.

        Raises:
            UsageError: another program listens on ``wanted``.
        """
        self._socket = socket.socket()
        if sys.platform == "linux":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("", wanted or 0))
        except OSError as error:
            self._socket.close()
            raise port_taken(wanted or 0, error.strerror or str(error)) from None
        self.port: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            self._socket.close()

    def __enter__(self) -> int:
        """The port."""
        return self.port

    def __exit__(self, *_: object) -> None:
        """Lets it go."""
        self.release()

    def release(self) -> None:
        """Lets the port go."""
        self._socket.close()


def step_port(job: int, step: int) -> int:
    """A port that every rank of a SLURM job step can work out, 10000 to 30010: below those that the kernel hands out.

    Jobs whose numbers are near each other, as those of one node mostly are, never get the same one.
    """
    return 10000 + (101 * job + step) % 20011


def port_taken(port: int, reason: str, or_free: bool = True) -> UsageError:
    """The error for a port that cannot be listened on; ``or_free``: whether a free one can be asked for."""
    remedy = "give another, or 0 for a free one" if or_free else "give all ranks another"
    return UsageError(f"--master_port {port}: cannot be used here ({reason}); {remedy}")
