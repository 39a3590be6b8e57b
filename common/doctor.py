"""What is wrong with this machine, or with several, and the line that mends it.

python -m common.doctor                          this machine
python -m common.doctor --for mpi                what one way of launching needs: torchrun, mpi, slurm, ssh or docker
python -m common.doctor --hosts hosts.txt        every host of the file, and the network between them
python -m common.doctor --json                   the same for programs
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.command_line import Parser, underscored
from common.doctor_machine import (
    REPOSITORY,
    backends,
    cores,
    gpus,
    leftovers,
    open_files,
    orphans,
    packages,
    shared_memory,
    threads,
)
from common.doctor_mpi import mpi
from common.doctor_network import firewall, host_name, interface, port
from common.doctor_ranks import all_reduce
from common.doctor_rows import FINDING, OK, PURPOSES, UNCHECKED, Row, Subject, ask, finding, ok, unchecked
from common.doctor_tools import docker, slurm, ssh, torchrun
from common.errors import UsageError, exit_status, one_line
from common.files import json_text

WIDTH = 100
CHECKS: dict[str, Callable[[Subject], Row]] = {
    "versions": packages,
    "backends": backends,
    "gpus": gpus,
    "torchrun": torchrun,
    "mpi": mpi,
    "ssh": ssh,
    "slurm": slurm,
    "docker": docker,
    "variables": leftovers,
    "port": port,
    "host name": host_name,
    "interface": interface,
    "firewall": firewall,
    "/dev/shm": shared_memory,
    "open files": open_files,
    "cores": cores,
    "threads": threads,
    "orphans": orphans,
    "all-reduce": lambda subject: all_reduce(subject, str(REPOSITORY)),
}
# What a way of launching does not need is left out when it is asked for.
_TOOLS = {"torchrun", "mpi", "ssh", "slurm", "docker"}


def _parser() -> Parser:
    parser = Parser(prog="python -m common.doctor", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--hosts", metavar="FILE", help="check every host of this file too, and the network between them")
    parser.add_argument("--for", dest="purpose", choices=PURPOSES, help="what this way of launching needs")
    parser.add_argument("--nproc_per_node", type=int, metavar="N",
                        help="ranks that are meant on each machine (default: its GPUs, else 2; 1 on hosts)")  # fmt: skip
    parser.add_argument("--remote_dir", metavar="PATH", help="LaunchLab's folder there; {name}: the host's (default: as here)")
    parser.add_argument("--remote_python", metavar="PATH", help="the Python on the hosts (default: as here, below --remote_dir)")
    parser.add_argument("--ssh", metavar="COMMAND", default="ssh", help="ssh with options of your own")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"these checks only: {', '.join(CHECKS)}")
    parser.add_argument("--several", action="store_true", help=argparse.SUPPRESS)  # on a host, from the doctor of another
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _subject(purpose: str | None, several: bool, ranks: int | None) -> tuple[Subject, Row]:
    """Whom to look at, and the row of ``.env``."""
    from common.command_line import settings

    environment, row = dict(os.environ), ok("settings", "no .env in this folder")
    try:
        environment = settings()
        if os.path.isfile(".env"):
            row = ok("settings", ".env is read: flags win over the environment, and that over it")
    except UsageError as error:
        row = finding("settings", str(error), "${EDITOR:-nano} .env")
    except ImportError:
        row = finding(
            "settings",
            "there is a .env, and python-dotenv, which reads it, is missing",
            f"{sys.executable} -m pip install python-dotenv",
        )
    program = ["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "common.torch_facts"]
    answer = ask(program, env=environment)
    try:
        found = json.loads(answer.out.splitlines()[-1])
    except (ValueError, IndexError):
        found = {"python": sys.version.split()[0], "torch_error": answer.last_line}
    given = environment.get("NPROC_PER_NODE", "")
    counted = int(given) if given.isascii() and given.isdigit() else 0
    ranks = ranks or counted or len(found.get("gpus", ())) or (1 if several else 2)
    return Subject(environment, purpose, ranks, several, found), row


def _checked(name: str, check: Callable[[Subject], Row], subject: Subject) -> Row:
    try:
        return check(subject)
    except Exception as error:  # a check that fails tells so in its row: the others are still wanted
        return unchecked(name, f"the check itself failed ({one_line(error)})")


def wanted(purpose: str | None, only: Iterable[str]) -> list[str]:
    """The names of the checks: ``only`` these, else all but what ``purpose`` does not need."""
    only = set(only)
    return [name for name in CHECKS if (name in only if only else not (purpose and name in _TOOLS - {purpose}))]


def examine(purpose: str | None, several: bool, ranks: int | None, only: Iterable[str]) -> tuple[list[Row], Subject]:
    """All checks of this machine, side by side; rows in the order of ``CHECKS``."""
    subject, row = _subject(purpose, several, ranks)
    only = set(only)
    names = wanted(purpose, only)
    with ThreadPoolExecutor(len(names) + 1) as pool:
        # By itself: it is a measurement, which the others' programs would disturb.
        quick = {name: pool.submit(_checked, name, CHECKS[name], subject) for name in names if name != "all-reduce"}
        rows = {name: waiting.result() for name, waiting in quick.items()}
    if "all-reduce" in names:
        rows["all-reduce"] = _checked("all-reduce", CHECKS["all-reduce"], subject)
    return [*([] if only and "settings" not in only else [row]), *rows.values()], subject


# --------------------------------------------------------------------------------------------- what a person sees


def _counted(rows: Sequence[Row]) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in (FINDING, OK, UNCHECKED)}
    findings = counts[FINDING]
    return f"{findings or 'no'} finding{'s' * (findings != 1)}, {counts[OK]} ok, {counts[UNCHECKED]} not checked"


def shown(rows: Sequence[Row], width: int, colour: bool) -> str:
    """The rows as text: findings last, each with the line that mends it, which is never broken."""
    paint = {OK: "\033[32m", FINDING: "\033[1;31m", UNCHECKED: "\033[2m"} if colour else {}
    names = [f"{row.host}: {row.check}" if row.host else row.check for row in rows]
    widest = min(30, max(map(len, names), default=0))
    indent = len(UNCHECKED) + 2 + widest + 2
    lines = []
    for row, name in sorted(zip(rows, names, strict=True), key=lambda pair: pair[0].state == FINDING):
        state = f"{paint.get(row.state, '')}{row.state:<{len(UNCHECKED)}}{paint and chr(27) + '[0m' or ''}"
        text = textwrap.wrap(row.found, max(30, width - indent), break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{state}  {name:<{widest}}  {text[0]}", *(" " * indent + more for more in text[1:])]
        if row.mend:
            lines.append(" " * indent + row.mend)
    return "\n".join(lines)


def report(rows: Sequence[Row], subject: Subject, as_json: bool) -> int:
    """Prints the rows; returns the exit status."""
    status = int(any(row.state == FINDING for row in rows))
    if as_json:
        machine = {name: subject.torch.get(name) for name in ("python", "torch", "numpy", "mpi4py", "cuda", "nccl", "executable")}
        told: dict[str, Any] = {
            "host": socket.gethostname(),
            "time": time.time(),
            "for": subject.purpose,
            "nproc_per_node": subject.ranks,
            "findings": sum(row.state == FINDING for row in rows),
            "machine": machine,
            "rows": [row.as_json() for row in rows],
        }
        sys.stdout.write(json_text(told))
    else:
        terminal = sys.stdout.isatty()
        width = min(WIDTH, shutil.get_terminal_size().columns) if terminal else WIDTH
        colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        sys.stdout.write(f"{shown(rows, width, colour)}\n\n{socket.gethostname()}: {_counted(rows)}\n")
    sys.stdout.flush()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Examines and reports: 0 without findings, 1 with.

    Raises:
        UsageError: bad flags, or a bad hosts file.
    """
    given = _parser().parse_args(underscored(sys.argv[1:] if argv is None else argv))
    if unknown := sorted(set(given.only or ()) - {*CHECKS, "settings"}):
        raise UsageError(f"--only {unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    if given.nproc_per_node is not None and given.nproc_per_node < 1:
        raise UsageError(f"--nproc_per_node {given.nproc_per_node}: not allowed; give a whole number, 1 or more")
    several = bool(given.hosts) or given.several or given.purpose in ("ssh", "slurm")
    hosts = None
    if given.hosts:
        from common.doctor_hosts import Party

        folder = given.remote_dir or str(REPOSITORY)
        python = given.remote_python or sys.executable.replace(f"{REPOSITORY}/", f"{folder}/")
        hosts = Party(given.hosts, python, folder, given.purpose, shlex.split(given.ssh), given.nproc_per_node)
    rows, subject = examine(given.purpose, several, given.nproc_per_node, given.only or ())
    if hosts:
        try:
            rows += hosts.rows(subject)
        except Exception as error:  # what this machine's own checks found is still wanted
            rows.append(unchecked("hosts", f"the check itself failed ({one_line(error)})"))
    elif not given.only:
        rows += [unchecked(name, "it takes several hosts: give --hosts hosts.txt") for name in ("clock", "reachability")]
    return report(rows, subject, given.json)


if __name__ == "__main__":
    sys.exit(exit_status(main))
