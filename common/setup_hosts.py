"""``./setup.sh --multi-node``: the commit that is checked out here, and an environment for it, on every host of a file.

    python -m common.setup_hosts --hosts hosts.txt

Looks at all hosts, copies the commit to those that lack it (a git bundle through ssh), makes .venv there (``make``), and has the
doctor look at all of it. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import doctor
from common.children import in_words
from common.command_line import Parser, underscored
from common.doctor_machine import REPOSITORY, commit
from common.doctor_rows import Answer, ask
from common.errors import RunError, UsageError, exit_status
from common.hosts import Host, read_hosts
from common.prefixed import run_prefixed
from common.values import seconds

LOOK_S = 30.0
COPY_S = 600.0
BUILD_S = 3600.0
TRAVEL = ("TORCH_INDEX", "PYTHON")  # variables that the hosts get too, and all of pip's
# What a folder on a host is: this very one, a copy with its commit, something else, or nothing; and what git thinks of it.
STATE = """
cd {folder} 2>/dev/null || {{ echo absent; exit; }}
[ -e {token} ] && {{ echo here; exit; }}
command -v git >/dev/null || {{ echo no git; exit; }}
if [ -e .git ]; then
  git rev-parse -q --verify HEAD || echo empty
  git status --porcelain --untracked-files=no | head -3
elif [ -n "$(ls -A)" ]; then echo foreign; else echo absent; fi
"""
UNPACK = """
set -e
command -v git >/dev/null || {{ echo "git is not installed: sudo apt install git" >&2; exit 1; }}
mkdir -p {folder} && cd {folder}
trap 'rm -f .launchlab.bundle' EXIT
cat > .launchlab.bundle
git init -q . && git fetch -q .launchlab.bundle HEAD
git -c advice.detachedHead=false checkout -q --detach FETCH_HEAD
"""


class Setup:
    """The hosts, and where LaunchLab is to be on them."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Reads the hosts file.

        Raises:
            UsageError: it cannot be read, or a flag is not allowed.
        """
        self.path, self.python = given.hosts, given.remote_python
        self.hosts = read_hosts(given.hosts)
        self.folder = given.remote_dir or str(REPOSITORY)
        self.ssh = shlex.split(given.ssh)
        try:
            self.limit = seconds(given.limit)
        except ValueError as allowed:
            raise UsageError(f"--limit {given.limit}: not allowed; give {allowed}") from None
        if not self.folder.startswith("/"):
            raise UsageError(f"--remote_dir {self.folder}: give the whole path, from / on")
        if (self.python or "/").startswith("~") or self.folder.startswith("~"):
            raise UsageError("--remote_dir, --remote_python: write the path out, without ~")

    def there(self, host: Host) -> str:
        """LaunchLab's folder on ``host``."""
        return self.folder.replace("{name}", host.name)

    def on(self, host: Host, script: str) -> list[str]:
        """The command that runs a shell script on ``host``."""
        return host.ssh(f"sh -c {shlex.quote(script)}", self.ssh)

    def each(self, work: Callable[[Host], Any], hosts: Sequence[Host]) -> dict[Host, Any]:
        """``work`` for all, side by side."""
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return dict(zip(hosts, pool.map(work, hosts), strict=True))

    def look(self, wanted: str, again: bool = False) -> list[Host]:
        """The hosts that lack commit ``wanted``. ``again``: only troubles are told.

        Raises:
            RunError: a host cannot be reached, or its folder is not ours to write to.
        """
        # Whoever sees it has this very folder, over a network file system.
        token = REPOSITORY / f".setup-{secrets.token_hex(8)}.part"
        token.touch()
        try:
            scripts = {h: STATE.format(folder=shlex.quote(self.there(h)), token=token.name) for h in self.hosts}
            answers = self.each(lambda host: ask(self.on(host, scripts[host]), LOOK_S), self.hosts)
        finally:
            token.unlink()
        lack, troubles = [], []
        for host, answer in answers.items():
            told, trouble = self._state(host, answer, wanted)
            if trouble or not again:
                say(host, trouble or told)
            troubles += [host.label] if trouble else []
            lack += [host] if told.startswith("to be copied") and not trouble else []
        if troubles:
            raise RunError(f"setup: nothing was changed on any host; mend {', '.join(troubles)} first (above), then type it again")
        return lack

    def _state(self, host: Host, answer: Answer, wanted: str) -> tuple[str, str]:
        """(what is to be done, what is in the way)."""
        lines, folder = answer.out.strip().splitlines(), self.there(host)
        if answer.status != 0 or not lines:
            return "", f"ssh does not lead there: {answer.why or answer.last_line}; try: ssh {host.name} true"
        if lines[0] == "here":
            return f"{folder} is this very folder", ""
        if lines[0] == "no git":
            return "", "git is not installed there: sudo apt install git"
        if lines[0] == "foreign":
            return "", f"{folder} is there and is no copy of LaunchLab; name another folder with --remote_dir"
        if lines[0] == wanted:
            return f"{folder} has commit {wanted[:10]}" + (" (with changes of its own)" if len(lines) > 1 else ""), ""
        if len(lines) > 1 and lines[0] not in ("absent", "empty"):
            return "", f"{folder} has changes that are not committed ({lines[1].strip()}); commit or take them back there"
        return f"to be copied: {folder} {'is not there' if lines[0] in ('absent', 'empty') else f'has commit {lines[0][:10]}'}", ""

    def copy(self, hosts: Sequence[Host], wanted: str) -> None:
        """Brings the commit to ``hosts``.

        Raises:
            RunError: it did not arrive on one of them.
        """
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder, "commit.bundle")
            make = ["git", "bundle", "create", "-q", str(bundle), "HEAD"]
            subprocess.run(make, cwd=REPOSITORY, check=True, timeout=COPY_S, capture_output=True)

            def send(host: Host) -> str:
                words = self.on(host, UNPACK.format(folder=shlex.quote(self.there(host))))
                with bundle.open("rb") as stream:
                    try:
                        sent = subprocess.run(words, stdin=stream, capture_output=True, text=True, timeout=COPY_S)
                    except subprocess.TimeoutExpired:
                        return f"not copied within {COPY_S:g} s"
                return (sent.stderr.strip().splitlines() or ["no reason given"])[-1] if sent.returncode else ""

            failed = {host: why for host, why in self.each(send, hosts).items() if why}
        for host in hosts:
            say(host, f"commit {wanted[:10]} not copied: {failed[host]}" if host in failed else f"commit {wanted[:10]} copied")
        if failed:
            raise RunError(f"setup: the commit did not arrive on {', '.join(host.label for host in failed)}")

    def build(self, environment: Mapping[str, str]) -> None:
        """Makes .venv on all hosts, their output prefixed.

        Raises:
            RunError: it was not made on one of them within the time limit.
        """
        travel = {name: value for name, value in environment.items() if (name in TRAVEL or name.startswith("PIP_")) and value}
        travel.pop("PIP_CERT", None)  # a path of this machine
        make = shlex.join(["env", *(f"{name}={value}" for name, value in travel.items()), "timeout", "--kill-after=10",
                           f"{self.limit:g}", "make", ".venv/.ready"])  # fmt: skip
        # Hosts may share the folder: then one makes it, and the others find it made.
        script = f"command -v flock >/dev/null && exec flock .venv.lock {make}; exec {make}"
        commands = {host.label: self.on(host, f"cd {shlex.quote(self.there(host))} && {{ {script}; }}") for host in self.hosts}
        statuses = run_prefixed(commands, patience=None)
        if bad := {name: status for name, status in statuses.items() if status}:
            late = f"not within {self.limit:g} s, --limit"  # timeout(1)'s status 124
            why = {name: late if status == 124 else in_words(status) for name, status in bad.items()}
            told = ", ".join(f"{name} ({reason})" for name, reason in why.items())
            raise RunError(f"setup: the environment was not made on {told}; what failed stands above, behind the host's name")

    def check(self) -> int:
        """What the doctor says of all hosts."""
        python = self.python or f"{self.folder}/.venv/bin/python"
        sys.stdout.flush()
        where = ["--remote_dir", self.folder, "--remote_python", python, "--ssh", shlex.join(self.ssh)]
        return doctor.main(["--hosts", self.path, *where, "--only", "versions", "backends", "port"])


def say(host: Host, text: str) -> None:
    """A line about a host."""
    sys.stdout.write(f"[{host.label}] {text}\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """All of it; the exit status is the doctor's.

    Raises:
        UsageError: bad flags, or a hosts file with nonsense in it.
        RunError: a host cannot be set up.
    """
    parser = Parser(prog="setup.sh --multi-node", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--multi_node", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hosts", metavar="FILE", default="hosts.txt", help="one host a line (default: hosts.txt)")
    parser.add_argument("--remote_dir", "--dir", metavar="PATH", help="the folder there; {name}: the host's (default: as here)")
    parser.add_argument("--remote_python", "--python", metavar="PATH", help="a Python there that has it all: make no environment")
    parser.add_argument("--ssh", metavar="COMMAND", default="ssh", help="ssh with options of your own")
    parser.add_argument("--limit", metavar="S", default=str(int(BUILD_S)), help="seconds for an environment (default: %(default)s)")
    setup = Setup(parser.parse_args(underscored(sys.argv[1:] if argv is None else argv)))
    wanted = (commit() or "").partition("+")
    if not wanted[0]:
        raise UsageError("setup: this folder is no git checkout, so there is no commit to copy: git clone it, or copy it by hand")
    if wanted[1]:
        sys.stdout.write(f"Note: changes that are not committed stay here; the hosts get commit {wanted[0][:10]}\n")
    hosts = setup.look(wanted[0])
    if hosts:
        setup.copy(hosts[:1], wanted[0])
    if hosts[1:] and (hosts := setup.look(wanted[0], again=True)):  # those that share no folder with the first
        setup.copy(hosts, wanted[0])
    if not setup.python:
        setup.build(os.environ)
    return setup.check()


if __name__ == "__main__":
    sys.exit(exit_status(main))
