"""The main job: the same training under each launcher, against one process: time, loss, speedup.

    python benchmarks/compare.py
    python benchmarks/compare.py --launchers plain mpi --world_sizes 1 2 4 8 --repeats 7 --job random --output out/random
    python benchmarks/compare.py --batch_sizes 16 32 64 128 --launchers torchrun --world_sizes 1 2

Launchers are run as a user would run them, one after the other, the repeats interleaved. Flags that are not listed here go to the
launchers (--epochs 10, --lr 0.01, --model my.module:Net …).
"""

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import cases, machine, plots, report, summary
from benchmarks.harness.cases import Case
from benchmarks.harness.command_line import Parser, converted, output_folder, refuse_taken, without
from benchmarks.harness.session import Job, Session
from benchmarks.harness.statistics import Spread, spread
from common.config import JOBS, TrainConfig, check_world, parse_config, underscored
from common.errors import UsageError, exit_status
from common.files import write_json
from common.values import AS_SHIPPED, one_of, positive, whole

SCHEMA_VERSION = 1
KNOWN = (*cases.LAUNCHERS, "elastic", *cases.PEERS)
EPOCHS = 2  # enough for a median, and a comparison within five minutes on two cores


def parser() -> Parser:
    """The command line."""
    p = Parser("compare.py", "compare.py [flags] [training flags]", __doc__ or "")
    p.add_argument("--launchers", nargs="+", metavar="NAME", help=f"of {', '.join(KNOWN)} (default: the first four)")
    p.add_argument("--world_sizes", nargs="+", metavar="N", help="numbers of ranks (default: 1 2 4)")
    p.add_argument("--repeats", default="3", metavar="N", help="runs of each (default: 3)")
    p.add_argument("--job", default="digits", metavar="NAME", help=f"of {', '.join(JOBS)} (default: digits)")
    p.add_argument("--epochs", metavar="N", help=f"passes over the data (default: {EPOCHS}; with --batch_sizes the job's)")
    p.add_argument(
        "--scaling", default="strong", metavar="KIND", help="strong: total work fixed (default); weak: work per rank fixed"
    )
    p.add_argument("--batch_sizes", nargs="+", metavar="N", help="instead: samples/s and time to an accuracy per batch size")
    p.add_argument(
        "--scale_lr", default="none", metavar="RULE", help="with --batch_sizes: linear in the global batch, or none (default)"
    )
    p.add_argument("--target_accuracy", default="0.95", metavar="X", help="with --batch_sizes: to be reached (default: 0.95)")
    p.add_argument(
        "--output", default="out/compare", metavar="DIR", help="folder for compare.json and pictures (default: out/compare)"
    )
    p.add_argument("--time_limit", default="120", metavar="S", help="seconds after which a run is stopped (default: 120)")
    p.add_argument("--no_parity", action="store_true", help="leave out the float64 runs that the verdict on the loss needs")
    return p


class Comparison:
    """What was asked for, checked."""

    def __init__(self, argv: list[str]) -> None:
        """Reads the command line.

        Raises:
            UsageError: a value that is not allowed, or a flag that contradicts the comparison.
        """
        given, self.passed_on = parser().parse_known_args(underscored(argv))
        self.batch_sizes = [converted("batch_sizes", n, whole(1)) for n in given.batch_sizes or []]
        launchers = given.launchers or (["torchrun"] if self.batch_sizes else list(cases.LAUNCHERS))
        self.launchers = list(dict.fromkeys(converted("launchers", name, one_of(*KNOWN)) for name in launchers))
        sizes = given.world_sizes or (["1", "2"] if self.batch_sizes else ["1", "2", "4"])
        self.world_sizes = sorted({converted("world_sizes", n, whole(1)) for n in sizes})
        self.repeats: int = converted("repeats", given.repeats, whole(1))
        self.weak = converted("scaling", given.scaling, one_of("strong", "weak")) == "weak"
        self.rule: str = converted("scale_lr", given.scale_lr, one_of("linear", "none"))
        self.target: float = converted("target_accuracy", given.target_accuracy, positive)
        self.limit_s: float = converted("time_limit", given.time_limit, positive)
        self.parity = not given.no_parity
        self.cores = machine.usable_cores()
        flags = ["--job", given.job, *self.passed_on]
        if given.epochs or not self.batch_sizes:
            flags += ["--epochs", given.epochs or str(EPOCHS)]
        refuse_taken("compare.py", flags)
        self.config: TrainConfig = parse_config("compare.py", argv=flags)
        self.flags = flags
        if self.config.threads == AS_SHIPPED:
            raise UsageError("--threads as_shipped: compare.py gives all the same; see benchmarks/anatomy.py --as_shipped")
        self.threads = self.config.threads or max(1, self.cores // max(self.world_sizes))
        self._check_batches()
        for launcher in self.launchers:  # before hours are spent
            cases.command(Case(launcher, 1, 1), [])
        self.output = output_folder(given.output)

    def _check_batches(self) -> None:
        by_rank = self.config.batch_size is not None
        if self.batch_sizes:
            if any(w.partition("=")[0] in ("--batch_size", "--global_batch_size") for w in self.flags):
                raise UsageError("--batch_sizes with --batch_size or --global_batch_size: it sets them itself; leave these out")
            return
        if self.weak and any(w.partition("=")[0] == "--global_batch_size" for w in self.flags):
            raise UsageError("--scaling weak with --global_batch_size: it fixes the work per rank; give --batch_size")
        if not self.weak and by_rank:
            raise UsageError("--batch_size with --scaling strong: the total work is to stay fixed; give --global_batch_size")
        for world_size in self.world_sizes:
            check_world(self.at(world_size), world_size)

    def at(self, world_size: int) -> TrainConfig:
        """The configuration of a run on ``world_size`` ranks."""
        return parse_config("compare.py", argv=self.flags_for(world_size))

    def flags_for(self, world_size: int, single_process: bool = False) -> list[str]:
        """Training flags for a timed run on ``world_size`` ranks, or of one process that computes the same."""
        if not self.weak:
            return self.flags
        per_rank = self.config.batch_size or JOBS[self.config.job].global_batch_size
        flags = [w for w in self.flags]
        if self.config.batch_size is None or single_process:
            flags = without(flags, "--batch_size")
            flags += ["--global_batch_size", str(per_rank * world_size)] if single_process else ["--batch_size", str(per_rank)]
        # N times as many ranks share the data: as much work for each takes N times as many passes.
        return [*without(flags, "--epochs"), "--epochs", str(self.config.epochs * world_size)]

    def cases(self) -> list[Case]:
        """What is compared, launcher by launcher."""
        return [Case(name, n, self.threads) for name in self.launchers for n in self.world_sizes]

    def timed(self) -> list[Job]:
        """The runs whose time counts: repeats interleaved over the launchers, the order turned round every time."""
        one = Case("plain", 1, self.threads)
        all_cases = list(dict.fromkeys([one, *self.cases()]))
        jobs = []
        for repeat in range(self.repeats):
            label = f"repeat {repeat + 1} of {self.repeats}"
            round_ = [Job(c, "timed", tuple(self.flags_for(c.world_size)), repeat, label) for c in all_cases]
            if self.cores > self.threads:
                whole_machine = Case("plain", 1, self.cores)
                flags = tuple(self.flags_for(1))
                round_.append(Job(whole_machine, "baseline", flags, repeat, f"all threads, {label}"))
            jobs += round_ if repeat % 2 == 0 else round_[::-1]
        return jobs

    def untimed(self) -> list[Job]:
        """The float64 runs that the verdict needs, their references, and the control of the loss plot."""
        jobs = []
        one = Case("plain", 1, self.threads)
        if not self.parity:
            return []
        for n in self.world_sizes if self.weak else [1]:
            short = ("--precision", "fp64", "--epochs", "1")
            base = without(without(self.flags_for(n, single_process=True), "--epochs"), "--precision")
            jobs.append(Job(one, "fp64 reference", (*base, *short), label=f"float64 reference for {n}"))
            if self.weak:
                jobs.append(Job(one, "reference", tuple(self.flags_for(n, single_process=True)), label=f"reference for {n}"))
        for case in self.cases():
            if case.launcher not in cases.PEERS:
                base = without(without(self.flags_for(case.world_size), "--epochs"), "--precision")
                jobs.append(Job(case, "fp64", (*base, "--precision", "fp64", "--epochs", "1"), label="float64"))
        if not self.weak and max(self.world_sizes) > 1 and self.config.sampler == "exact":
            n = max(self.world_sizes)
            jobs.append(Job(one, "control", (*self.flags, "--accumulate", str(n)), label=f"control in {n}"))
        return jobs

    def sized(self) -> list[Job]:
        """The runs of --batch_sizes."""
        jobs = []
        for repeat in range(self.repeats):
            for case in self.cases():
                for size in self.batch_sizes:
                    factor = size * case.world_size / (self.batch_sizes[0] * self.world_sizes[0])
                    rate = self.config.learning_rate * (factor if self.rule == "linear" else 1.0)
                    flags = without(without(self.flags, "--lr"), "--learning_rate")
                    flags = [*flags, "--batch_size", str(size), "--lr", f"{rate:.6g}"]
                    check_world(parse_config("compare.py", argv=flags), case.world_size)
                    jobs.append(Job(case, "batch", tuple(flags), repeat, f"batch size {size}"))
        return jobs


def record(asked: Comparison, session: Session, about: dict[str, Any], rows: list[dict[str, Any]], complete: bool) -> Path:
    """Writes compare.json."""
    path = asked.output / "compare.json"
    content = {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        **about,
        "settings": {
            "launchers": asked.launchers,
            "world_sizes": asked.world_sizes,
            "repeats": asked.repeats,
            "job": asked.config.job,
            "scaling": "weak" if asked.weak else "strong",
            "batch_sizes": asked.batch_sizes,
            "threads_per_rank": asked.threads,
            "flags": asked.flags,
        },
        "summary": rows,
        "samples": [sample.as_json() for sample in session.samples],
    }
    write_json(path, content)
    return path


def batch_points(session: Session, target: float) -> list[dict[str, Any]]:
    """One point a case and batch size: samples/s and training time until the accuracy was reached (None if in no repeat)."""
    points = []
    for job in dict.fromkeys((s.job.case, s.job.label) for s in session.of("batch")):
        mine = [s for s in session.of("batch") if (s.job.case, s.job.label) == job]
        reached: list[float | None] = []
        for sample in mine:
            assert sample.result
            ends, accuracy = sample.result["epoch_end_seconds"], sample.result["eval_accuracy"]
            reached.append(next((t for t, a in zip(ends, accuracy, strict=True) if a is not None and a >= target), None))
        points.append(
            {
                "name": job[0].name,
                "launcher": job[0].launcher,
                "world_size": job[0].world_size,
                "batch_size": int(job[1].split()[-1]),
                "learning_rate": mine[0].result and mine[0].result["learning_rate"],
                "samples_per_second": spread([s.value("samples_per_second") for s in mine]),
                "seconds_to_target": spread(reached),
                "has_accuracy": mine[0].value("eval_accuracy") is not None,
            }
        )
    return points


def as_json(point: dict[str, Any]) -> dict[str, Any]:
    """A point with its spreads spelled out."""
    return {name: value.as_json() if isinstance(value, Spread) else value for name, value in point.items()}


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = Comparison(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/compare.py")
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    session = Session(console, asked.limit_s)
    untimed, timed = ([], asked.sized()) if asked.batch_sizes else (asked.untimed(), asked.timed())
    console.print(f"{len(untimed) + len(timed)} runs on {caption}", highlight=False)
    try:
        session.carry_out(untimed, together=2)
        session.carry_out(timed)
    except KeyboardInterrupt:
        path = record(asked, session, about, [], complete=False)
        console.print(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.", highlight=False)
        return 130
    console.print()
    if asked.batch_sizes:
        return finish_batch_sizes(asked, session, console, about, caption)
    rows = summary.summarise(session, asked.cases(), asked.threads, asked.cores, asked.weak)
    paths = [record(asked, session, about, [row.as_json() for row in rows], complete=True)]
    report.show(console, rows, asked.cores, asked.threads, asked.weak)
    well = report.verdicts(console, session, rows)
    if any(row.figures["train_seconds"] for row in rows):
        paths += plots.speedup(rows, asked.output, caption, asked.cores, asked.threads, asked.weak)
        paths += plots.wall_clock(rows, asked.output, caption)
        paths += plots.loss(session, rows, asked.output, caption, asked.threads, asked.weak)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well else 1


def finish_batch_sizes(asked: Comparison, session: Session, console: Console, about: dict[str, Any], caption: str) -> int:
    """The table, file and picture of --batch_sizes."""
    points = batch_points(session, asked.target)
    paths = [record(asked, session, about, [as_json(p) for p in points], complete=True)]
    console.print(report.batch_table(points, asked.target))
    if points:
        paths += plots.batch_sizes(points, asked.output, caption, asked.target, asked.rule)
    well = report.verdicts(console, session, [])
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
