"""Runs launchers as a user does: a command in a shell's place, a time limit, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from common.config import FIELDS
from common.interfaces import interfaces
from common.virtual_cluster import VirtualCluster, missing

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = ("plain", "spawn", "torchrun", "mpi")  # mpi: MPICH, which requirements.txt installs
ALL = (*LAUNCHERS, "elastic")
SPAWNS = ("spawn (spawn)", "spawn (fork)")  # spawn.py with the other start methods than its default
FORKED = ("spawn", "elastic")  # their ranks are forked from a server, on Linux
MPIS = ("openmpi", "systemmpi")  # the same file under other MPIs
MARKER = "LAUNCHLAB_TEST_RUN"
# Variables that would tell a rank who it is or what to do; a test sets those it means.
CLEARED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "OMP_NUM_THREADS", "PYTHONWARNINGS",
           "GLOO_SOCKET_IFNAME", *(name.upper() for name in FIELDS)}  # fmt: skip
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
# By which two "nodes" on this machine find each other: a loopback address with several nodes is refused.
HERE = next((i.address for i in interfaces() if not i.is_loopback and not i.one_link_only), "no address but loopback")
LIMIT_S = 120.0
LEAVE_S = 5.0  # all of a run's processes are gone within this time of the command's end

runs: list["Run"] = []  # of the current test


def command(launcher: str, world_size: int, *flags: object) -> list[str]:
    """The command line of ``launcher`` with ``world_size`` ranks, as README gives it but with an absolute path."""
    words = [str(flag) for flag in flags]
    launcher, _, method = launcher.removesuffix(")").partition(" (")
    file = {"openmpi": "mpi", "systemmpi": "mpi"}.get(launcher, launcher)
    path = str(ROOT / "launchers" / f"{file}.py")
    if method:
        words = ["--start_method", method, *words]
    if launcher in ("plain", "spawn"):
        return ["python", path, "--world_size", str(world_size), *words]
    if launcher == "elastic":  # without restarts: a failure is to end the run
        return ["python", path, "--nproc_per_node", str(world_size), "--max_restarts", "0", *words]
    if launcher == "torchrun":
        return ["torchrun", f"--nproc_per_node={world_size}", path, *words]
    mpirun, python = {
        "mpi": ("mpirun", "python"),
        "openmpi": (ROOT / ".venv-openmpi/bin/mpirun", ROOT / ".venv-openmpi/bin/python"),
        "systemmpi": (Path("/usr/bin/mpirun"), ROOT / ".venv-systemmpi/bin/python"),
    }[launcher]
    for needed in (mpirun, python):
        if isinstance(needed, Path) and not needed.exists():
            pytest.skip(f"{needed} is not here: `make test` sets it up (Debian's openmpi-bin for the system's MPI)")
    return [str(mpirun), "-np", str(world_size), str(python), path, *words]


@dataclass
class Ended:
    """What is left of a run."""

    command: str
    status: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.command}\nstatus {self.status}\n---- stdout\n{self.out}\n---- stderr\n{self.err}"


class Run:
    """A command that runs in a session of its own; its processes are known by a variable that they inherit."""

    def __init__(self, words: list[str], cwd: Path = ROOT, **env: object) -> None:
        self.marker = uuid.uuid4().hex
        self.words = words
        inherited = {n: v for n, v in os.environ.items() if n not in CLEARED and not n.startswith(("OMPI_", "PMI", "PRTE_"))}
        path = f"{BIN}{os.pathsep}{inherited.get('PATH', '')}"
        given = {name: str(value) for name, value in env.items()}
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job's; the children would inherit it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.files = [tempfile.TemporaryFile("w+b") for _ in range(2)]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            words,
            cwd=cwd,
            env=inherited | OPEN_MPI | {"PATH": path, MARKER: self.marker} | given,
            stdin=subprocess.DEVNULL,
            stdout=self.files[0],
            stderr=self.files[1],
            start_new_session=True,
        )
        runs.append(self)

    def _text(self, number: int) -> str:
        size = os.fstat(self.files[number].fileno()).st_size
        return os.pread(self.files[number].fileno(), size, 0).decode(errors="replace")

    @property
    def out(self) -> str:
        """Stdout so far."""
        return self._text(0)

    @property
    def err(self) -> str:
        """Stderr so far."""
        return self._text(1)

    def processes(self) -> list[psutil.Process]:
        """All living processes of the run, whatever session they are in and whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == self.marker and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass
        return found

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the terminal's foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Ends all of it, at once."""
        until = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < until:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.05)
        self.process.wait(10)

    def close(self) -> list[str]:
        """Ends what is left, and tells what that was."""
        left = [f"{p.pid} {' '.join(p.cmdline())}" for p in self.left_after(LEAVE_S if self.process.poll() is not None else 0)]
        self.kill()
        for file in self.files:
            file.close()
        return left

    def left_after(self, seconds: float) -> list[psutil.Process]:
        """The processes that still run when the time is up."""
        until = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return left

    def until(self, done, what: str, limit: float = LIMIT_S):
        """Waits until ``done()`` is true and returns its value; fails with the run's output if that does not come."""
        until = time.monotonic() + limit
        while not (value := done()):
            if time.monotonic() > until or self.process.poll() is not None and not done():
                self.kill()
                pytest.fail(f"never came: {what}\n{self.ended()}")
            time.sleep(0.02)
        return value

    def ended(self) -> Ended:
        """What is known now."""
        status = self.process.poll()
        return Ended(" ".join(self.words), -999 if status is None else status, self.out, self.err, time.monotonic() - self.began)

    def finish(self, limit: float = LIMIT_S) -> Ended:
        """Waits for the command's end, and for that of all its processes soon after."""
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            tree = "\n".join(f"{p.pid} {p.status()} {' '.join(p.cmdline())}" for p in self.processes())
            self.kill()
            pytest.fail(f"still running after {limit:g} s:\n{tree}\n{self.ended()}")
        seconds = time.monotonic() - self.began
        left = [f"{p.pid} {' '.join(p.cmdline())}" for p in self.left_after(LEAVE_S)]
        ended = self.ended()
        ended.seconds = seconds
        if left:
            self.kill()
            pytest.fail(f"left behind {LEAVE_S:g} s after the end: {left}\n{ended}")
        return ended


def run(words: list[str], cwd: Path = ROOT, limit: float = LIMIT_S, **env: object) -> Ended:
    """Runs a command to its end."""
    return Run(words, cwd, **env).finish(limit)


def trained(words: list[str], result: Path, cwd: Path = ROOT, **env: object) -> dict:
    """What ``--result`` holds after a run that must succeed."""
    ended = run([*words, "--result", str(result)], cwd, **env)
    assert ended.status == 0, ended
    return json.loads(result.read_text())


def is_listening(port: int) -> bool:
    """Whether any process listens on this TCP port, or a watcher on this run's name, which holds the port."""
    tcp = [row.split()[1:4] for file in ("tcp", "tcp6") for row in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    watchers = [row for row in Path("/proc/net/unix").read_text().splitlines() if "launchlab-" in row and f":{port}/" in row]
    return bool(watchers) or any(int(local.rpartition(":")[2], 16) == port and state == "0A" for local, _, state in tcp)


def tracebacks_of_ours(ended: Ended) -> int:
    """How many tracebacks lead through this project's files (torchrun prints some of its own)."""
    return sum(
        f'File "{ROOT}/' in re.sub(rf'File "{BIN.parent}/', "", part)
        for part in ended.err.split("Traceback (most recent call last)")[1:]
    )


def cluster(nodes: int = 2, **options: object) -> VirtualCluster:
    """A virtual cluster for a test; where none can be made, the test is skipped."""
    if lack := missing(bool(options.get("ssh")), bool(options.get("slurm"))):
        pytest.skip(lack)
    return VirtualCluster(nodes, **options)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """After a test: no process of any run that it started is left."""
    runs.clear()
    yield
    left = [line for each in runs for line in each.close()]
    runs.clear()
    assert not left, "\n".join(left)
