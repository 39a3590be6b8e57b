"""The network of a virtual cluster: a cable for each host, which can be slow, be cut and be mended."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from common import virtual_host
from common.errors import UsageError
from common.namespaces import Space

NETWORK = "10.97.0."  # not 10.88: podman's
_RATES = {"k": 1e3, "m": 1e6, "g": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def bits_per_second(rate: str) -> float:
    """``100mbit`` → 1e8, with tc's words (tc(8)): kbit, mbit, gbit.

    Raises:
        UsageError: it is no such rate.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate.lower())
    if not found or not float(found[1]):
        raise UsageError(f"--rate {rate}: not allowed; give a number with kbit, mbit or gbit, such as 100mbit")
    return float(found[1]) * _RATES[found[2]]


def seconds(delay: str) -> float:
    """``2ms`` → 0.002.

    Raises:
        UsageError: it is no such time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", delay.lower())
    if not found:
        raise UsageError(f"--delay {delay}: not allowed; give a number with us, ms or s, such as 2ms")
    return float(found[1]) * _TIMES[found[2]]


class Network:
    """Cables from hosts to a bridge: ``eth0`` at the host's end, ``port1``, ``port2``, … at the other."""

    def __init__(self, holder: Space, hosts: Mapping[str, Space], delay_s: float) -> None:
        """Lays them.

        Args:
            holder: in whose network the bridge is.
            hosts: by name.
            delay_s: of a frame from one host to another.

        Raises:
            RunError: this kernel lacks something for it.
        """
        self._holder, self._hosts = holder, hosts
        self._ports = {name: f"port{k}" for k, name in enumerate(hosts, 1)}
        self._limited = self._netem = False
        self.relay: Space | None = None
        """Delivers frames late where the kernel cannot."""
        rows = ["link add bridge0 type bridge", "link set bridge0 up"]
        for name, port in self._ports.items():
            rows.append(f"link add {port} type veth peer name eth0 netns {hosts[name].pid}")
            rows += [f"link set {port} master bridge0", f"link set {port} up"]
        holder.must("ip", rows)
        for k, host in enumerate(hosts.values(), 1):
            host.must("ip", [f"address add {NETWORK}{k}/24 dev eth0", "link set lo up", "link set eth0 up"])
            host.configure("ip", [f"address add fd97::{k:x}/64 dev eth0 nodad"])  # where there is IPv6
        if delay_s:
            self._slow_down(delay_s)

    def _slow_down(self, delay_s: float) -> None:
        """A delay on what each host sends: netem (tc-netem(8)), or the relay in the bridge's place."""
        row = f"qdisc add dev eth0 root handle 1: netem delay {delay_s * 1e6:.0f}us limit 100000"
        first, *others = self._hosts.values()
        if not first.configure("tc", [row]):
            self._netem = True
            for host in others:
                host.must("tc", [row])
            return
        self._holder.must("ip", [f"link set {port} nomaster" for port in self._ports.values()])
        program = [sys.executable, "-I", "-S", str(Path(virtual_host.__file__).with_name("virtual_relay.py"))]
        # In the holder's processes too: it ends with them.
        self.relay = Space(self._holder.enter(("net", "pid"), [*program, str(delay_s), *self._ports.values()]))

    def set_rate(self, rate: str | None) -> None:
        """Limits each cable to ``rate``, either way; None: no limit.

        Raises:
            UsageError: ``rate`` is none.
            RunError: the kernel has no token bucket filter (tc-tbf(8)).
        """
        if not rate and not self._limited:
            return
        bits = bits_per_second(rate) if rate else 0.0
        burst = max(65536 if bits >= 5e7 else 32768, round(bits / 8 * 0.002))  # bytes; of 2 ms, for timers come late
        place = "parent 1: handle 2:" if self._netem else "root"
        for name, port in self._ports.items():
            for space, device, at in ((self._hosts[name], "eth0", place), (self._holder, port, "root")):
                limit = f"replace dev {device} {at} tbf rate {bits:.0f}bit burst {burst} latency 100ms"
                space.must("tc", [f"qdisc {limit if rate else f'delete dev {device} {at}'}"])
        self._limited = bool(rate)

    def plug(self, name: str, into: bool) -> None:
        """Puts host ``name``'s cable in, or pulls it: what it sends and is sent is lost then, and nobody is told."""
        self._holder.must("ip", [f"link set {self._ports[name]} {'up' if into else 'down'}"])
