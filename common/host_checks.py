"""Looks at all hosts of a run before anything is started on them: every problem of every host at once.

Each host gets one ssh connection, all at the same time, through which ``common/host_probe.py`` is sent and asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import host_probe
from common.hosts import Host

CLOCKS_S = 2.0  # clocks that differ by more are told of
MANY = 128  # connections at the same time
# Isolated by hand, because -I would leave out packages that a user has installed for herself.
BOOT = (
    "import sys; sys.path.pop(0); "
    "sys.exit('Python %d.%d is too old: 3.10 or newer is needed' % sys.version_info[:2]) if sys.version_info < (3, 10) "
    "else exec(sys.stdin.buffer.read(int(sys.argv[1])))"
)
# What ssh says → what to do. {host}: to type after ssh; {name}: the host.
SSH_SAYS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is not the one known here; if you know why: ssh-keygen -R {name}"),
    ("Host key verification failed", "its host key is not known here: ssh {host} once, look at it and say yes"),
    ("Permission denied", "it lets in none of the keys offered: ssh-copy-id {host}, or name the key in ~/.ssh/config"),
    ("Too many authentication failures", "it lets in none of the keys offered: name the right one in ~/.ssh/config"),
    ("Could not resolve hostname", "nobody knows this name: mend it in the hosts file, or add it to /etc/hosts or ~/.ssh/config"),
    ("Connection refused", "no sshd answers there: start it (apt install openssh-server), or give its port in the hosts file"),
    ("timed out", "it does not answer: is it on, is the name right, does a firewall drop port {port}?"),
    ("No route to host", "no route leads there: is it on, and on this network?"),
    ("Network is unreachable", "no route leads there: is this machine on the network?"),
    ("Bad owner or permissions", "ssh refuses its own configuration: chmod 600 the file that it names"),
)


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


class _Silent(Exception):
    """A host that gave no answer; the text says why."""


class _Asked:
    """A host with the probe running on it."""

    def __init__(self, host: Host, place: Place, limit: float) -> None:
        self.host, self.place, self.limit = host, place, limit
        self.until = time.monotonic() + limit
        source = Path(host_probe.__file__).read_bytes()
        command = shlex.join([place.python, "-c", BOOT, str(len(source))])
        try:
            self.process = subprocess.Popen(
                host.ssh(f"exec {command}", place.ssh),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is this process's to hear
            )
        except OSError as error:
            raise _Silent(f"{place.ssh[0]} cannot be started ({error.strerror}): apt install openssh-client") from None
        self._late = False
        self.timer = threading.Timer(limit, self._too_late)
        self.timer.daemon = True
        self.timer.start()
        self._send(source)

    def _too_late(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        """With what ssh has started: a ProxyCommand holds the pipes too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _send(self, data: bytes) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # the answer will be missing, and say why
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def ask(self, what: str, **question: Any) -> dict[str, Any]:
        """The answer to one question; raises _Silent."""
        self._send(json.dumps({"ask": what, **question}).encode() + b"\n")
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(host_probe.MARK.encode()):
                answer: dict[str, Any] = json.loads(line[len(host_probe.MARK) :])
                return answer
        raise _Silent(self._why())

    def _why(self) -> str:
        assert self.process.stderr
        said = self.process.stderr.read().decode(errors="replace").strip()
        status = self.process.wait()
        if self._late:
            return f"no answer within {self.limit:g} s (--ssh_timeout)"
        last = said.splitlines()[-1].strip() if said else f"status {status}"
        if status == 255:
            target = f"{self.host.user}@{self.host.name}" if self.host.user else self.host.name
            where = {"host": f"-p {self.host.port} {target}" if self.host.port else target, "name": self.host.name}
            for words, remedy in SSH_SAYS:
                if words in said:
                    return f"{remedy.format(**where, port=self.host.port or 22)} (ssh: {last.removeprefix('ssh: ')})"
            return f"ssh cannot get in: {last}"
        if status in (126, 127):
            return f"no Python at {self.place.python} there: make the environment (./setup.sh), or name it with --remote_python"
        return last

    def close(self) -> None:
        """Lets the host go; who still waits for its answer gets none."""
        self.timer.cancel()
        with contextlib.suppress(OSError):
            assert self.process.stdin
            self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


class _Checks:
    """The questions to all hosts, and what follows from the answers."""

    def __init__(self, hosts: Sequence[Host], place: Place, port: int | None, limit: float) -> None:
        self.hosts, self.place, self.port, self.limit = hosts, place, port, limit
        self.token = secrets.token_hex(8)
        self.asked: dict[int, _Asked] = {}
        self.facts: dict[int, dict[str, Any]] = {}
        self.trouble: dict[int, list[str]] = {number: [] for number in range(len(hosts))}
        self.notes: dict[int, list[str]] = {number: [] for number in range(len(hosts))}

    def _each(self, work: Callable[[int], None], numbers: Sequence[int]) -> None:
        def safely(number: int) -> None:
            try:
                work(number)
            except _Silent as silent:
                self.trouble[number].append(str(silent))

        pool = ThreadPoolExecutor(MANY)
        try:
            for done in [pool.submit(safely, number) for number in numbers]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _learn(self, number: int) -> None:
        asked = self.asked[number] = _Asked(self.hosts[number], self.place, self.limit)
        place, token = self.place, "" if number else self.token
        self.facts[number] = asked.ask("facts", root=place.root, folder=place.folder, port=self.port, token=token)
        began = time.time()
        there = asked.ask("time")["time"]
        round_trip = time.time() - began
        ahead = there - began - round_trip / 2
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

    def _meet(self, findings: Findings) -> None:
        """Lets the others call the master, where it listens."""
        if 0 not in self.facts:
            return
        master, told = self.hosts[0], self.facts[0]
        if not told["port"]:
            self.trouble[0].append(f"--port {self.port}: cannot be used there ({told['port_error']}); give another, or none")
            return
        findings.master_port = told["port"]
        names = list(dict.fromkeys(filter(None, [master.name, told["address"]])))
        found: dict[int, dict[str, Any]] = {}

        def call(number: int) -> None:
            for name in names:  # one after another: which of them does each host reach?
                answer = self.asked[number].ask("reach", hosts=[name], port=told["port"], token=self.token)
                seen = found.setdefault(number, {"reached": set(), "errors": {}})
                seen["reached"] |= {answer["reached"]} - {""}
                seen["errors"] |= answer["errors"]

        others = sorted(set(self.facts) - {0})
        self._each(call, others)
        findings.master_addr = next((n for n in names if all(n in found[k]["reached"] for k in found)), names[0])
        for number in found:
            if findings.master_addr not in found[number]["reached"]:
                why = "; ".join(f"{name}: {text}" for name, text in found[number]["errors"].items())
                self.trouble[number].append(
                    f"it cannot reach port {told['port']} of {master.label} ({why}): let it through the firewall, and see that the "
                    f"name {master.name} leads to {told['address'] or 'that host'} there"
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
