"""Where one training step's time goes: data, forward, backward, communication that backward does not hide, optimizer.

    python benchmarks/steps.py
    python benchmarks/steps.py --jobs random --ways alone ddp shared_memory mpi --repeats 9 --output out/steps_random
    python benchmarks/steps.py --jobs digits --launchers spawn torchrun "mpi (Open MPI)" --precision fp64

Per job, way of averaging (--sync) and rank. Runs are made one after the other, the repeats interleaved, each twice: once the ranks
note when each part of each step ended (--step_times; common/steps.py says how communication within backward is told), once they
note nothing, which gives the step's mean time, by which ways are compared. Beside the ways: one_process, with the whole batch and
a rank's threads; alone, the same with a rank's batch; and side_by_side, as many such processes at once as there are ranks, none of
which knows of the others: no way can be faster. Flags that are not listed here go to the launchers (--epochs 10, --bucket_mb 1).
"""

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import cases, machine, report, step_parts, step_plots
from benchmarks.harness.cases import Case
from benchmarks.harness.command_line import Parser, converted, output_folder, refuse_taken, without
from benchmarks.harness.session import Job, Session, read_launcher
from benchmarks.harness.step_parts import ALONE, ONE, REFERENCES, SIDE_BY_SIDE, Measured
from common.checks import check_world
from common.command_line import parse_config, underscored
from common.config import JOBS, SYNCS, TrainConfig
from common.errors import UsageError, exit_status
from common.files import write_json
from common.values import AS_SHIPPED, one_of, positive, whole

SCHEMA_VERSION = 1
WAYS = (*REFERENCES, *(name for name in SYNCS if name != "auto"))
EPOCHS = {"digits": 10, "random": 30, "regression": 50, "mnist": 1, "cifar10": 1, "text": 1}  # some hundred steps or more each
BY_DEFAULT = ("digits", "random", "regression")  # which need no files
TITLES = {Case(name, 1, 1, v).title: (name, v) for name in cases.ALL_LAUNCHERS for v in ("", *cases.variants(name))}

EXPLAINED = (
    "Communication is what backward does not hide: for DDP's ways a rank's backward less its backward without averaging, which "
    "a step now and then measures. It holds waiting for a slower rank. Each part is a median of its own, so they add up to "
    "the median step roughly. The mean step is of runs that note nothing.\n"
    + " ".join(f"{way.replace('_', ' ').capitalize()}: {text}." for way, text in REFERENCES.items())
    + " Below, a "
    "step is a mean, and ratios are taken within a repeat.\n"
)


def parser() -> Parser:
    """The command line."""
    p = Parser("steps.py", "steps.py [flags] [training flags]", __doc__ or "")
    p.add_argument("--jobs", nargs="+", default=BY_DEFAULT, metavar="NAME", help=f"of {', '.join(JOBS)} (default: the first three)")
    p.add_argument("--ways", nargs="+", metavar="NAME", help=f"of {', '.join(WAYS)} (default: all that are here)")
    p.add_argument(
        "--launchers",
        nargs="+",
        default=("spawn", "mpi"),
        metavar="NAME",
        help='those of MPI run the way mpi, and no other unless they are all: spawn, "mpi (Open MPI)" … (default: spawn mpi)',
    )
    p.add_argument("--world_sizes", nargs="+", default=("2",), metavar="N", help="numbers of ranks (default: 2)")
    p.add_argument("--repeats", default="5", metavar="N", help="runs of each (default: 5)")
    p.add_argument(
        "--epochs", metavar="N", help=f"passes over the data (default: {', '.join(f'{j} {n}' for j, n in EPOCHS.items())})"
    )
    p.add_argument(
        "--output", default="out/steps", metavar="DIR", help="folder for steps.json and the picture (default: out/steps)"
    )
    p.add_argument("--time_limit", default="120", metavar="S", help="seconds after which a run is stopped (default: 120)")
    return p


class Steps:
    """What was asked for, checked."""

    def __init__(self, argv: list[str]) -> None:
        """Reads the command line.

        Raises:
            UsageError: a value that is not allowed, or a way or launcher asked for by name that is not here.
        """
        given, self.passed_on = parser().parse_known_args(underscored(argv))
        self.jobs = list(dict.fromkeys(converted("jobs", name, one_of(*JOBS)) for name in given.jobs))
        ways = [converted("ways", name, one_of(*WAYS)) for name in given.ways or WAYS]
        launchers = [converted("launchers", name, one_of(*TITLES)) for name in dict.fromkeys(given.launchers)]
        self.world_sizes = sorted({converted("world_sizes", n, whole(2)) for n in given.world_sizes})
        self.repeats: int = converted("repeats", given.repeats, whole(1))
        self.epochs = given.epochs
        self.limit_s: float = converted("time_limit", given.time_limit, positive)
        refuse_taken("steps.py", self.passed_on, also=("--sync", "--step_times", "--job"))
        self.configs: dict[str, TrainConfig] = {
            job: parse_config("steps.py", argv=[*self.flags(job), "--step_times"]) for job in self.jobs
        }
        first = self.configs[self.jobs[0]]
        if first.threads == AS_SHIPPED:
            raise UsageError("--threads as_shipped: steps.py gives all the same; see benchmarks/anatomy.py --as_shipped")
        self.cores = machine.usable_cores()
        self.threads = first.threads or max(1, self.cores // max(self.world_sizes))
        for config in self.configs.values():
            for n in self.world_sizes:
                check_world(config, n)
                if config.global_batch(n) < n:
                    raise UsageError(f"--global_batch_size {config.global_batch(n)} on {n} ranks: some would have no sample")
        self.missing: dict[str, str] = {}
        """{what is not run: why}."""
        self.ways = self._launched(list(dict.fromkeys(ways)), launchers, named=given.ways is not None)
        self.output = output_folder(given.output)

    def flags(self, job: str) -> list[str]:
        """The training flags of ``job``, whatever the way."""
        return ["--job", job, *self.passed_on, "--epochs", self.epochs or str(EPOCHS[job])]

    def _launched(self, ways: list[str], launchers: list[str], named: bool) -> list[tuple[str, str, str]]:
        """(way, launcher, variant) of all that are to run.

        Raises:
            UsageError: a way that was asked for by name has no launcher that fits, or is not here.
        """
        pairs = [TITLES[title] for title in launchers]
        of_mpi = [pair for pair in pairs if pair[0] == "mpi"]
        others = [pair for pair in pairs if pair[0] != "mpi"] or of_mpi
        found = []
        for way in ways:
            fits = [("plain", "")] if way in REFERENCES else of_mpi if way == "mpi" else others
            try:
                if not fits:
                    raise UsageError("--ways mpi: its ranks must be MPI's; add mpi to --launchers, or leave it out of --ways")
                for launcher, variant in fits:
                    cases.command(Case(launcher, 1, 1, variant), [])
                    found.append((way, launcher, variant))
            except UsageError as reason:
                if named:
                    raise
                self.missing[way] = str(reason)
        return found

    def measured(self) -> list[Measured]:
        """What is measured."""
        found = []
        for job in self.jobs:
            for n in self.world_sizes:
                for way, launcher, variant in self.ways:
                    case = Case(launcher, 1 if way in REFERENCES else n, self.threads, variant)
                    found.append(Measured(job, way, case, n))
        return found

    def jobs_of(self, measured: Measured, repeat: int) -> list[Job]:
        """The runs of one repeat: with parts noted and without, each one run, or as many at once as there are ranks."""
        flags = self.flags(measured.job)
        if measured.way in REFERENCES:
            config = self.configs[measured.job]
            batch = config.global_batch(measured.ranks)
            batch = batch if measured.way == ONE else -(-batch // measured.ranks)
            flags = without(without(flags, "--batch_size"), "--global_batch_size") + ["--global_batch_size", str(batch)]
        else:
            flags += ["--sync", measured.way]
        label = f"{measured.job}, {measured.way}, repeat {repeat + 1} of {self.repeats}"
        found = []
        for role, more in ((measured.role, ["--step_times"]), (measured.plain_role, [])):
            count, beside = (measured.ranks, role) if measured.way == SIDE_BY_SIDE else (1, "")
            found += [Job(measured.case, role, (*flags, *more), repeat, label, beside)] * count
        return found

    def runs(self) -> list[Job]:
        """All: repeats interleaved over the ways, the order turned round every time."""
        runs = []
        for repeat in range(self.repeats):
            order = self.measured() if repeat % 2 == 0 else self.measured()[::-1]
            runs += [job for measured in order for job in self.jobs_of(measured, repeat)]
        return runs

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "jobs": self.jobs,
            "ways": [dict(zip(("way", "launcher", "variant"), each, strict=True)) for each in self.ways],
            "not_run": self.missing,
            "world_sizes": self.world_sizes,
            "repeats": self.repeats,
            "threads_per_rank": self.threads,
            "flags": {job: self.flags(job) for job in self.jobs},
            "references": REFERENCES,
        }


def read(job: Job, folder: Path, started: float) -> dict[str, Any]:
    """What a good run gave; of its loss curve, which a few hundred runs would fill the file with, the number of steps.

    Raises:
        RunError: it wrote no result.
    """
    result = read_launcher(job, folder, started)
    result["steps_after_first"] = len(result.pop("loss_per_step")) - 1
    return result


def tables(console: Console, asked: Steps, rows: list[step_parts.Row]) -> None:
    """A table a job: milliseconds."""
    s = "s" * (asked.threads > 1)
    for job in asked.jobs:
        what = f"milliseconds, median (range) of {asked.repeats}, {asked.threads} thread{s} per rank"
        made = report.table(
            f"Job {job}: where a step's time goes, {what}",
            "way", "ranks", "rank", "data", "forward", "backward", "communication", "optimizer", "rest", "median step", "mean step",
        )  # fmt: skip
        for row in (r for r in rows if r.measured.job == job):
            m = row.measured
            over = report.OVERSUBSCRIBED if (m.ranks if m.way not in (ONE, ALONE) else 1) * m.case.threads > asked.cores else ""
            for number, rank in enumerate(row.ranks):
                parts = [f"{1000 * value.median:.3f}" if (value := rank[part]) else "–" for part in step_parts.PARTS]
                head = (m.title, f"{m.ranks if m.way not in REFERENCES else 1}{over}") if number == 0 else ("", "")
                median = f"{1000 * step.median:.3f}" if (step := rank["step"]) else "–"
                mean = report.cell(row.mean, 3, 1000) if number == 0 else ""
                made.add_row(*head, str(number), *parts, median, mean)
            if not row.ranks:
                made.add_row(m.title, str(m.ranks), *["–"] * 9)
        console.print(made)
        console.print()


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = Steps(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/steps.py")
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    session = Session(console, asked.limit_s, read=read)
    runs, measured = asked.runs(), asked.measured()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    def record(complete: bool) -> Path:
        path = asked.output / "steps.json"
        summary = {
            "steps": [row.as_json() for row in step_parts.summarise(session, measured)],
            "ratios": [ratio.as_json() for ratio in step_parts.ratios(session, measured)],
        }
        head = {"schema_version": SCHEMA_VERSION, "complete": complete, **about, "settings": asked.settings()}
        write_json(path, {**head, "summary": summary, "samples": [sample.as_json() for sample in session.samples]})
        return path

    for way, reason in asked.missing.items():
        say(f"Not run: {way}: {reason}")
    say(f"{len(runs)} runs on {caption}")
    try:
        session.carry_out(runs)
    except KeyboardInterrupt:
        path = record(complete=False)
        say(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.")
        return 130
    console.print()
    rows, ratios = step_parts.summarise(session, measured), step_parts.ratios(session, measured)
    paths = [record(complete=True)]
    tables(console, asked, rows)
    say(EXPLAINED)
    for ratio in ratios:
        say(ratio.sentence())
    for sentence in step_parts.targets(ratios):
        say(sentence)
    if noisy := [f"{r.measured.job}, {r.measured.title}" for r in rows if r.mean and r.mean.noisy]:
        report.show_noisy(console, noisy)
    well = report.show_failures(console, session)
    if any(row.ranks for row in rows):
        paths += step_plots.steps(rows, asked.output, caption)
    say(f"Written to {asked.output}: {', '.join(p.name for p in paths)}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
