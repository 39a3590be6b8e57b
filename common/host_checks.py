"""Looks at all hosts of a run before anything is started on them: every problem of every host at once.

Each host gets one ssh connection, all at the same time, through which ``common/host_probe.py`` is sent and asked.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import host_probe
from common.hosts import Host
from common.probed_host import NO_ANSWER, ProbedHost, Silent

REACH_S = 4.0
CLOCKS_S = 2.0  # clocks that differ by more are told of
MANY = 128  # connections at the same time


@dataclass(frozen=True)
class Place:
    """Where the project is on the hosts, and how they are reached."""

    root: str
    """Folder of the project there."""
    folder: str
    """Folder to start in."""
    python: str
    ssh: Sequence[str] = ("ssh",)


@dataclass
class Findings:
    """What was found on all hosts."""

    problems: list[str] = field(default_factory=list)
    """A line each; nothing can be started while there are any."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing."""
    master_addr: str = ""
    """The first host's name or address, as all others reach it."""
    master_port: int = 0
    gpus: list[int] = field(default_factory=list)
    """Of each host."""


class _Checks:
    """The questions to all hosts, and what follows from the answers."""

    def __init__(self, hosts: Sequence[Host], place: Place, port: int | None, limit: float) -> None:
        self.hosts, self.place, self.port, self.limit = hosts, place, port, limit
        self.token = secrets.token_hex(8)
        self.until: dict[int, float] = {}
        self.master_port = 0
        self.asked: dict[int, ProbedHost] = {}
        self.facts: dict[int, dict[str, Any]] = {}
        self.trouble: dict[int, list[str]] = {number: [] for number in range(len(hosts))}
        self.notes: dict[int, list[str]] = {number: [] for number in range(len(hosts))}

    def _each(self, work: Callable[[int], None], numbers: Sequence[int]) -> None:
        def safely(number: int) -> None:
            try:
                work(number)
            except Silent as silent:
                self.trouble[number].append(self._why(self.hosts[number], silent))

        pool = ThreadPoolExecutor(MANY)
        try:
            for done in [pool.submit(safely, number) for number in numbers]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _why(self, host: Host, silent: Silent) -> str:
        if silent.no_python:
            return f"no Python at {self.place.python} there: make the environment (./setup.sh), or name it with --remote_python"
        if remedy := silent.remedy(host)[0]:
            return f"{remedy} (ssh: {str(silent).removeprefix('ssh: ')})"
        if str(silent) == NO_ANSWER:
            return f"{silent} within {self.limit:g} s (--ssh_timeout)"
        return f"ssh cannot get in: {silent}" if silent.status == 255 else str(silent)

    def _ask(self, number: int, what: str, **question: Any) -> Any:
        return self.asked[number].ask(what, self._left(number), **question)

    def _left(self, number: int) -> float:
        return self.until[number] - time.monotonic()

    def _learn(self, number: int) -> None:
        self.until[number] = time.monotonic() + self.limit
        self.asked[number] = ProbedHost(self.hosts[number], self.place.python, self.place.ssh)
        self.facts[number] = self._ask(number, "facts", root=self.place.root, folder=self.place.folder)
        if number == 0:
            self._listen()
        ahead, round_trip = self.asked[number].ahead(limit=self._left(number))
        if abs(ahead) > CLOCKS_S + round_trip:
            word = "ahead of" if ahead > 0 else "behind"
            self.notes[number].append(
                f"its clock is {abs(ahead):.1f} s {word} this machine's; training goes on, but times in files and logs do not fit: "
                "timedatectl set-ntp true"
            )

    def _compare(self) -> None:
        """What differs between hosts, or is missing on one."""
        here = str(Path(__file__).resolve().parents[1])
        code, commit = host_probe.code_of(here), host_probe.commit_of(here)
        first = next(iter(sorted(self.facts)), None)
        for number, told in sorted(self.facts.items()):
            say, place = self.trouble[number].append, self.place
            if not told["code"]:
                say(f"no LaunchLab in {place.root} there: copy it (./setup.sh --multi-node), or name its folder with --remote_dir")
            elif told["code"] != code:
                files = sorted(name for name in {*told["code"], *code} if told["code"].get(name) != code.get(name))
                which = f"not the same: {', '.join(files[:3])}{f' and {len(files) - 3} more' if len(files) > 3 else ''}"
                commits = f"commit {told['commit'] or 'unknown'} there, {commit or 'unknown'} here"
                say(f"other code in {place.root}: {commits}; {which}; copy this one there (./setup.sh --multi-node)")
            if told["code"] and not told["folder"]:
                say(f"no folder {place.folder} there, where the ranks would start: make it, or go to the project's folder here")
            if not told["torch"]:
                say(f"no torch in {place.python}: make the environment there (./setup.sh), or name it with --remote_python")
            assert first is not None
            for what in ("python", "torch"):
                if told["torch"] and told[what] != self.facts[first][what] and self.facts[first]["torch"]:
                    say(
                        f"{what.capitalize()} {told[what]}, but {self.facts[first][what]} on {self.hosts[first].label}: "
                        "install the same version on all hosts"
                    )

    def _listen(self) -> None:
        """Has the master listen for the others' calls: on the given port, else on 29500 or a free one."""
        for port in [host_probe.DEFAULT_PORT, 0] if self.port is None else [self.port]:
            (found,) = self._ask(0, "listen", ports=[port], token=self.token).values()
            if isinstance(found, int):
                self.master_port = found
                return
        self.trouble[0].append(f"--port {self.port}: cannot be used there ({found}); give another, or none")

    def _meet(self, findings: Findings) -> None:
        """Lets the others call the master, where it listens."""
        if not (port := self.master_port):
            return
        findings.master_port = port
        master = self.hosts[0]
        address = (self.facts[0]["from"] + [""] * 3)[2]
        names = list(dict.fromkeys(filter(None, [master.name, address])))
        found: dict[int, dict[str, str]] = {}

        def call(number: int) -> None:
            targets = [(name, port) for name in names]  # which of them does each host reach?
            answers = self.asked[number].ask("reach", REACH_S * 3 + 5, targets=targets, token=self.token, seconds=REACH_S)
            found[number] = dict(zip(names, answers, strict=True))

        self._each(call, sorted(set(self.facts) - {0}))
        findings.master_addr = next((n for n in names if not any(why[n] for why in found.values())), names[0])
        for number, why in found.items():
            if why[findings.master_addr]:
                told = "; ".join(f"{name}: {text}" for name, text in why.items() if text)
                self.trouble[number].append(
                    f"it cannot reach port {port} of {master.label} ({told}): let it through the firewall, and see that the "
                    f"name {master.name} leads to {address or 'that host'} there"
                )
        if len(self.hosts) == 1:
            findings.master_addr = "127.0.0.1"

    def run(self) -> Findings:
        """Asks everything."""
        findings = Findings()
        try:
            self._each(self._learn, range(len(self.hosts)))
            self._compare()
            self._meet(findings)
        finally:
            for asked in list(self.asked.values()):
                asked.close()
        for number, host in enumerate(self.hosts):
            where = f"{host.label} (line {host.line})" if host.line else host.label
            findings.problems += [f"{where}: {text}" for text in self.trouble[number]]
            findings.notes += [f"{where}: {text}" for text in self.notes[number]]
        findings.gpus = [self.facts.get(number, {}).get("gpus", 0) for number in range(len(self.hosts))]
        return findings


def check_hosts(hosts: Sequence[Host], place: Place, port: int | None, limit: float) -> Findings:
    """Looks at all hosts at once.

    Is each reachable by ssh, has it the same Python, torch and code, a free port (the first host), a clock that fits, and does it
    reach the first host's port?

    Args:
        hosts: the first is the master.
        place: where the project is on them.
        port: the master's; None for 29500, or a free one if that is taken.
        limit: seconds for each host.
    """
    return _Checks(hosts, place, port, limit).run()
