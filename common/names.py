"""Looking up names of this machine without asking the network."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _configured() -> str:
    """What /etc/nsswitch.conf says about hosts; glibc's own default where it says nothing (nsswitch.conf(5))."""
    try:
        lines = Path("/etc/nsswitch.conf").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].partition("#")[0].strip() for line in lines if line.startswith("hosts:")), "files dns")


@contextmanager
def names_from_files() -> Iterator[None]:
    """Within it, host names and addresses are looked up in /etc/hosts only (glibc; elsewhere nothing changes).

    A client of PyTorch's store looks up the name of the address it connects to, for its log. It has 127.0.0.1 mapped to IPv6 by
    then, which /etc/hosts does not list, so each rank asks a name server: without an answer 5 to 10 s, on a network that drops some
    of many questions at once too (64 ranks: 17 s to join, 1 s without asking).
    """
    configure = None
    if sys.platform == "linux":
        configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)
    if configure:
        configure(b"hosts", b"files")
    try:
        yield
    finally:
        if configure:
            configure(b"hosts", _configured().encode())
