"""A virtual cluster for a session of runs: commands on its first hosts, its links' rate, and whether the links really have it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from benchmarks.harness.cases import shown
from benchmarks.harness.runner import REPOSITORY
from common.errors import RunError, UsageError
from common.virtual_cluster import VirtualCluster, missing
from common.virtual_network import bits_per_second

UNLIMITED = "unlimited"
MASTER_PORT = 29500  # each host has ports of its own
# Of the asked rate, what a TCP payload may get: headers take 4.4 % of a full frame, an empty start of the token bucket some more.
LEAST, MOST = 0.85, 1.03
DELAY_SLACK = 0.25  # of a round trip, and
DELAY_SLACK_S = 0.001
PROBE_S = 60.0
_PROGRAMS = REPOSITORY / "benchmarks"


def parse_rate(text: str) -> str:
    """A link's rate: ``unlimited``, or as tc writes it.

    Raises:
        ValueError: its text says what is allowed.
    """
    rate = text.lower()
    if rate != UNLIMITED:
        try:
            bits_per_second(rate)
        except UsageError:
            raise ValueError("unlimited, or a number with kbit, mbit or gbit, such as 100mbit") from None
    return rate


def bits(rate: str) -> float | None:
    """Bits per second; None for an unlimited link."""
    return None if rate == UNLIMITED else bits_per_second(rate)


def bytes_per_s(rate: str) -> float | None:
    """Bytes per second; None for an unlimited link."""
    found = bits(rate)
    return found and found / 8


def rate_text(rate: str) -> str:
    """``100 Mbit/s``, ``unlimited``."""
    found = bits(rate)
    return bits_text(found) if found else UNLIMITED


def bits_text(value: float) -> str:
    """``95.6 Mbit/s``."""
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} bit/s"


@dataclass(frozen=True)
class Probe:
    """What a link gave a plain socket."""

    rate: str
    """That was asked for."""
    bits_per_s: float
    round_trip_s: float
    delay_s: float = 0.0
    """That was asked for, one way."""

    @property
    def measured_text(self) -> str:
        """``95.6 Mbit/s``."""
        return bits_text(self.bits_per_s)

    @property
    def complaint(self) -> str:
        """In words, where it is not what was asked for; "" where it is."""
        wrong, asked = [], bits(self.rate)
        if asked and not LEAST <= self.bits_per_s / asked <= MOST:
            wrong.append(f"carries {bits_text(self.bits_per_s)}")
        if self.delay_s and abs(self.round_trip_s - 2 * self.delay_s) > DELAY_SLACK * 2 * self.delay_s + DELAY_SLACK_S:
            wrong.append(f"has a round trip of {1e3 * self.round_trip_s:.2f} ms, not {2e3 * self.delay_s:g}")
        return f"The {rate_text(self.rate)} link {' and '.join(wrong)}: read its figures as those of such a link." if wrong else ""

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "rate": self.rate,
            "asked_bits_per_s": bits(self.rate),
            "measured_bits_per_s": self.bits_per_s,
            "asked_delay_seconds": self.delay_s,
            "round_trip_seconds": self.round_trip_s,
            "complaint": self.complaint,
        }


class Hosts:
    """A virtual cluster whose first hosts carry out commands, at a rate that may change from run to run."""

    def __init__(self, nodes: int, delay: str | None = None) -> None:
        """Describes the cluster; ``__enter__`` makes it.

        Raises:
            UsageError: a value that is not allowed, or this machine cannot make one.
        """
        self.delay = delay
        self.cluster = VirtualCluster(nodes, delay=delay)
        if lack := missing():
            raise UsageError(lack)
        self._rate = UNLIMITED

    def __enter__(self) -> Hosts:
        """Makes the hosts."""
        self.cluster.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Takes all of it down."""
        self.cluster.__exit__(kind, error, trace)

    def set_rate(self, rate: str) -> None:
        """Gives every link ``rate``, if it has another."""
        if rate != self._rate:
            self.cluster.set_rate(None if rate == UNLIMITED else rate)
            self._rate = rate

    def words(self, nodes: int, words: Sequence[str]) -> list[str]:
        """The command that runs ``words`` ({rank}, {master} filled in) in this folder on the first so many hosts at once."""
        names = self.cluster.names[:nodes]
        commands = [self.cluster.command(name, self.cluster.filled_in(name, words), cwd=Path.cwd()) for name in names]
        return [sys.executable, str(_PROGRAMS / "on_hosts.py"), json.dumps(commands)]

    def typed(self, nodes: int, words: Sequence[str]) -> str:
        """The same as a person would type it."""
        rate = [] if self._rate == UNLIMITED else ["--rate", self._rate]
        delay = ["--delay", self.delay] if self.delay else []
        head = ["python", "-m", "common.virtual_cluster", "--nodes", str(nodes), *rate, *delay, "--"]
        return shown([*head, *words])

    def probe_all(self, rates: Sequence[str], console: Console) -> list[Probe]:
        """Measures the link at each of ``rates``, and tells."""
        found = []
        for rate in rates:
            found.append(probe := self.probe(rate))
            trip = f"round trip {1e3 * probe.round_trip_s:.2f} ms"
            console.print(f"Link {rate_text(rate)}: a plain socket gets {probe.measured_text}, {trip}", highlight=False)
            if probe.complaint:
                console.print(probe.complaint, style="yellow", highlight=False)
        return found

    def probe(self, rate: str) -> Probe:
        """Measures the link between the first two hosts with plain sockets.

        Raises:
            RunError: it could not.
        """
        self.set_rate(rate)
        words = [sys.executable, str(_PROGRAMS / "link_probe.py"), "{rank}", "{master}"]
        first, second = self.cluster.names[:2]
        try:
            ended = self.cluster.run(words, on=[first, second], timeout=PROBE_S, cwd=REPOSITORY)
            told = json.loads(ended[second].stdout)
        except (subprocess.TimeoutExpired, ValueError):
            raise RunError(f"the {rate_text(rate)} link could not be probed; is this machine very busy?") from None
        return Probe(rate, 8 * told["bytes_per_second"], told["round_trip_seconds"], self.cluster.delay_s)
