"""The same job under what people would use instead: how long from the command to the end of the first optimizer step?

    python benchmarks/peers.py
    python benchmarks/peers.py --launchers spawn mpi --peers accelerate ray --world_sizes 2 16 --repeats 3
    python benchmarks/peers.py --train

Each launcher is measured beside the bare script that does the same by hand under the same launcher, and beside other tools:
accelerate, torchrunx, Ray Train, Lightning Fabric (pip install -r benchmarks/requirements-peers.txt). Their scripts are in
benchmarks/peer_scripts. Runs are made one after the other, the repeats interleaved. The exit status is 1 if a run failed, or if
a peer that was named is not installed.

With --train whole trainings: the same CNN, data, batches, epochs and threads under the launchers (with DDP, with their fastest
--sync, with bf16) and under the Hugging Face Trainer, accelerate, Lightning Fabric and PyTorch's DDP tutorial loop, all of which
train in float32 as their own guides have it; the whole command's time and the test accuracy that it reaches.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import cases, launch_times, machine, plots, training_plots, training_runs, training_times
from benchmarks.harness.cases import Case
from benchmarks.harness.command_line import Parser, converted, output_folder
from benchmarks.harness.peer_runs import (
    BARE,
    BY_HAND,
    GLOBAL_BATCH,
    LAUNCHERS,
    PACKAGES,
    TRAINER,
    PeerRuns,
    find_peers,
    missing_in_words,
)
from benchmarks.harness.session import Job, Session, interleaved
from common.command_line import underscored
from common.config import JOBS
from common.errors import UsageError, exit_status
from common.files import write_json
from common.values import one_of, positive, whole

SCHEMA_VERSION = 1
PEERS = (*PACKAGES, *(name.replace(" ", "_") for name in BY_HAND))


def parser() -> Parser:
    """The command line."""
    p = Parser("peers.py", "peers.py [flags]", __doc__ or "")
    tools, precisions = ", ".join(training_runs.TOOLS), ", ".join(training_runs.PRECISIONS)
    of = f"of {', '.join(PEERS)} (default: the first {len(PACKAGES)}); with --train of {tools} (default: all)"
    p.add_argument("--peers", nargs="*", metavar="NAME", help=of)
    of = f"of {', '.join(LAUNCHERS)} (default: all; with --train all but plain)"
    p.add_argument("--launchers", nargs="+", metavar="NAME", help=of)
    p.add_argument("--world_sizes", nargs="+", metavar="N", help="numbers of ranks (default: 1 2 4; with --train 2)")
    p.add_argument("--train", action="store_true", help="whole trainings")
    p.add_argument("--epochs", metavar="N", help=f"with --train: passes over the data (default: {JOBS['digits'].epochs})")
    of = f"with --train: the launchers', of {precisions}; bf16 has the channels last, too (default: fp32 bf16)"
    p.add_argument("--precisions", nargs="+", metavar="NAME", help=of)
    p.add_argument("--repeats", default="5", metavar="N", help="runs of each (default: 5)")
    p.add_argument("--threads", metavar="N", help="CPU threads per rank (default: the cores, shared by the most ranks)")
    p.add_argument("--output", default="out/peers", metavar="DIR", help="folder for the figures (default: out/peers)")
    p.add_argument("--time_limit", default="120", metavar="S", help="seconds after which a run is stopped (default: 120)")
    return p


class Asked:
    """What was asked for, checked: launch times."""

    file = "peers"
    default_launchers: Sequence[str] = LAUNCHERS
    known_peers: Sequence[str] = PEERS
    default_peers: Sequence[str] = tuple(PACKAGES)
    default_sizes: Sequence[str] = ("1", "2", "4")

    def __init__(self, given: argparse.Namespace) -> None:
        """Checks what ``parser`` has read.

        Raises:
            UsageError: a value that is not allowed.
        """
        named = given.launchers or self.default_launchers
        self.launchers = list(dict.fromkeys(converted("launchers", n, one_of(*LAUNCHERS)) for n in named))
        self.named = given.peers is not None
        named = self.default_peers if given.peers is None else given.peers
        self.wanted = list(dict.fromkeys(converted("peers", n, one_of(*self.known_peers)) for n in named))
        self.world_sizes = sorted({converted("world_sizes", n, whole(1)) for n in given.world_sizes or self.default_sizes})
        if uneven := [n for n in self.world_sizes if GLOBAL_BATCH % n]:
            fit = ", ".join(str(n) for n in range(1, GLOBAL_BATCH + 1) if GLOBAL_BATCH % n == 0)
            raise UsageError(f"--world_sizes {uneven[0]}: does not divide the global batch of {GLOBAL_BATCH}; give some of {fit}")
        self.repeats = converted("repeats", given.repeats, whole(1))
        self.cores = machine.usable_cores()
        self.threads = max(1, self.cores // max(self.world_sizes))
        if given.threads is not None:
            self.threads = converted("threads", given.threads, whole(1, 4096))
        self.limit_s = converted("time_limit", given.time_limit, positive)
        self.output = output_folder(given.output)
        tools = [n for n in PACKAGES | TRAINER if n in self.wanted]
        self.peers = find_peers(tools)
        self.missing = [n for n in tools if n not in self.peers]
        for name in self.launchers:  # torchrun or mpirun missing: said before hours are spent
            cases.command(Case(name, 1, 1), [])

    @property
    def bare(self) -> list[str]:
        """The bare scripts: each launcher's, and those that were named."""
        beside = [BARE[n] for n in self.launchers if n in BARE]
        return beside + [n for n in BY_HAND if n.replace(" ", "_") in self.wanted and n not in beside]

    def cases(self) -> Sequence[Case]:
        """What is measured; each launcher just before its bare script."""
        names = [name for launcher in self.launchers for name in (launcher, BARE.get(launcher)) if name]
        names += [n for n in self.bare if n not in names] + list(self.peers)
        return [Case(name, n, self.threads) for n in self.world_sizes for name in names]

    def jobs(self) -> list[Job]:
        """One process of each kind, whose loss is the reference; then repeats interleaved, the order turned round every time."""
        flags = ("--epochs", "1")
        plain = Case("plain", 1, self.threads), Case(BARE["plain"], 1, self.threads)
        jobs = [Job(plain[0], "reference", flags, label="reference"), Job(plain[1], "reference", (), label="reference")]
        return jobs + interleaved(self.cases(), self.repeats, lambda case, _: flags if case.launcher in LAUNCHERS else ())

    def runs(self) -> PeerRuns:
        """Starts and reads them."""
        return PeerRuns(self.peers)

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "launchers": self.launchers,
            "bare": self.bare,
            "peers": list(self.peers),
            "missing_peers": self.missing,
            "world_sizes": self.world_sizes,
            "repeats": self.repeats,
            "threads_per_rank": self.threads,
        }

    def rows(self, session: Session) -> Sequence[Any]:
        """From runs to figures."""
        return launch_times.launch_times(session, self.cases(), self.launchers, BARE)

    def tell(self, console: Console, session: Session, rows: Sequence[Any]) -> bool:
        """Prints the table and what follows from it; returns whether every run was good."""
        launch_times.show(console, rows, self.cores, self.threads)
        return launch_times.tell(console, session, rows, self.launchers, list(self.peers))

    def draw(self, rows: Sequence[Any], caption: str) -> list[Path]:
        """The picture, if there is something to draw."""
        if not any(row.seconds for row in rows):
            return []
        return plots.launch_times(rows, self.output, caption, self.launchers, BARE, list(self.peers))


class AskedTraining(Asked):
    """What was asked for, checked: whole trainings."""

    file = "training"
    default_launchers = ("spawn", "elastic", "torchrun", "mpi")
    known_peers = default_peers = tuple(training_runs.TOOLS)
    default_sizes = ("2",)

    def __init__(self, given: argparse.Namespace) -> None:
        """Checks what ``parser`` has read.

        Raises:
            UsageError: a value that is not allowed.
        """
        self.epochs = converted("epochs", given.epochs or str(JOBS["digits"].epochs), whole(1))
        known = one_of(*training_runs.PRECISIONS)
        self.precisions = list(dict.fromkeys(converted("precisions", n, known) for n in given.precisions or ("fp32", "bf16")))
        super().__init__(given)

    @property
    def bare(self) -> list[str]:
        """None."""
        return []

    def cases(self) -> Sequence[training_runs.Setting]:
        """What is measured."""
        tools = [n for n in self.wanted if n in self.peers or n == training_runs.TUTORIAL]
        sizes = self.world_sizes
        return [c for n in sizes for c in training_runs.settings(self.launchers, tools, n, self.threads, self.precisions)]

    def jobs(self) -> list[Job]:
        """The repeats interleaved, the order turned round every time; each repeat from other weights, alike for all."""
        epochs = ("--epochs", str(self.epochs))
        return interleaved(self.cases(), self.repeats, lambda case, repeat: (*epochs, "--seed", str(repeat), *case.flags))

    def runs(self) -> PeerRuns:
        """Starts and reads them."""
        return training_runs.TrainingRuns(self.peers)

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        return super().settings() | {"epochs": self.epochs, "precisions": self.precisions, "global_batch_size": GLOBAL_BATCH}

    def rows(self, session: Session) -> Sequence[Any]:
        """From runs to figures."""
        return training_times.trainings(session, self.cases())

    def tell(self, console: Console, session: Session, rows: Sequence[Any]) -> bool:
        """Prints the tables and what follows from them; returns whether every run was good."""
        training_times.show(console, rows, self.cores, self.threads, self.epochs)
        return training_times.tell(console, session, rows)

    def draw(self, rows: Sequence[Any], caption: str) -> list[Path]:
        """The picture, if there is something to draw."""
        if not any(row.figures["wall_seconds"] for row in rows):
            return []
        return training_plots.whole_trainings(rows, self.output, caption, self.cores, self.epochs)


def ask(argv: list[str]) -> Asked:
    """Reads the command line.

    Raises:
        UsageError: a value that is not allowed.
    """
    given = parser().parse_args(underscored(argv))
    if given.train:
        return AskedTraining(given)
    for name in ("epochs", "precisions"):
        if getattr(given, name) is not None:
            raise UsageError(f"--{name} without --train: only whole trainings have them; add --train, or leave it out")
    return Asked(given)


def record(asked: Asked, session: Session, about: dict[str, Any], rows: Sequence[Any], complete: bool) -> Path:
    """Writes peers.json or training.json."""
    path = asked.output / f"{asked.file}.json"
    content = {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        **about,
        "settings": asked.settings(),
        "summary": [row.as_json() for row in rows],
        "samples": [sample.as_json() for sample in session.samples],
    }
    write_json(path, content)
    return path


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = ask(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/peers.py")
    about["versions"] |= {(PACKAGES | TRAINER)[name]: peer.version for name, peer in asked.peers.items()}
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    runs = asked.runs()
    session = Session(console, asked.limit_s, runs.start, runs.read)
    jobs = asked.jobs()
    for name in asked.missing:
        console.print(missing_in_words(name), style="yellow", highlight=False)
    console.print(f"{len(jobs)} runs on {caption}", highlight=False)
    try:
        session.carry_out(jobs)
    except KeyboardInterrupt:
        path = record(asked, session, about, asked.rows(session), complete=False)
        console.print(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.", highlight=False)
        return 130
    console.print()
    rows = asked.rows(session)
    paths = [record(asked, session, about, rows, complete=True)]
    well = asked.tell(console, session, rows)
    paths += asked.draw(rows, caption)
    for name in asked.missing:
        console.print(missing_in_words(name), style="yellow", highlight=False)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well and not (asked.named and asked.missing) else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
