"""Looking up names of this machine without asking the network."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def _configured() -> str:
    """What /etc/nsswitch.conf says about hosts; glibc's own default where it says nothing (nsswitch.conf(5))."""
    try:
        lines = Path("/etc/nsswitch.conf").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].partition("#")[0].strip() for line in lines if line.startswith("hosts:")), "files dns")


def _look_up_hosts_in(sources: str) -> None:
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None) if sys.platform == "linux" else None  # glibc's
    if configure:
        configure(b"hosts", sources.encode())


def from_files_only() -> None:
    """From here on this process looks up host names and addresses in /etc/hosts only (glibc; elsewhere nothing changes).

    Both ends of a connection to PyTorch's store look up the name of the other's address, for their log. 127.0.0.1 is mapped to
    IPv6 by then, which /etc/hosts does not list, so a name server is asked: 5 to 10 s where none answers, and where one drops some
    of many questions at once, the store stands still for all (64 ranks: 10 to 17 s to join, 1 s without asking).
    """
    _look_up_hosts_in("files")


def as_configured() -> None:
    """From here on as /etc/nsswitch.conf says again."""
    _look_up_hosts_in(_configured())
