"""The same job under what people would use instead: how long from the command to the end of the first optimizer step?

    python benchmarks/peers.py
    python benchmarks/peers.py --launchers spawn mpi --peers accelerate ray --world_sizes 2 16 --repeats 3

Each launcher is measured beside the bare script that does the same by hand under the same launcher, and beside other tools:
accelerate, torchrunx, Ray Train, Lightning Fabric (pip install -r benchmarks/requirements-peers.txt). Their scripts are in
benchmarks/peer_scripts. Runs are made one after the other, the repeats interleaved. The exit status is 1 if a run failed, or if
a peer that was named is not installed.
"""

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import cases, launch_times, machine, plots
from benchmarks.harness.cases import Case
from benchmarks.harness.command_line import Parser, converted, output_folder
from benchmarks.harness.peer_runs import BARE, BY_HAND, GLOBAL_BATCH, LAUNCHERS, PACKAGES, PeerRuns, find_peers, missing_in_words
from benchmarks.harness.session import Job, Session
from common.config import underscored
from common.errors import UsageError, exit_status
from common.files import write_json
from common.values import one_of, positive, whole

SCHEMA_VERSION = 1
PEERS = (*PACKAGES, *(name.replace(" ", "_") for name in BY_HAND))


def parser() -> Parser:
    """The command line."""
    p = Parser("peers.py", "peers.py [flags]", __doc__ or "")
    p.add_argument("--peers", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)} (default: the first {len(PACKAGES)})")
    p.add_argument("--launchers", nargs="+", default=LAUNCHERS, metavar="NAME", help=f"of {', '.join(LAUNCHERS)} (default: all)")
    p.add_argument("--world_sizes", nargs="+", default=("1", "2", "4"), metavar="N", help="numbers of ranks (default: 1 2 4)")
    p.add_argument("--repeats", default="5", metavar="N", help="runs of each (default: 5)")
    p.add_argument("--threads", metavar="N", help="CPU threads per rank (default: the cores, shared by the most ranks)")
    p.add_argument("--output", default="out/peers", metavar="DIR", help="folder for peers.json and pictures (default: out/peers)")
    p.add_argument("--time_limit", default="120", metavar="S", help="seconds after which a run is stopped (default: 120)")
    return p


class Asked:
    """What was asked for, checked."""

    def __init__(self, argv: list[str]) -> None:
        """Reads the command line.

        Raises:
            UsageError: a value that is not allowed.
        """
        given = parser().parse_args(underscored(argv))
        self.launchers = list(dict.fromkeys(converted("launchers", n, one_of(*LAUNCHERS)) for n in given.launchers))
        self.named = given.peers is not None
        wanted = [converted("peers", n, one_of(*PEERS)) for n in (PACKAGES if given.peers is None else given.peers)]
        self.tools = [n for n in PACKAGES if n in wanted]
        bare = [BARE[n] for n in self.launchers if n in BARE]
        self.bare = bare + [n for n in BY_HAND if n.replace(" ", "_") in wanted and n not in bare]
        self.world_sizes = sorted({converted("world_sizes", n, whole(1)) for n in given.world_sizes})
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
        self.peers = find_peers(self.tools)
        self.missing = [n for n in self.tools if n not in self.peers]
        for name in self.launchers:  # torchrun or mpirun missing: said before hours are spent
            cases.command(Case(name, 1, 1), [])

    def cases(self) -> list[Case]:
        """What is measured; each launcher just before its bare script."""
        names = [name for launcher in self.launchers for name in (launcher, BARE.get(launcher)) if name]
        names += [n for n in self.bare if n not in names] + list(self.peers)
        return [Case(name, n, self.threads) for n in self.world_sizes for name in names]

    def jobs(self) -> list[Job]:
        """One process of each kind, whose loss is the reference; then repeats interleaved, the order turned round every time."""
        flags = ("--epochs", "1")
        plain = Case("plain", 1, self.threads), Case(BARE["plain"], 1, self.threads)
        jobs = [Job(plain[0], "reference", flags, label="reference"), Job(plain[1], "reference", (), label="reference")]
        for repeat in range(self.repeats):
            label = f"repeat {repeat + 1} of {self.repeats}"
            round_ = [Job(case, "timed", flags if case.launcher in LAUNCHERS else (), repeat, label) for case in self.cases()]
            jobs += round_ if repeat % 2 == 0 else round_[::-1]
        return jobs


def record(asked: Asked, session: Session, about: dict[str, Any], rows: list[launch_times.LaunchTime], complete: bool) -> Path:
    """Writes peers.json."""
    path = asked.output / "peers.json"
    content = {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        **about,
        "settings": {
            "launchers": asked.launchers,
            "bare": asked.bare,
            "peers": list(asked.peers),
            "missing_peers": asked.missing,
            "world_sizes": asked.world_sizes,
            "repeats": asked.repeats,
            "threads_per_rank": asked.threads,
        },
        "summary": [row.as_json() for row in rows],
        "samples": [sample.as_json() for sample in session.samples],
    }
    write_json(path, content)
    return path


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = Asked(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/peers.py")
    about["versions"] |= {PACKAGES[name]: peer.version for name, peer in asked.peers.items()}
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    runs = PeerRuns(asked.peers)
    session = Session(console, asked.limit_s, runs.start, runs.read)
    jobs = asked.jobs()
    for name in asked.missing:
        console.print(missing_in_words(name), style="yellow", highlight=False)
    console.print(f"{len(jobs)} runs on {caption}", highlight=False)
    try:
        session.carry_out(jobs)
    except KeyboardInterrupt:
        rows = launch_times.launch_times(session, asked.cases(), asked.launchers, BARE)
        path = record(asked, session, about, rows, complete=False)
        console.print(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.", highlight=False)
        return 130
    console.print()
    rows = launch_times.launch_times(session, asked.cases(), asked.launchers, BARE)
    paths = [record(asked, session, about, rows, complete=True)]
    launch_times.show(console, rows, asked.cores, asked.threads)
    well = launch_times.tell(console, session, rows, asked.launchers, list(asked.peers))
    if any(row.seconds for row in rows):
        paths += plots.launch_times(rows, asked.output, caption, asked.launchers, BARE, list(asked.peers))
    for name in asked.missing:
        console.print(missing_in_words(name), style="yellow", highlight=False)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well and not (asked.named and asked.missing) else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
