"""What lies between hosts: equal versions, clocks, each host's ports from each other, in both directions."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.doctor_rows import Row, Subject, finding, ok, unchecked
from common.hosts import Host
from common.probed_host import ProbedHost, Silent

PROBE_S = 3.0  # for a connection between two hosts
CLOCK_TURNS = 5
# torch-elastic takes a node for dead whose heartbeat is 15 s old by another's clock (elastic.py: 6 s); make and tar want less.
CLOCK_S = 1.0
EQUAL = ("python", "torch", "numpy", "mpi4py", "cuda", "nccl", "commit")


def asked(probe: ProbedHost, what: str, limit: float, **question: Any) -> Any:
    """What the host answers, or the ``Silent`` that tells why it does not."""
    try:
        return probe.ask(what, limit, **question)
    except Silent as silent:
        return silent


def of(host: Host, row: Row) -> Row:
    """``row``, said of ``host``."""
    return Row(row.check, row.state, row.found, row.mend, host.name, row.facts)


def differences(machines: Mapping[str, Mapping[str, Any]], path: str) -> list[Row]:
    """Versions that are not the same everywhere: a row for each; ``machines``: host → its versions."""
    rows = []
    for name in EQUAL:
        values = {host: _comparable(name, found.get(name)) for host, found in machines.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{host} {value or 'none'}" for host, value in values.items())
            mend = f"./setup.sh --multi-node --hosts {path}"
            rows.append(finding("equal versions", f"{name} differs: {told}; ranks must run the same", mend, **values))
    if not rows and len(machines) > 1:
        first = next(iter(machines.values()))
        told = ", ".join(f"{name} {str(first[name])[:10]}" for name in EQUAL if first.get(name))
        rows.append(ok("equal versions", f"{told}, on all {len(machines)} hosts"))
    return rows


def _comparable(name: str, value: Any) -> str:
    """Patch releases of one Python get on with each other; everything else is to be equal."""
    text = str(value or "")
    return ".".join(text.split(".")[:2]) if name == "python" else text[:10] + text[40:] if name == "commit" else text


def clock(hosts: Sequence[Host], probes: Mapping[Host, ProbedHost]) -> Row:
    """How far the hosts' clocks are apart: each is asked several times."""
    offsets = {}
    for host in hosts:
        with contextlib.suppress(Silent):
            offsets[host.name] = probes[host].ahead(CLOCK_TURNS)[0]
    if not offsets:
        return unchecked("clock", "no host answers")
    told = ", ".join(f"{name} {offset:+.3f} s" for name, offset in offsets.items())
    furthest = max(offsets, key=lambda name: abs(offsets[name]))
    if max(offsets.values(), default=0.0) - min(offsets.values(), default=0.0) > CLOCK_S or abs(offsets[furthest]) > CLOCK_S:
        mend = f"ssh {furthest} sudo timedatectl set-ntp true"
        return finding(
            "clock", f"clocks differ ({told} against this machine): torchrun takes nodes for dead by them", mend, **offsets
        )
    return ok("clock", f"{told} against this machine", **offsets)


def reachability(
    hosts: Sequence[Host], probes: Mapping[Host, ProbedHost], subject: Subject, addresses: Mapping[str, Sequence[str]]
) -> list[Row]:
    """Each host's ports from each other host, in both directions.

    Args:
        hosts: those that ssh leads to.
        probes: theirs.
        subject: has the port.
        addresses: host → its SSH_CONNECTION (our address and port, its address and port), to name in a firewall's rule.
    """
    if len(hosts) < 2:
        return [unchecked("reachability", "it takes two hosts that ssh leads to")]
    port = subject.port or 29500
    rows, listening, token = [], {}, secrets.token_hex(8)
    for host in hosts:
        told = asked(probes[host], "listen", 10.0, ports=[port, 0], token=token)
        listening[host] = told if isinstance(told, dict) else {}
        if not isinstance(listening[host].get(str(port)), int):
            why = listening[host].get(str(port), told)
            rows.append(
                of(host, finding("reachability", f"{port} cannot be listened on ({why})", f"export MASTER_PORT={port + 1}"))
            )
    pairs = [(a, b) for a in hosts for b in hosts if a is not b]

    def reach(a: Host) -> list[str]:
        targets = [
            [b.name, number]
            for _, b in (p for p in pairs if p[0] is a)
            for number in listening[b].values()
            if isinstance(number, int)
        ]
        found = asked(probes[a], "reach", 3 * PROBE_S + 5, targets=targets, token=token, seconds=PROBE_S)
        return found if isinstance(found, list) else [str(found)] * len(targets)

    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = dict(zip(hosts, map(iter, pool.map(reach, hosts)), strict=True))
    for a, b in pairs:
        why = {asked: next(answers[a]) for asked, number in listening[b].items() if isinstance(number, int)}
        if any(why.values()):
            rows.append(_blocked(a, b, port, why, addresses))
    if not rows:
        high = "any other"
        rows.append(
            ok("reachability", f"each of {len(hosts)} hosts reaches each other on port {port} and on {high}, in both directions")
        )
    return rows


def _blocked(a: Host, b: Host, port: int, why: Mapping[str, str], addresses: Mapping[str, Sequence[str]]) -> Row:
    """Host ``a`` does not get through to ``b``; ``why``: the port that was asked for ("0": a high one) → why not, or ""."""
    reason = next(filter(None, why.values()))
    address = {host.name: (list(addresses.get(host.name, [])) + [""] * 4)[2] or "ADDRESS" for host in (a, b)}
    if "resolve" in reason:
        told = f"on {a.name} the name {b.name} does not resolve"
        return of(a, finding("reachability", told, f'echo "{address[b.name]} {b.name}" | ssh {a.name} sudo tee -a /etc/hosts'))
    ports = [str(port) if asked != "0" else "high ports" for asked, because in why.items() if because]
    which = " and ".join(ports)
    told = f"{a.name} does not reach {b.name} on {which} ({reason}), where ssh gets through: a firewall is in between"
    if ports == ["high ports"]:
        told = f"{a.name} reaches {b.name} on {port}, but on no high port ({reason}): gloo and NCCL need more ports than {port}"
    mend = f"ssh {b.name} sudo iptables -I INPUT -s {address[a.name]} -p tcp -j ACCEPT"
    return of(b, finding("reachability", told, mend, **{"from": a.name, "to": b.name, "ports": ports}))
