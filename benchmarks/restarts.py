"""How long a group is away when one of its ranks is killed: torchrun --max_restarts, and elastic.py on a warm fork server.

    python benchmarks/restarts.py
    python benchmarks/restarts.py --launchers torchrun elastic --world_sizes 2 4 --repeats 7 --output out/mine

Each run trains until all ranks have made steps; then one rank (another one each repeat) is killed from outside, and the launcher
forms the group anew. What counts is the time from that SIGKILL to the end of the slowest rank's next step. Launchers run one after
the other, the repeats interleaved. Flags that are not listed here go to the launchers (--job digits, --threads 2 …). Leaves
restarts.json (machine, versions, commit, command, raw samples) and restarts.png and .svg.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import cases, machine, report, restarts
from benchmarks.harness.cases import Case
from benchmarks.harness.command_line import Parser, converted, output_folder, refuse_taken
from benchmarks.harness.runner import Running
from benchmarks.harness.session import Job, Session, Start
from common import now
from common.checks import check_world
from common.command_line import parse_config, underscored
from common.errors import RunError, UsageError, exit_status
from common.files import write_json
from common.values import AS_SHIPPED, one_of, positive, whole

SCHEMA_VERSION = 1
LAUNCHERS = ("torchrun", "elastic")
TRAINS_S = 0.5  # between the first step and the fault
POLL_S = 0.05  # looking for the new ranks; what they wrote tells the times


def parser() -> Parser:
    """The command line."""
    p = Parser("restarts.py", "restarts.py [flags] [training flags]", __doc__ or "")
    p.add_argument("--launchers", nargs="+", default=LAUNCHERS, metavar="NAME", help=f"of {', '.join(LAUNCHERS)} (default: both)")
    p.add_argument("--world_sizes", nargs="+", default=["2", "4"], metavar="N", help="numbers of ranks (default: 2 4)")
    p.add_argument("--repeats", default="5", metavar="N", help="runs of each (default: 5)")
    p.add_argument("--output", default="out/restarts", metavar="DIR", help="folder for all files (default: out/restarts)")
    p.add_argument("--time_limit", default="120", metavar="S", help="seconds after which a run is stopped (default: 120)")
    return p


class Restarts:
    """What was asked for, checked."""

    def __init__(self, argv: list[str]) -> None:
        """Reads the command line.

        Raises:
            UsageError: a value that is not allowed.
        """
        given, flags = parser().parse_known_args(underscored(argv))
        self.launchers = list(dict.fromkeys(converted("launchers", name, one_of(*LAUNCHERS)) for name in given.launchers))
        self.world_sizes = sorted({converted("world_sizes", n, whole(1)) for n in given.world_sizes})
        self.repeats: int = converted("repeats", given.repeats, whole(1))
        self.limit_s: float = converted("time_limit", given.time_limit, positive)
        refuse_taken("restarts.py", flags)
        if "--epochs" in [word.partition("=")[0] for word in flags]:
            raise UsageError("--epochs: restarts.py stops each run itself; leave it out")
        if "--job" not in [word.partition("=")[0] for word in flags]:
            flags = ["--job", "random", *flags]
        self.flags = (*flags, "--epochs", "1000000")
        config = parse_config("restarts.py", argv=self.flags)
        if config.threads == AS_SHIPPED:
            raise UsageError("--threads as_shipped: restarts.py gives all the same; name a number")
        for n in self.world_sizes:
            check_world(config, n)
        self.threads = config.threads or max(1, machine.usable_cores() // max(self.world_sizes))
        for launcher in self.launchers:
            cases.command(Case(launcher, 1, 1), [])
        self.output = output_folder(given.output)

    def cases(self) -> list[Case]:
        """What is compared, side by side at each number of ranks."""
        return [Case(name, n, self.threads) for n in self.world_sizes for name in self.launchers]

    def jobs(self) -> list[Job]:
        """All runs: repeats interleaved over the launchers, the order turned round every time."""
        jobs: list[Job] = []
        for repeat in range(self.repeats):
            order = self.cases() if repeat % 2 == 0 else self.cases()[::-1]
            jobs += [Job(case, "restart", self.flags, repeat, f"repeat {repeat + 1} of {self.repeats}") for case in order]
        return jobs

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        names = ("launchers", "world_sizes", "repeats", "flags")
        return {name: getattr(self, name) for name in names} | {"threads_per_rank": self.threads, "trains_seconds": TRAINS_S}


def start(job: Job, folder: Path) -> Start:
    """Starts a launcher that restarts its ranks once; torchrun takes that flag before the file that it runs."""
    words, variables = cases.command(job.case, [*job.flags, "--events", str(folder / "events")])
    words = [words[0], "--max_restarts=1", *words[1:]] if job.case.launcher == "torchrun" else [*words, "--max_restarts", "1"]
    return Start(words, variables, cases.shown(words))


def attend(job: Job, folder: Path, run: Running) -> dict[str, Any]:
    """Kills one rank once all train, and waits until all have made a step again.

    Raises:
        RunError: the run ended, or its time was up, before that.
    """
    world_size = job.case.world_size

    def when_all(restart: int, what: str) -> list[dict[str, Any]]:
        while not (ranks := restarts.ranks_of(folder / "events", restart, world_size, "first_step_done")):
            if run.ended:
                raise RunError(f"ended, or took longer than --time_limit, before {what}")
            time.sleep(POLL_S)
        return ranks

    old = when_all(0, "all ranks trained")
    time.sleep(TRAINS_S)
    victim = old[job.repeat % world_size]
    fault = now()
    try:
        os.kill(victim["pid"], signal.SIGKILL)
    except ProcessLookupError:
        raise RunError(f"rank {victim['rank']} had ended before it was to be killed") from None
    new = when_all(1, "all ranks trained again")
    old = restarts.ranks_of(folder / "events", 0, world_size, "process_ended") or old
    parts = restarts.split(fault, old, new)
    return {
        "killed_rank": victim["rank"],
        "fault_at": fault,
        "restart_seconds": sum(parts.values()),
        "part_seconds": parts,
        "old_ranks": old,
        "new_ranks": new,
    }


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = Restarts(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/restarts.py")
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    session = Session(console, asked.limit_s, start, attend=attend)
    jobs = asked.jobs()
    console.print(f"{len(jobs)} runs on {caption}", markup=False, highlight=False)

    def record(complete: bool, rows: list[restarts.Row]) -> Path:
        path = asked.output / "restarts.json"
        head = {"schema_version": SCHEMA_VERSION, "complete": complete, **about, "settings": asked.settings()}
        summary = [row.as_json() for row in rows]
        write_json(path, {**head, "summary": summary, "samples": [sample.as_json() for sample in session.samples]})
        return path

    try:
        session.carry_out(jobs)
    except KeyboardInterrupt:
        path = record(False, [])
        console.print(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.", markup=False, highlight=False)
        return 130
    rows = restarts.summarise(session, asked.cases())
    paths = [record(True, rows)]
    console.print()
    console.print(restarts.tables(rows, asked.repeats))
    for row in rows:
        if row.case.launcher != restarts.SLOWER:
            console.print(row.sentence(), markup=False, highlight=False)
    if noisy := [row.case.name for row in rows if row.seconds and row.seconds.noisy]:
        report.show_noisy(console, noisy)
    if any(row.seconds for row in rows):
        paths += restarts.draw(rows, asked.output, caption)
    well = report.show_failures(console, session)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", markup=False, highlight=False)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
