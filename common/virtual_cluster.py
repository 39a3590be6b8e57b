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

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import virtual_host, virtual_slurm
from common.command_line import Parser, underscored
from common.errors import UsageError, complain, exit_status
from common.namespaces import PROGRAM, START_S, Space, environment, last_line, program, unshare
from common.prefixed import run_prefixed
from common.values import whole
from common.virtual_network import NETWORK, Network, bits_per_second, seconds

MOST = 200


def missing(ssh: bool = False, slurm: bool = False) -> str:
    """What this machine lacks for a cluster, in one line; "" if nothing."""
    others = "everything on one node works without; see python -m common.doctor"
    if sys.platform != "linux":
        return f"a virtual cluster is made of Linux namespaces, this is {sys.platform}; {others}"
    packages = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"} | ({"sshd": "openssh-server"} if ssh else {})
    if ssh:
        packages |= {"ssh": "openssh-client", "ssh-keygen": "openssh-client"}
    if slurm:
        packages |= virtual_slurm.PACKAGES
    if lacking := sorted({package for tool, package in packages.items() if not program(tool)}):
        return f"a virtual cluster needs {', '.join(lacking)}: apt install {' '.join(lacking)}"
    probe = [*unshare(), "ip", "link", "add", "probe", "type", "bridge"]
    ended = subprocess.run(probe, capture_output=True, text=True, timeout=START_S, env=environment())
    if ended.returncode:
        why = last_line(ended.stderr)
        who = "root" if os.geteuid() == 0 else "an ordinary user"
        return (
            f"a virtual cluster needs namespaces, which {who} cannot make here ({why}); "
            + ("start this container with --privileged" if os.geteuid() == 0 else "use sudo, or allow user namespaces (sysctl "
               "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0)") + f"; {others}"
        )  # fmt: skip
    return ""


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


def shares(names: Sequence[str], cores: int | None = None) -> dict[str, set[int]]:
    """Host → the cores of this machine that it may use, dealt out in turn.

    Raises:
        UsageError: a host cannot have so many.
    """
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    each = cores or max(1, len(usable) // len(names))
    if each > len(usable):
        raise UsageError(f"--cores {cores}: not allowed; this machine has {len(usable)} for each host to share")
    return {name: {usable[(k * each + i) % len(usable)] for i in range(each)} for k, name in enumerate(names)}


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
        cores: int | None = None,
    ) -> None:
        """Describes the cluster; ``__enter__`` makes it.

        Args:
            nodes: number of hosts, 1 to 200.
            names: theirs; node1, node2, … by default.
            rate: of each host's link, both ways, such as ``100mbit`` or ``1gbit``; unlimited by default.
            delay: of a frame from one host to another, such as ``2ms``; a round trip takes twice that.
            ssh: start an sshd on each host that lets in who holds the cluster's own key.
            slurm: start SLURM: a controller on the first host, and each host's daemon.
            cores: that each host may use; by default its even share of this process's, at least one. Beyond what is there hosts
                share cores.

        Raises:
            UsageError: a value that is not allowed.
        """
        self.names = _names(nodes, names)
        self.addresses = {name: f"{NETWORK}{k}" for k, name in enumerate(self.names, 1)}
        self._rate, self.delay_s = rate, seconds(delay) if delay else 0.0
        if rate:
            bits_per_second(rate)
        self._wants = {"ssh": ssh, "slurm": slurm}
        self.cores = shares(self.names, cores)
        self._holder: Space | None = None
        self._hosts: dict[str, Space] = {}
        self._spaces: list[Space] = []
        self._network: Network | None = None
        self._slurm: virtual_slurm.Slurm | None = None
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
        self._holder = Space([*unshare(), *PROGRAM, "hold"])
        self._spaces.append(self._holder)
        (self.folder / "hosts").write_text(self._hosts_file())
        (self.folder / "nsswitch.conf").write_text(_names_from_files())
        if self._wants["ssh"]:
            from common.virtual_ssh import write_files

            write_files(self)
        for name in self.names:
            for file in ("hosts", "nsswitch.conf", "ssh_config"):
                if (self.folder / file).exists():
                    shutil.copy(self.folder / file, self.folder / f"{name}.{file}")
            self._hosts[name] = self._holder.inner("host", name)
            self._spaces.append(self._hosts[name])
            # Commands get the cores of the host that they are started on: so training takes its share of threads.
            os.sched_setaffinity(self._hosts[name].pid, self.cores[name])
        self._network = Network(self._holder, self._hosts, self.delay_s)
        if self._network.relay:
            self._spaces.append(self._network.relay)
        self.set_rate(self._rate)
        if self._wants["ssh"]:
            from common.virtual_ssh import start_daemons

            start_daemons(self)
        if self._wants["slurm"]:
            self._slurm = virtual_slurm.Slurm(self)
            self._slurm.start()
            self.environment |= self._slurm.environment

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
        return self._host(name).command(words, Path(cwd or Path.cwd()).absolute())

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

    def _host(self, name: str) -> Space:
        if name not in self._hosts:
            raise UsageError(f"{name}: no such host in this cluster; it has {', '.join(self.names)}")
        return self._hosts[name]

    # -------------------------------------------------------------------------------------------- disturbing it

    def cut(self, name: str) -> None:
        """Pulls host ``name``'s cable: what it sends, and what is sent to it, is lost; nobody is told."""
        self._host(name)
        assert self._network
        self._network.plug(name, into=False)

    def heal(self, name: str) -> None:
        """Puts host ``name``'s cable back."""
        self._host(name)
        assert self._network
        self._network.plug(name, into=True)

    def kill(self, name: str) -> None:
        """Ends all processes of host ``name`` at once, as if its power had failed; its network is gone too."""
        born = self._host(name)
        os.kill(born.pid, signal.SIGKILL)
        born.process.wait(START_S)

    def set_rate(self, rate: str | None) -> None:
        """Limits every host's link to ``rate``, each way; None: no limit.

        Raises:
            UsageError: ``rate`` is none.
            RunError: the kernel has no token bucket filter (tc-tbf(8)).
        """
        assert self._network
        self._network.set_rate(rate)

    def close(self) -> None:
        """Ends everything on all hosts, and the hosts."""
        if self._slurm:
            with suppress(OSError, subprocess.SubprocessError):
                self._slurm.stop()
            self._slurm = None
        if self._holder:
            with suppress(ProcessLookupError):
                os.kill(self._holder.pid, signal.SIGKILL)
        for space in self._spaces:
            space.close()
        self._holder, self._hosts, self._spaces = None, {}, []


# ------------------------------------------------------------------------------------------------- the command line


def _parse(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """(flags, the command after ``--``)."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(
        prog="python -m common.virtual_cluster",
        usage="%(prog)s [flags] [-- COMMAND]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="COMMAND runs on each host, with {rank} (0, 1, …), {name}, {addr} and {master} (the first host's name) filled in;\n"
        "a single word with spaces is given to a shell. Without it a shell opens on the first host. The exit status is the\n"
        "worst host's.",
    )
    parser.add_argument("--nodes", metavar="N", default="2", help="hosts (default: 2)")
    parser.add_argument("--names", metavar="NAME", nargs="+", help="their names (default: node1 node2 …)")
    parser.add_argument("--rate", metavar="RATE", help="of each host's link, both ways: 100mbit, 1gbit (default: unlimited)")
    parser.add_argument("--delay", metavar="TIME", help="from one host to another: 2ms, 500us; a round trip takes twice that")
    parser.add_argument("--cores", metavar="N", help="that each host may use (default: its share of this machine's)")
    parser.add_argument("--ssh", action="store_true", help="an sshd on each host; a shell without COMMAND has it anyway")
    parser.add_argument("--slurm", action="store_true", help="SLURM on all hosts, its controller on the first")
    flags = parser.parse_args(underscored(argv[:cut]))
    for name in ("nodes", "cores"):
        try:
            setattr(flags, name, whole(1)(given) if (given := getattr(flags, name)) else None)
        except ValueError as allowed:
            raise UsageError(f"--{name} {given}: not allowed; give {allowed}") from None
    flags.names = [name for word in flags.names or () for name in word.split(",")] or None
    if flags.names and "--nodes" not in " ".join(argv[:cut]).replace("=", " ").split():
        flags.nodes = len(flags.names)
    return flags, list(argv[cut + 1 :])


def _shell(cluster: VirtualCluster, ssh: bool) -> int:
    """A shell on the first host, until it ends."""
    first, *others = cluster.names
    rows = "\n".join(f"  {address:12} {name}" for name, address in cluster.addresses.items())
    reach = f"ssh {others[0]} reaches another; " if ssh and others else ""
    complain(f"A cluster of {len(cluster.names)}:\n{rows}\nThis shell is on {first}; {reach}exit ends the cluster.")
    signal.signal(signal.SIGINT, lambda *_: None)  # the shell's to hear
    return subprocess.call(cluster.command(first, [os.environ.get("SHELL") or "/bin/sh"]))


def main() -> int:
    """Makes a cluster, runs the command on its hosts, takes it down."""
    flags, words = _parse(sys.argv[1:])
    ssh = flags.ssh or not (words or missing(ssh=True))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with VirtualCluster(flags.nodes, flags.names, flags.rate, flags.delay, ssh, flags.slurm, flags.cores) as cluster:
        if not words:
            return _shell(cluster, ssh)
        if len(words) == 1 and " " in words[0]:
            words = ["sh", "-c", words[0]]
        commands = {name: cluster.command(name, cluster.filled_in(name, words)) for name in cluster.names}
        return max(128 - status if status < 0 else status for status in run_prefixed(commands).values())


if __name__ == "__main__":
    sys.exit(exit_status(main))
