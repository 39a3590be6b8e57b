"""Several hosts on one Linux machine, to learn and test on: each with a name, an address, a network and processes of its own.

    python -m common.virtual_cluster --nodes 3                                a shell on the first host
    python -m common.virtual_cluster --nodes 2 -- python launchers/plain.py --nnodes 2 --node_rank {rank} --master_addr {master}
    python -m common.virtual_cluster --nodes 2 --rate 100mbit --delay 2ms --ssh --slurm

this process                                        namespaces(7): network, host name, mounts, processes
  `-- holder (its end is the end of all)
        |-- node1  10.97.0.1  --.
        |-- node2  10.97.0.2  --+-- bridge, or with --delay and no netem a switch in user space
        `-- node3  10.97.0.3  --'
The hosts share this machine's cores and files; /dev/shm, /etc/hosts and the ports are each host's own. As root, or as an
ordinary user where user namespaces are allowed (user_namespaces(7)).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import virtual_host
from common.errors import RunError, UsageError

NETWORK = "10.97.0."  # not 10.88: podman's
MOST = 200
_SO_PASSCRED = 16
_START_S = 20.0
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
_HOST_KINDS = ("ipc", "uts", "net", "pid", "mnt")
_PROGRAM = [sys.executable, "-I", "-S", virtual_host.__file__]
_NEW = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]


@dataclass
class _Born:
    """A process in namespaces of its own."""

    process: subprocess.Popen[bytes]
    pid: int
    """As this process's namespace numbers it."""


def missing(ssh: bool = False, slurm: bool = False) -> str:
    """What this machine lacks for a cluster, in one line; "" if nothing."""
    others = "everything on one node works without; see python -m common.doctor"
    if sys.platform != "linux":
        return f"a virtual cluster is made of Linux namespaces, this is {sys.platform}; {others}"
    packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"} | ({"sshd": "openssh-server"} if ssh else {})
    if ssh:
        packages |= {"ssh": "openssh-client", "ssh-keygen": "openssh-client"}
    if lacking := sorted({package for program, package in packages.items() if not _program(program)}):
        return f"a virtual cluster needs {', '.join(lacking)}: apt install {' '.join(lacking)}"
    if slurm:
        return "a virtual cluster has no SLURM yet"
    probe = [*_unshare(), "ip", "link", "add", "probe", "type", "bridge"]
    ended = subprocess.run(probe, capture_output=True, text=True, timeout=_START_S, env=_environment())
    if ended.returncode:
        why = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        who = "root" if os.geteuid() == 0 else "an ordinary user"
        return (
            f"a virtual cluster needs namespaces, which {who} cannot make here ({why}); "
            + ("start this container with --privileged" if os.geteuid() == 0 else "use sudo, or allow user namespaces (sysctl "
               "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0)") + f"; {others}"
        )  # fmt: skip
    return ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=_environment()["PATH"])


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, with the system administration's programs on the path, where an ordinary user has none."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return os.environ | {"PATH": path} | dict(more or {})


def _unshare() -> list[str]:
    return [*_NEW, *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


def bits_per_second(rate: str) -> float:
    """``100mbit`` → 1e8, with tc's words (tc(8)): bit, kbit, mbit, gbit.

    Raises:
        UsageError: it is no such rate.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate.lower())
    if not found or not float(found[1]):
        raise UsageError(f"--rate {rate}: not allowed; give a number with kbit, mbit or gbit, such as 100mbit")
    return float(found[1]) * _UNITS[found[2]]


def _seconds(delay: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", delay.lower())
    if not found:
        raise UsageError(f"--delay {delay}: not allowed; give a number with us, ms or s, such as 2ms")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def _names(nodes: int, names: Sequence[str] | None) -> list[str]:
    if not 1 <= nodes <= MOST:
        raise UsageError(f"--nodes {nodes}: not allowed; give 1 to {MOST}")
    names = list(names or [f"node{k}" for k in range(1, nodes + 1)])
    if len(names) != nodes:
        raise UsageError(f"--names {' '.join(names)} with --nodes {nodes}: give a name for each host, or leave one of them out")
    for name in names:
        if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?", name) or name == "localhost" or names.count(name) > 1:
            raise UsageError(f"--names {name}: not allowed; give each host a name of its own of letters, digits and -")
    return names


def _names_from_files() -> str:
    """/etc/nsswitch.conf, with host names looked up in /etc/hosts alone: there is no name server in a cluster."""
    with suppress(OSError):
        rows = Path("/etc/nsswitch.conf").read_text().splitlines()
        return "\n".join([row for row in rows if not row.startswith("hosts:")] + ["hosts: files"]) + "\n"
    return "hosts: files\n"


class VirtualCluster:
    """Hosts that exist from ``__enter__`` to ``__exit__``, or to the end of this process, however it comes."""

    def __init__(
        self,
        nodes: int = 2,
        names: Sequence[str] | None = None,
        rate: str | None = None,
        delay: str | None = None,
        ssh: bool = False,
        slurm: bool = False,
    ) -> None:
        """Describes the cluster; ``__enter__`` makes it.

        Args:
            nodes: number of hosts, 1 to 200.
            names: theirs; node1, node2, … by default.
            rate: of each host's link, both ways, such as ``100mbit`` or ``1gbit``; unlimited by default.
            delay: of a frame from one host to another, such as ``2ms``; a round trip takes twice that.
            ssh: start an sshd on each host that lets in who holds the cluster's own key.
            slurm: start SLURM: a controller on the first host, and each host's daemon.

        Raises:
            UsageError: a value that is not allowed.
        """
        self.names = _names(nodes, names)
        self.addresses = {name: f"{NETWORK}{k}" for k, name in enumerate(self.names, 1)}
        self._rate, self._delay = rate, delay
        if rate:
            bits_per_second(rate)
        self.delay_s = _seconds(delay) if delay else 0.0
        self._wants = {"ssh": ssh, "slurm": slurm}
        self._holder: _Born | None = None
        self._hosts: dict[str, _Born] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._netem = False
        self._slurm: Any = None
        self.environment: dict[str, str] = {}
        """Set for every command on every host."""

    # ------------------------------------------------------------------------------------------------ making it

    def __enter__(self) -> VirtualCluster:
        """Makes the hosts.

        Raises:
            UsageError: this machine lacks something for it.
            RunError: it lacked something that showed only then.
        """
        if lack := missing(**self._wants):
            raise UsageError(lack)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Takes all of it down."""
        self.close()

    def _make(self) -> None:
        self._holder = self._bear([*_unshare(), *_PROGRAM, "hold"])
        (self.folder / "hosts").write_text(self._hosts_file())
        (self.folder / "nsswitch.conf").write_text(_names_from_files())
        if self._wants["ssh"]:
            from common.virtual_ssh import write_files

            write_files(self)
        for name in self.names:
            for file in ("hosts", "nsswitch.conf", "ssh_config"):
                if (self.folder / file).exists():
                    shutil.copy(self.folder / file, self.folder / f"{name}.{file}")
            inside = self._enter(self._holder, virtual_host.KINDS, [*_NEW, *_PROGRAM, "host", name])
            self._hosts[name] = self._bear(inside)
        self._connect()
        if self._delay:
            self._slow_down()
        if self._rate:
            self.set_rate(self._rate)
        if self._wants["ssh"]:
            from common.virtual_ssh import start_daemons

            start_daemons(self)

    @property
    def folder(self) -> Path:
        """A folder in memory of all hosts, which they see as ``virtual_host.FOLDER``."""
        assert self._holder
        return Path(f"/proc/{self._holder.pid}/root{virtual_host.FOLDER}")

    def _hosts_file(self) -> str:
        rows = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
        for k, (name, address) in enumerate(self.addresses.items(), 1):
            rows += [f"{address} {name}", f"fd97::{k:x} {name}-ip6"]
        return "\n".join(rows) + "\n"

    def _bear(self, words: list[str]) -> _Born:
        """Starts a program of ``virtual_host`` in new namespaces, and learns its process id."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, _SO_PASSCRED, 1)
            ours.settimeout(_START_S)
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=_environment({virtual_host.FD: str(theirs.fileno())}),
                start_new_session=True,
            )
            self._processes.append(process)
            theirs.close()
            with suppress(TimeoutError):
                data, ancillary, *_ = ours.recvmsg(64, socket.CMSG_SPACE(12))
                if data:
                    return _Born(process, struct.unpack("3i", ancillary[0][2])[0])
        process.kill()
        why = (process.communicate(timeout=_START_S)[1].decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"a virtual cluster's host could not be made: {why}")

    def _enter(
        self, place: _Born, kinds: Iterable[str], words: Sequence[str], cwd: str | Path = "/", as_oneself: bool = False
    ) -> list[str]:
        rootless = os.geteuid() != 0
        wanted = [kind for kind in kinds if kind != "user"] + (["user"] if rootless else [])
        who = [f"{os.geteuid()}:{os.getegid()}"] if rootless and as_oneself else []
        return [*_PROGRAM, "enter", str(place.pid), ",".join(wanted), str(cwd), *who, "--", *words]

    def _configure(self, place: _Born, program: str, rows: Iterable[str]) -> str:
        """Has ``ip`` or ``tc`` carry out ``rows`` in the network of ``place``; returns what went wrong."""
        words = self._enter(place, ("net",), [program, "-batch", "-"])
        text = "\n".join(rows) + "\n"
        ended = subprocess.run(words, input=text, capture_output=True, text=True, timeout=_START_S, env=_environment())
        return "" if ended.returncode == 0 else (ended.stderr.strip().splitlines() or ["no reason given"])[0]

    def _must(self, place: _Born, program: str, rows: Iterable[str]) -> None:
        if why := self._configure(place, program, rows):
            raise RunError(f"a virtual cluster's network could not be made: {program}: {why}")

    def _connect(self) -> None:
        """A cable for each host: ``eth0`` there, ``port1``, ``port2``, … on the bridge."""
        assert self._holder
        rows = ["link add bridge0 type bridge", "link set bridge0 up"]
        for k, name in enumerate(self.names, 1):
            rows.append(f"link add port{k} type veth peer name eth0 netns {self._hosts[name].pid}")
            rows += [f"link set port{k} master bridge0", f"link set port{k} up"]
        self._must(self._holder, "ip", rows)
        for k, name in enumerate(self.names, 1):
            up = [f"address add {NETWORK}{k}/24 dev eth0", "link set lo up", "link set eth0 up"]
            self._must(self._hosts[name], "ip", up)
            self._configure(self._hosts[name], "ip", [f"address add fd97::{k:x}/64 dev eth0 nodad"])  # where there is IPv6

    def _ports(self) -> dict[str, str]:
        return {name: f"port{k}" for k, name in enumerate(self.names, 1)}

    def _slow_down(self) -> None:
        """A delay on what each host sends: netem (tc-netem(8)), or the relay in the bridge's place."""
        assert self._holder
        row = f"qdisc add dev eth0 root handle 1: netem delay {self.delay_s * 1e6:.0f}us limit 100000"
        first, *others = self._hosts.values()
        if not self._configure(first, "tc", [row]):
            self._netem = True
            for host in others:
                self._must(host, "tc", [row])
            return
        ports = self._ports().values()
        self._must(self._holder, "ip", [f"link set {port} nomaster" for port in ports])
        relay = [sys.executable, "-I", "-S", str(Path(virtual_host.__file__).with_name("virtual_relay.py"))]
        # In the holder's processes too: it ends with them.
        words = self._enter(self._holder, ("net", "pid"), [*relay, str(self.delay_s), *ports])
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._processes.append(process)
        assert process.stdout and process.stderr
        if not process.stdout.readline():
            raise RunError(f"a virtual cluster's relay did not start: {process.stderr.read().decode().strip()}")

    # ------------------------------------------------------------------------------------------------- using it

    def command(
        self, name: str, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | Path | None = None
    ) -> list[str]:
        """The command that runs ``words`` on host ``name``, from outside the cluster; it ends with the status of ``words``.

        It passes SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 on; SIGINT is for the whole process group, as a terminal sends it. If it
        is killed, so is what it has started.

        Args:
            name: the host.
            words: program and arguments; the program is looked for on this process's PATH.
            env: variables to set besides the environment that it is started with.
            cwd: where it starts; by default in the current folder.
        """
        given = self.environment | dict(env or {})
        words = [*(["env", *(f"{key}={value}" for key, value in given.items())] if given else []), *words]
        return self._enter(self._host(name), _HOST_KINDS, words, Path(cwd or Path.cwd()).absolute(), as_oneself=True)

    def popen(
        self, name: str, words: Sequence[str], env: Mapping[str, str] | None = None, cwd: str | Path | None = None, **keywords: Any
    ) -> subprocess.Popen[Any]:
        """Starts ``command(…)`` in a session of its own; ``keywords`` are those of ``subprocess.Popen``."""
        return subprocess.Popen(self.command(name, words, env, cwd), **{"start_new_session": True, **keywords})

    def run(
        self,
        words: Sequence[str],
        on: str | Sequence[str] | None = None,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> dict[str, subprocess.CompletedProcess[str]]:
        """Runs ``words`` on hosts at the same time, to their end.

        Args:
            words: the command; ``filled_in`` for each host.
            on: a host or several; all by default.
            timeout: seconds; who still runs then is killed, and ``subprocess.TimeoutExpired`` raised.
            env: variables to set.
            cwd: where it starts.

        Returns:
            Host → what ended, with text.
        """
        names = [on] if isinstance(on, str) else list(on or self.names)
        until = time.monotonic() + timeout
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = {name: self.popen(name, self.filled_in(name, words), env, cwd, **pipes) for name in names}
        ended = {}
        try:
            for name, process in started.items():
                out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
                ended[name] = subprocess.CompletedProcess(list(words), process.returncode, out, err)
        finally:
            for process in started.values():
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
        return ended

    def filled_in(self, name: str, words: Sequence[str]) -> list[str]:
        """``words`` with host ``name``'s {rank} (0, 1, …), {name}, {addr} and {master} (the first host's name) in their places."""
        facts = {"rank": str(self.names.index(name)), "name": name, "addr": self.addresses[name], "master": self.names[0]}
        return [re.sub(r"\{(rank|name|addr|master)\}", lambda found: facts[found[1]], word) for word in words]

    def _host(self, name: str) -> _Born:
        if name not in self._hosts:
            raise UsageError(f"{name}: no such host in this cluster; it has {', '.join(self.names)}")
        return self._hosts[name]

    # -------------------------------------------------------------------------------------------- disturbing it

    def cut(self, name: str) -> None:
        """Pulls host ``name``'s cable: what it sends, and what is sent to it, is lost; nobody is told."""
        assert self._holder and self._host(name)
        self._must(self._holder, "ip", [f"link set {self._ports()[name]} down"])

    def heal(self, name: str) -> None:
        """Puts host ``name``'s cable back."""
        assert self._holder and self._host(name)
        self._must(self._holder, "ip", [f"link set {self._ports()[name]} up"])

    def kill(self, name: str) -> None:
        """Ends all processes of host ``name`` at once, as if its power had failed; its network is gone too."""
        born = self._host(name)
        os.kill(born.pid, signal.SIGKILL)
        born.process.wait(_START_S)

    def set_rate(self, rate: str | None) -> None:
        """Limits every host's link to ``rate``, each way; None: no limit.

        Raises:
            UsageError: ``rate`` is none.
            RunError: the kernel has no token bucket filter (tc-tbf(8)).
        """
        assert self._holder
        place = "parent 1: handle 2:" if self._netem else "root"
        for name, port in self._ports().items():
            for where, device, at in ((self._hosts[name], "eth0", place), (self._holder, port, "root")):
                if rate:
                    bits = bits_per_second(rate)
                    burst = max(65536 if bits >= 5e7 else 32768, round(bits / 8 * 0.002))
                    self._must(where, "tc", [f"qdisc replace dev {device} {at} tbf rate {bits:.0f}bit burst {burst} latency 100ms"])
                elif self._rate:
                    self._must(where, "tc", [f"qdisc delete dev {device} {at}"])
        self._rate = rate

    def close(self) -> None:
        """Ends everything on all hosts, and the hosts."""
        if self._slurm:
            with suppress(OSError, subprocess.SubprocessError):
                self._slurm.stop()
            self._slurm = None
        if self._holder:
            with suppress(ProcessLookupError):
                os.kill(self._holder.pid, signal.SIGKILL)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_START_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
        self._holder, self._hosts, self._processes = None, {}, []
