"""The flags of ``launchers/ssh.py`` beyond the training ones, and which hosts and folders they mean."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.command_line import Parser, underscored
from common.config import FIELDS, RANKS
from common.errors import UsageError
from common.host_checks import Place
from common.hosts import Host, hosts_from, read_hosts
from common.values import positive, whole

ROOT = Path(__file__).resolve().parents[1]
HOSTS_FILE = "hosts.txt"
LOST_AFTER = "10"
TRAVELS = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "MKL_", "KMP_")  # variables of these go to the hosts with the training flags'
SINGLE, MULTI = "single-node", "multi-node"


@dataclass(frozen=True)
class SshFlags:
    """What was asked for."""

    hosts: list[Host]
    """None: one node, this one, without ssh."""
    slots: list[int | None]
    """Ranks for each; None: its GPUs, or one."""
    port: int | None
    place: Place
    export: list[str]
    ssh_timeout: float
    lost_after: float
    """Seconds without a word from the other side until a connection counts as lost, here and there."""
    print_only: bool
    no_checks: bool
    here: int | None
    """The node to start on this machine, without ssh; None: all."""

    @property
    def single(self) -> bool:
        """Whether all ranks run on this machine, which needs no ssh."""
        return not self.hosts


def _parser() -> Parser:
    parser = Parser(prog="ssh.py", usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110)
    group = parser.add_argument_group("hosts")
    add = group.add_argument
    add("--hosts", metavar="FILE", help=f"one host a line, the first is the master (default: {HOSTS_FILE}); see hosts.example.txt")
    add("--mode", metavar="MODE", help=f"{MULTI}: the hosts of the file (default); {SINGLE}: this machine, without ssh")
    add("--gpus", metavar="N", help=f"ranks on this machine (--mode {SINGLE}); on CPU, too")
    add("--master_node", metavar="HOST", help="the master, instead of a file: name, user@name or name:SLOTS")
    add("--worker_nodes", metavar="HOST", nargs="+", help="the other hosts")
    add("--gpus_per_node", metavar="N", help="ranks on each host whose slots are not given (default: its GPUs, or 1)")
    add("--port", metavar="N", help="where the ranks meet on the master (default: 29500, or a free one if that is taken)")
    add("--remote_dir", metavar="DIR", help="the project's folder there (default: the same as here)")
    add("--remote_python", metavar="FILE", help="the Python there (default: the same path as this one)")
    add("--ssh", metavar="COMMAND", help="ssh with options of your own: --ssh 'ssh -F FILE -i KEY' (default: ssh)")
    add(
        "--export",
        metavar="NAME",
        nargs="+",
        help=f"further variables to set there (training flags' and {'*, '.join(TRAVELS)}* are)",
    )
    add("--ssh_timeout", metavar="S", help="seconds for the look at each host (default: 20)")
    add(
        "--lost_after",
        metavar="S",
        help=f"seconds without a word until a connection counts as lost, and ends the run (default: {LOST_AFTER})",
    )
    add("--no_checks", action="store_true", help="start without looking at the hosts first")
    add("--print", action="store_true", help="show the command of each host, to be typed there; start nothing")
    add("--here", metavar="NODE", help="start this host's part only, without ssh: master, worker or the node's number")
    return parser


def help_text() -> str:
    """The section of ``--help``."""
    return "hosts:" + _parser().format_help().partition("hosts:")[2].rstrip()


def _number(name: str, text: str | None, least: int = 1, most: int | None = None) -> int | None:
    try:
        return None if text is None else whole(least, most)(text)
    except ValueError as allowed:
        raise UsageError(f"--{name} {text}: not allowed; give {allowed}") from None


def _seconds(name: str, text: str) -> float:
    try:
        return positive(text)
    except ValueError as allowed:
        raise UsageError(f"--{name} {text}: not allowed; give {allowed}") from None


def parse_ssh_flags(argv: Sequence[str] | None = None) -> tuple[SshFlags, list[str]]:
    """(what they mean, the other flags as they are).

    Raises:
        UsageError: a value that is not allowed, flags that contradict each other, or a hosts file with nonsense in it.
    """
    given, rest = _parser().parse_known_args(underscored(sys.argv[1:] if argv is None else argv))
    gpus, per_node = _number("gpus", given.gpus), _number("gpus_per_node", given.gpus_per_node)
    named = [flag for flag in ("hosts", "master_node", "worker_nodes") if getattr(given, flag)]
    mode = given.mode or (SINGLE if gpus and not named else MULTI)
    if mode not in (SINGLE, MULTI):
        raise UsageError(f"--mode {mode}: not allowed; give {SINGLE} or {MULTI}")
    hosts = [] if mode == SINGLE or any(word in ("-h", "--help") for word in rest) else _hosts(given, gpus)
    if mode == SINGLE and (given.here or named or per_node):
        flag = "here" if given.here else named[0] if named else "gpus_per_node"
        raise UsageError(f"--{flag} with --mode {SINGLE}: that is this machine alone; give --mode {MULTI}, or --gpus N")
    slots = [host.slots or per_node for host in hosts] if hosts else [gpus]
    flags = SshFlags(
        hosts,
        slots,
        _number("port", given.port, most=65535),
        _place(given, bool(hosts) and given.here is None),
        given.export or [],
        _seconds("ssh_timeout", given.ssh_timeout or "20"),
        _seconds("lost_after", given.lost_after or LOST_AFTER),
        given.print,
        given.no_checks,
        _here(given.here, hosts) if given.here else None,
    )
    return flags, rest


def _hosts(given: argparse.Namespace, gpus: int | None) -> list[Host]:
    if gpus:
        raise UsageError(f"--gpus {gpus} with --mode {MULTI}: it counts this machine's ranks; give --gpus_per_node {gpus}")
    if given.hosts and (given.master_node or given.worker_nodes):
        raise UsageError("--hosts with --master_node or --worker_nodes: both name the hosts; give one of them")
    if given.worker_nodes and not given.master_node:
        raise UsageError("--worker_nodes without --master_node: name the host where the ranks meet, too")
    if given.master_node:
        words = [given.master_node, *(word for words in given.worker_nodes or () for word in words.split(","))]
        return hosts_from(words, "--master_node, --worker_nodes")
    if not given.hosts and not Path(HOSTS_FILE).exists():
        raise UsageError(
            f"no hosts: write them into {HOSTS_FILE} (hosts.example.txt shows how), name a file with --hosts, or give "
            f"--master_node and --worker_nodes; --mode {SINGLE} --gpus N trains on this machine"
        )
    return read_hosts(given.hosts or HOSTS_FILE)


def _place(given: argparse.Namespace, remote: bool) -> Place:
    """The same folders there as here, unless ``--remote_dir`` says otherwise."""
    root, folder = Path(given.remote_dir) if given.remote_dir and remote else ROOT, Path.cwd()
    if not root.is_absolute():
        raise UsageError(f"--remote_dir {given.remote_dir}: not allowed; give the whole path, from / on")
    if folder.is_relative_to(ROOT):
        folder = root / folder.relative_to(ROOT)
    try:
        ssh = shlex.split(given.ssh or "ssh")
    except ValueError as error:
        raise UsageError(f"--ssh {given.ssh}: {error}; write it as in a shell") from None
    python = given.remote_python if given.remote_python and remote else sys.executable
    interval = max(1, round(_seconds("lost_after", given.lost_after or LOST_AFTER) / 3))
    return Place(str(root), str(folder), python, [*(ssh or ["ssh"]), "-o", f"ServerAliveInterval={interval}"])


def _here(text: str, hosts: Sequence[Host]) -> int:
    """The number of the node that this machine is."""
    if text == "master":
        return 0
    if text == "worker":
        from common.interfaces import is_own

        own = [number for number, host in enumerate(hosts) if number and is_own(host.name)]
        if not own and len(hosts) == 2:
            return 1
        if len(own) != 1:
            names = ", ".join(f"{number}: {host.name}" for number, host in enumerate(hosts))
            raise UsageError(f"--here worker: {len(own) or 'none'} of the hosts is this machine; give its number ({names})")
        return own[0]
    number = _number("here", text, 0, len(hosts) - 1)
    assert number is not None
    return number


def variables(flags: SshFlags, environment: Mapping[str, str]) -> dict[str, str]:
    """What is set on the hosts: the training flags' variables of ``environment``, and those that steer torch and its libraries.

    Raises:
        UsageError: ``--export`` names a variable that is not set.
    """
    training = {name.upper() for name, spec in FIELDS.items() if spec.metadata["group"] != RANKS}
    found = {name: value for name, value in environment.items() if value and name in training}
    found |= {name: value for name, value in os.environ.items() if name.startswith(TRAVELS)}
    for name in flags.export:
        if name not in environment:
            raise UsageError(f"--export {name}: no such variable here; set it, or leave it out")
        found[name] = environment[name]
    return dict(sorted(found.items()))
