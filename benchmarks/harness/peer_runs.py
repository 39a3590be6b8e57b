"""The cases of peers.py: what is typed for each, and whether its ranks did what was asked."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import cases
from benchmarks.harness.cases import Case, shown
from benchmarks.harness.mpis import program
from benchmarks.harness.runner import REPOSITORY
from benchmarks.harness.session import Job, Start, read_launcher, start_launcher
from common.errors import RunError

LAUNCHERS = (*cases.LAUNCHERS, "elastic")
SCRIPTS = REPOSITORY / "benchmarks" / "peer_scripts"
ENVIRONMENT = REPOSITORY / ".venv-peers" / "bin" / "python"  # what `make peers` sets up
PACKAGES = {"accelerate": "accelerate", "torchrunx": "torchrunx", "ray": "ray", "fabric": "lightning-fabric"}
TRAINER = {"trainer": "transformers"}  # the Hugging Face Trainer: of whole trainings only (training_runs.py)
# A launcher and the script that does the same by hand, both started alike.
BARE = {"plain": "bare plain", "spawn": "bare spawn", "torchrun": "bare torchrun", "mpi": "bare mpi"}
START_METHODS = {"bare spawn": "spawn", "bare forkserver": "forkserver", "bare fork": "fork"}
BY_HAND = tuple(dict.fromkeys([*BARE.values(), *START_METHODS]))
GLOBAL_BATCH = 64  # peer_scripts/job.py's
LOSS_LIMIT = 1e-4  # relative; float32, sums in another order


@dataclass(frozen=True)
class Installed:
    """Where a peer is."""

    python: str
    version: str


def find_peers(names: list[str]) -> dict[str, Installed]:
    """The peers that are installed: beside the running Python, else in .venv-peers."""
    found: dict[str, Installed] = {}
    for python in (sys.executable, str(ENVIRONMENT)):
        if Path(python).exists():
            for name, version in _versions(python).items():
                found.setdefault(name, Installed(python, version))
    return {name: found[name] for name in names if name in found}


def _versions(python: str) -> dict[str, str]:
    code = (
        "import json, sys\nfrom importlib import metadata\nfound = {}\n"
        "for name, package in json.loads(sys.argv[1]).items():\n"
        "    try: found[name] = metadata.version(package)\n"
        "    except metadata.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    told = subprocess.run(
        [python, "-c", code, json.dumps(PACKAGES | TRAINER)], capture_output=True, text=True, timeout=60, check=True
    )
    versions: dict[str, str] = json.loads(told.stdout)
    return versions


def missing_in_words(name: str) -> str:
    """What to do about a peer that is not installed."""
    return f"{name} is not installed and was not measured: pip install -r benchmarks/requirements-peers.txt, or make peers"


@dataclass
class PeerRuns:
    """Starts the cases and reads what they left; for a Session's ``start`` and ``read``."""

    peers: dict[str, Installed]
    reference: dict[bool, float] = field(default_factory=dict)
    """First-step loss of one process: of the launchers (True), which shuffle, and of the scripts (False), which do not."""

    def start(self, job: Job, folder: Path) -> Start:
        """How to start ``job``, with its files in ``folder``."""
        if job.case.launcher in LAUNCHERS:
            return start_launcher(job, folder)
        words, own = self._command(job.case)
        words += ["--threads", str(job.case.threads), *job.flags]
        typed = " ".join([*(f"{name}={value}" for name, value in own.items()), shown(words)])
        return Start(words, own | _surroundings(job.case, folder), typed, SCRIPTS)

    def _command(self, case: Case) -> tuple[list[str], dict[str, str]]:
        """(command line, variables that belong to it), to be typed in ``SCRIPTS``."""
        name, n = case.launcher, str(case.world_size)
        if name == "bare plain" and case.world_size == 1:
            return [sys.executable, "bare_env.py"], {}
        if name == "bare plain":
            return [sys.executable, "bare_plain.py", "--world_size", n], {}
        if name in START_METHODS:
            return [sys.executable, "bare_spawn.py", "--world_size", n, "--start_method", START_METHODS[name]], {}
        if name == "bare torchrun":
            return [program("torchrun"), "--standalone", f"--nproc_per_node={n}", "bare_env.py"], {}
        if name == "bare mpi":
            words, variables = cases.mpirun(n)
            return [*words, sys.executable, "bare_mpi.py"], variables
        python = self.peers[name].python
        if name == "accelerate":
            several = ["--multi_gpu"] if case.world_size > 1 else []  # else, on CPU, one process whatever is asked for
            launch = [str(Path(python).with_name("accelerate")), "launch", *several, "--num_processes", n]
            return [*launch, "--main_process_port", "0", "accelerate_loop.py"], {"ACCELERATE_USE_CPU": "true"}
        if name == "trainer":  # torchrun, by its module: the peers' environment has torch, but not its programs
            return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "trainer_loop.py"], {}
        return [python, f"{name}_loop.py", "--world_size", n], {}

    def read(self, job: Job, folder: Path, started: float) -> dict[str, Any]:
        """What a run gave: launch_seconds, first_step_loss, world_size, threads_per_rank and each rank's own record.

        Raises:
            RunError: ranks are missing, are not as many as were asked for, or did not compute one process's loss.
        """
        ours = job.case.launcher in LAUNCHERS
        result = _of_launcher(read_launcher(job, folder, started)) if ours else _of_ranks(read_ranks(folder, job.case), started)
        if result["world_size"] != job.case.world_size:
            raise RunError(f"ran with world size {result['world_size']}, not {job.case.world_size}")
        loss, one = result["first_step_loss"], self.reference.get(ours)
        if job.role == "reference":
            self.reference[ours] = loss
        elif one is not None and not abs(loss - one) <= LOSS_LIMIT * abs(one):
            raise RunError(f"has a loss of {loss:.6f} after the first step, where one process has {one:.6f}")
        return result


def _surroundings(case: Case, folder: Path) -> dict[str, str]:
    """Variables that keep a run to its folder and its threads."""
    variables = {"LAUNCHLAB_PEER_OUTPUT": str(folder), "TMPDIR": str(folder)}
    if case.launcher not in ("bare plain", *START_METHODS, "bare mpi"):  # as cases.command has it for the launchers
        variables["OMP_NUM_THREADS"] = str(case.threads)
    if case.launcher in ("accelerate", "trainer"):  # a configuration saved by the user would decide what is launched
        variables["HF_HOME"] = str(folder)
    if case.launcher == "torchrunx":  # else it logs into the current folder
        variables["TORCHRUNX_LOG_DIR"] = str(folder)
    if case.launcher == "ray":  # else it writes a token and a session folder of its own, and reports its use
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        variables |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    return variables


def read_ranks(folder: Path, case: Case) -> list[dict[str, Any]]:
    """The ranks' records, by rank.

    Raises:
        RunError: they are not exactly one of each rank of ``case``, whole, by as many processes with the threads asked for.
    """
    ranks: list[dict[str, Any]] = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    ranks.sort(key=lambda r: r["rank"])
    n = case.world_size
    if wrong := [r for r in ranks if r["world_size"] != n]:
        raise RunError(f"was asked for world size {n}, but rank {wrong[0]['rank']} says {wrong[0]['world_size']}")
    if [r["rank"] for r in ranks] != list(range(n)) or len({r["pid"] for r in ranks}) != n:
        raise RunError(f"left records of ranks {[r['rank'] for r in ranks]}, where {n} processes were asked for")
    if unfinished := [r["rank"] for r in ranks if not r["finished"]]:
        raise RunError(f"did not finish on ranks {unfinished}")
    if wrong := [r for r in ranks if r["threads"] != case.threads]:
        raise RunError(f"used {wrong[0]['threads']} threads on rank {wrong[0]['rank']}, not {case.threads}")
    if (samples := sum(r["samples_first_step"] for r in ranks)) != GLOBAL_BATCH:
        raise RunError(f"took {samples} samples in the first step, not {GLOBAL_BATCH}")
    return ranks


def _of_ranks(ranks: list[dict[str, Any]], started: float) -> dict[str, Any]:
    """``started``: when the command was started, on ``events.now``'s clock, which the ranks read too."""
    return {
        "launch_seconds": max(r["first_step_done"] for r in ranks) - started,
        "first_step_loss": sum(r["loss_sum_first_step"] for r in ranks) / sum(r["samples_first_step"] for r in ranks),
        "world_size": len(ranks),
        "threads_per_rank": ranks[0]["threads"],
        "ranks": ranks,
    }


def _of_launcher(result: dict[str, Any]) -> dict[str, Any]:
    """The launch time is the ranks' own count, from when the command was started, as the harness told them."""
    return {
        "launch_seconds": result["launch_seconds"],
        "first_step_loss": result["loss_per_step"][0],
        "world_size": result["world_size"],
        "threads_per_rank": result["threads_per_rank"],
        "phases": result["phases"],
    }
