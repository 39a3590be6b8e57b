"""The doctor's checks over several hosts: ssh, equal versions, clocks, ports both ways, an all-reduce through all of them."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from common import doctor_ranks
from common.doctor_between import asked, clock, differences, of, reachability
from common.doctor_rows import FINDING, UNCHECKED, Answer, Row, Subject, ask, finding, ok, unchecked
from common.hosts import Host, read_hosts
from common.probed_host import ProbedHost, Silent

T = TypeVar("T")
CONNECT_S = 5  # ssh's patience
EXAMINE_S = 40.0  # for a host's own doctor: it imports torch
ON_HOSTS = ("versions", "backends", "gpus", "variables", "port", "host name", "interface", "firewall", "/dev/shm", "open files",
            "cores", "threads", "orphans")  # fmt: skip


class Party:
    """The hosts of a file."""

    def __init__(
        self, path: str, python: str, folder: str, purpose: str | None, ssh: Sequence[str] = ("ssh",), ranks: int | None = None
    ) -> None:
        """Reads the hosts file.

        Args:
            path: of the hosts file.
            python: the interpreter on the hosts.
            folder: LaunchLab's on the hosts; ``{name}`` in either becomes the host's name.
            purpose: what ``--for`` says.
            ssh: the command, with options that outrank ours.
            ranks: on each host whose slots are not given; None: its GPUs, or one.

        Raises:
            UsageError: the file cannot be read, or a line of it makes no sense.
        """
        self.path, self.python, self.folder, self.purpose = path, python, folder, purpose
        self.hosts, self.ranks = read_hosts(path), ranks
        self._ssh = [*ssh, "-o", f"ConnectTimeout={CONNECT_S}"]

    def on(self, host: Host, words: Sequence[str]) -> list[str]:
        """The command that runs ``words`` on ``host``, in LaunchLab's folder."""
        return host.ssh(f"cd {shlex.quote(self._its(host, self.folder))} && {shlex.join(words)}", self._ssh)

    def _its(self, host: Host, text: str) -> str:
        return text.replace("{name}", host.name)

    def rows(self, subject: Subject) -> list[Row]:
        """All checks over hosts."""
        env, probes, found = dict(subject.environment), {}, []
        try:
            for host in self.hosts:
                probes[host] = ProbedHost(host, self._its(host, self.python), self._ssh, env)
            told = self._side_by_side(lambda host: asked(probes[host], "who", CONNECT_S + 5))
            for host, who in told.items():
                if isinstance(who, Silent):
                    found.append(_unreached(host, who, self._its(host, self.python)))
            there = [host for host, who in told.items() if not isinstance(who, Silent)]
            if not found:
                found.append(ok("ssh to hosts", f"{len(there)} hosts let this machine in without a password"))
            found += self._examined(there, subject)
            found.append(clock(there, probes))
            reached = reachability(there, probes, subject, {host.name: told[host]["from"] for host in there})
            found += reached
        finally:
            for probe in probes.values():
                probe.close()
        if len(there) < 2 or any(row.state == FINDING for row in [*reached, *found[: len(self.hosts)]] if row.check in _BEFORE):
            return [*found, unchecked("all-reduce over hosts", "the hosts do not all reach each other yet")]
        return [*found, self._all_reduce(there, subject)]

    def _side_by_side(self, what: Callable[[Host], T], hosts: Sequence[Host] | None = None) -> dict[Host, T]:
        hosts = self.hosts if hosts is None else hosts
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return dict(zip(hosts, pool.map(what, hosts), strict=True))

    def _examined(self, hosts: Sequence[Host], subject: Subject) -> list[Row]:
        """Each host's own doctor, and what differs between them."""

        def examined(host: Host) -> Answer:
            words = [self._its(host, self.python), "-m", "common.doctor", "--json", "--several"]
            words += ["--only", *ON_HOSTS, *([self.purpose] if self.purpose else [])]
            words += ["--nproc_per_node", str(ranks)] if (ranks := host.slots or self.ranks) else []
            port = subject.environment.get("MASTER_PORT")
            return ask(self.on(host, ["env", f"MASTER_PORT={port}", *words] if port else words), EXAMINE_S, subject.environment)

        rows, machines = [], {}
        for host, answer in self._side_by_side(examined, hosts).items():
            try:
                told = json.loads(answer.out[answer.out.index('{\n  "host"') :])
            except (ValueError, KeyError):
                why = f"LaunchLab does not run there, in {self._its(host, self.folder)} ({answer.last_line})"
                rows.append(finding("doctor", why, f"./setup.sh --multi-node --hosts {self.path}", status=answer.status))
                rows[-1] = of(host, rows[-1])
                continue
            theirs = [Row(**row | {"host": host.name}) for row in told["rows"]]
            versions: dict[str, Any] = next((row.facts for row in theirs if row.check == "versions"), {})
            machines[host.name] = versions
            bad = [row for row in theirs if row.state == FINDING]
            good = sum(row.state not in (FINDING, UNCHECKED) for row in theirs)
            rows += bad or [of(host, ok("doctor", f"{good} checks ok", **told["machine"]))]
        return [*rows, *differences(machines, self.path)]

    def _all_reduce(self, hosts: Sequence[Host], subject: Subject) -> Row:
        """A rank on each host."""

        def run(host: Host) -> Answer:
            number = hosts.index(host)
            peer = hosts[1 if number == 0 else 0].name
            words = doctor_ranks.command(self._its(host, self.python), number, len(hosts), hosts[0].name, subject.port or 29500, "")
            return ask(self.on(host, [*words[:-1], f"@{peer}"]), doctor_ranks.LIMIT_S + 10, subject.environment)

        told = [doctor_ranks.heard(answer) for answer in self._side_by_side(run, hosts).values()]
        names = [str(t.get("interface") or "") for t in told]
        row = doctor_ranks.judge(told, f"a rank on each of {len(hosts)} hosts, gloo", Counter(names).most_common(1)[0][0])
        return Row("all-reduce over hosts", row.state, row.found, row.mend, facts=row.facts)


_BEFORE = ("ssh to hosts", "reachability")


def _unreached(host: Host, silent: Silent, python: str) -> Row:
    """A host that ssh does not lead to, or where Python is missing."""
    told, mend = silent.remedy(host)
    if silent.no_python:
        told, mend = f"{python} is not there", "./setup.sh --multi-node   # or name it: --remote_python PATH"
    return of(host, finding("ssh to hosts", f"{told or 'ssh does not lead there'} ({silent})", mend))
