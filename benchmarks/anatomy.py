"""Where the time between pressing Enter and the first optimizer step goes, per launcher and rank.

    python benchmarks/anatomy.py
    python benchmarks/anatomy.py --launchers plain torchrun "spawn (forkserver)" --world_size 4 --repeats 9
    python benchmarks/anatomy.py --as_shipped                    # how much of a launcher's speed is threads
    python benchmarks/anatomy.py --max_ranks 64                  # launch time up to 64 ranks

Launchers are run as a user would run them, one after the other, the repeats interleaved; every rank writes when each of its phases
ended (--events). By default all get the same threads and no binding to cores. Flags that are not listed here go to the launchers
(--job random, --lr 0.01 …). Leaves anatomy.json, two pictures, and trace.json for ui.perfetto.dev.
"""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import anatomy_plots, anatomy_report, cases, machine, mpis, phases, report, scaling, shipped, trace
from benchmarks.harness.cases import FLOOR, Case
from benchmarks.harness.command_line import Parser, converted, output_folder, refuse_taken
from benchmarks.harness.session import Job, Session, Start, read_launcher, start_launcher
from common import events
from common.checks import check_world
from common.command_line import parse_config, underscored
from common.config import JOBS, TrainConfig
from common.errors import UsageError, exit_status
from common.files import write_json
from common.values import AS_SHIPPED, one_of, positive, whole

SCHEMA_VERSION = 1
DEFAULT_SIZES = (1, 2, 4, 8, 16, 32, 64)


def parser() -> Parser:
    """The command line."""
    p = Parser("anatomy.py", "anatomy.py [flags] [training flags]", __doc__ or "")
    known = ", ".join(cases.ALL_LAUNCHERS)
    p.add_argument("--launchers", nargs="+", metavar="NAME", help=f'of {known}, or one variant: "spawn (fork)" (default: all)')
    p.add_argument("--world_size", metavar="N", help="ranks of the time lines and tables (default: the cores, from 2 to 4)")
    p.add_argument("--repeats", default="5", metavar="N", help="runs of each (default: 5)")
    p.add_argument("--epochs", metavar="N", help="passes over the data (default: 1; with --as_shipped 3)")
    p.add_argument("--as_shipped", action="store_true", help="run each also with the threads and cores that its launcher leaves")
    p.add_argument("--world_sizes", nargs="+", metavar="N", help="numbers of ranks for the launch scaling (default: 1 2 4 8 16)")
    p.add_argument("--max_ranks", default="16", metavar="N", help="the largest of them: 32 and 64 are added (default: 16)")
    p.add_argument("--scaling_repeats", default="3", metavar="N", help="runs of each for the launch scaling (default: 3)")
    p.add_argument("--no_scaling", action="store_true", help="leave the launch scaling out")
    p.add_argument("--output", default="out/anatomy", metavar="DIR", help="folder for all files (default: out/anatomy)")
    p.add_argument("--time_limit", default="300", metavar="S", help="seconds after which a run is stopped (default: 300)")
    return p


def _gives(flags: list[str], *names: str) -> bool:
    return any(word.partition("=")[0] in names for word in flags)


class Anatomy:
    """What was asked for, checked."""

    def __init__(self, argv: list[str]) -> None:
        """Reads the command line.

        Raises:
            UsageError: a value that is not allowed, or a launcher asked for by name that is not here.
        """
        given, flags = parser().parse_known_args(underscored(argv))
        self.cores = machine.usable_cores()
        default_size = min(4, max(2, self.cores))
        self.world_size: int = converted("world_size", given.world_size or str(default_size), whole(1))
        self.repeats: int = converted("repeats", given.repeats, whole(1))
        self.scaling_repeats: int = converted("scaling_repeats", given.scaling_repeats, whole(1))
        most = converted("max_ranks", given.max_ranks, whole(1))
        self.world_sizes = sorted({converted("world_sizes", n, whole(1)) for n in given.world_sizes or []})
        self.world_sizes = [] if given.no_scaling else self.world_sizes or [n for n in DEFAULT_SIZES if n <= most]
        self.limit_s: float = converted("time_limit", given.time_limit, positive)
        self.both_ways: bool = given.as_shipped
        refuse_taken("anatomy.py", flags)
        if not _gives(flags, "--batch_size", "--global_batch_size"):  # every rank is to have a sample of each step
            job = JOBS[parse_config("anatomy.py", argv=flags).job]
            flags += ["--global_batch_size", str(max(job.global_batch_size, self.world_size, *self.world_sizes))]
        epochs = given.epochs or ("3" if self.both_ways else "1")
        self.flags = (*flags, "--epochs", epochs)
        # Launching many ranks may take longer than ranks of one node wait for each other.
        self.scaling_flags = (*flags, "--epochs", "1", *([] if _gives(flags, "--timeout") else ["--timeout", f"{self.limit_s:g}"]))
        self.config: TrainConfig = parse_config("anatomy.py", argv=self.flags)
        if self.config.threads == AS_SHIPPED:
            raise UsageError("--threads as_shipped: give --as_shipped, which measures both ways")
        self._check_batches()
        self.missing: dict[str, str] = {}
        """{launcher with its variant: why it is not run}."""
        self.launchers = self._here(given.launchers)
        if self.both_ways and not any(name == "plain" for name, _ in self.launchers):
            raise UsageError("--as_shipped without plain: speeds are told against plain's; add it to --launchers")
        self.output = output_folder(given.output)

    def _check_batches(self) -> None:
        for n in {self.world_size, *self.world_sizes}:
            check_world(self.config, n)
            if self.config.global_batch(n) < n:
                batch = self.config.global_batch(n)
                raise UsageError(f"--global_batch_size {batch} on {n} ranks: some would have no sample; give {n} or more")

    def _here(self, names: list[str] | None) -> list[tuple[str, str]]:
        """(launcher, variant) of all that are to run; the others are noted in ``missing``.

        Raises:
            UsageError: one that was asked for by name is unknown or not here.
        """
        titles = {Case(name, 1, 1, v).title: (name, v) for name in cases.ALL_LAUNCHERS for v in cases.variants(name)}
        known = dict.fromkeys([*cases.ALL_LAUNCHERS, *titles])
        asked = [converted("launchers", name, one_of(*known)) for name in names or cases.ALL_LAUNCHERS]
        found: list[tuple[str, str]] = []
        for name in asked:
            of_this = [titles[name]] if name in titles else [pair for pair in titles.values() if pair[0] == name]
            there = []
            for launcher, variant in of_this:
                case = Case(launcher, 1, 1, variant)
                try:
                    cases.command(case, [])
                    there.append((launcher, variant))
                except UsageError as reason:
                    self.missing[case.title] = str(reason)
            if names and not there:
                raise UsageError(f'--launchers "{name}": {"; ".join(self.missing[Case(n, 1, 1, v).title] for n, v in of_this)}')
            found += there
        return list(dict.fromkeys(found))

    def cases(self) -> list[Case]:
        """The launchers at the size of the time lines, with equal threads."""
        threads = self.config.threads or max(1, self.cores // self.world_size)
        return [Case(name, self.world_size, threads, variant) for name, variant in self.launchers]

    def scaled(self) -> list[Case]:
        """The launchers at each number of ranks, with equal threads throughout."""
        threads = self.config.threads or max(1, self.cores // max(self.world_sizes, default=1))
        return [Case(name, n, threads, variant) for name, variant in self.launchers for n in self.world_sizes]

    def jobs(self) -> list[Job]:
        """All runs: repeats interleaved over the launchers, the order turned round every time."""
        fair = self.cases()
        jobs = [Job(shipped.as_shipped(case), "inspection", ("--inspect",)) for case in fair]
        timed = fair + ([shipped.as_shipped(case) for case in fair] if self.both_ways else [])
        jobs += _rounds(timed, "timed", self.flags, self.repeats)
        if scaled := self.scaled():
            jobs += _rounds([Case(FLOOR, 1, scaled[0].threads), *scaled], "scaling", self.scaling_flags, self.scaling_repeats)
        return jobs

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "launchers": [case.title for case in self.cases()],
            "not_run": self.missing,
            "world_size": self.world_size,
            "repeats": self.repeats,
            "world_sizes": self.world_sizes,
            "scaling_repeats": self.scaling_repeats,
            "as_shipped": self.both_ways,
            "threads_per_rank": self.cases()[0].threads,
            "flags": self.flags,
            "scaling_flags": self.scaling_flags,
            "mpis": {name: mpi.version for name, mpi in mpis.found().items()},
        }


def _rounds(round_: list[Case], role: str, flags: tuple[str, ...], repeats: int) -> list[Job]:
    jobs: list[Job] = []
    for repeat in range(repeats):
        order = round_ if repeat % 2 == 0 else round_[::-1]
        jobs += [Job(case, role, flags, repeat, f"repeat {repeat + 1} of {repeats}") for case in order]
    return jobs


def start(job: Job, folder: Path) -> Start:
    """Starts a launcher whose ranks write their phases into ``folder``."""
    begun = start_launcher(job, folder)
    if job.case.launcher == FLOOR or job.role == "inspection":
        return begun
    return dataclasses.replace(begun, words=[*begun.words, "--events", str(folder / "events")])


def read(job: Job, folder: Path, started: float) -> dict[str, Any]:
    """What a good run gave: its result, with each rank's phases.

    Raises:
        RunError: it wrote no result.
    """
    result = read_launcher(job, folder, started)
    if (folder / "events").is_dir():
        result["timelines"] = events.read(folder / "events")
    return result


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = Anatomy(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/anatomy.py")
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    session = Session(console, asked.limit_s, start, read)
    jobs = asked.jobs()
    anatomy_report.not_run(console, asked.missing)
    anatomy_report.say(console, f"{len(jobs)} runs on {caption}")

    def record(complete: bool, **summary: Any) -> Path:
        path = asked.output / "anatomy.json"
        head = {"schema_version": SCHEMA_VERSION, "complete": complete, **about, "settings": asked.settings()}
        write_json(path, {**head, "summary": summary, "samples": [sample.as_json() for sample in session.samples]})
        return path

    try:
        session.carry_out(jobs)
    except KeyboardInterrupt:
        path = record(complete=False)
        anatomy_report.say(console, f"\nStopped. The {len(session.samples)} runs made so far are in {path}.")
        return 130
    console.print()
    rows = phases.summarise(session, asked.cases())
    found = shipped.gifts(session)
    speeds = shipped.speeds(session, asked.cases()) if asked.both_ways else []
    points, floor = scaling.points(session, asked.scaled()), scaling.floor(session)
    paths = [
        record(
            complete=True,
            phases=[row.as_json() for row in rows],
            as_shipped=[gift.as_json() for gift in found],
            speeds=[speed.as_json() for speed in speeds],
            scaling=[point.as_json() for point in points],
            floor_seconds=floor and floor.as_json(),
        )
    ]
    anatomy_report.phases(console, rows, asked.repeats)
    anatomy_report.gifts(console, found)
    if speeds:
        anatomy_report.speeds(console, speeds, asked.cores)
    if points:
        anatomy_report.scaling(console, points, floor, asked.cores, asked.scaling_repeats)
    anatomy_report.not_run(console, asked.missing)
    if noisy := [row.case.name for row in rows if row.noisy]:
        report.show_noisy(console, noisy)
    well = report.show_failures(console, session)
    if any(row.shown for row in rows):
        paths += anatomy_plots.time_lines(rows, asked.output, caption)
        paths.append(asked.output / "trace.json")
        write_json(paths[-1], trace.chrome_trace(rows, about))
    if any(point.launch_seconds for point in points):
        paths += anatomy_plots.launch_scaling(points, floor, asked.cores, asked.output, caption)
    anatomy_report.say(console, f"Written to {asked.output}: {', '.join(p.name for p in paths)}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
