"""What compare.py was asked for, checked, and the runs that answer it."""

from __future__ import annotations

import argparse

from benchmarks.harness import cases, lossy, machine, prediction
from benchmarks.harness.cases import Case
from benchmarks.harness.command_line import Parser, converted, output_folder, refuse_taken, without
from benchmarks.harness.lossy import LOSSLESS
from benchmarks.harness.session import Job
from common.checks import check_world, train_size
from common.command_line import parse_config, underscored
from common.config import JOBS, TrainConfig
from common.errors import UsageError
from common.values import AS_SHIPPED, one_of, positive, whole

KNOWN = (*cases.LAUNCHERS, "elastic", *cases.PEERS)
EPOCHS = 2  # enough for a median, and a comparison within five minutes on two cores
FP64 = ("--precision", "fp64", "--epochs", "1")


def parser(description: str) -> Parser:
    """The command line of compare.py, whose docstring is ``description``."""
    p = Parser("compare.py", "compare.py [flags] [training flags]", description)
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
    p.add_argument("--links", metavar="FILE", help=f"a collectives.json, for the prediction (default: {prediction.MEASURED_LINKS})")
    p.add_argument(
        "--link",
        action="append",
        default=[],
        metavar="US,GBIT",
        help="predict for this link too: microseconds a message, gigabits per second (may be given several times)",
    )
    p.add_argument("--nodes", nargs="+", metavar="N", help="instead: on so many hosts of a virtual cluster (as 1 2 4); with it:")
    p.add_argument("--rate", nargs="+", metavar="RATE", help="of the links, each measured (default: unlimited 1gbit 100mbit)")
    p.add_argument("--delay", metavar="TIME", help="of a link, one way: 2ms (default: none)")
    p.add_argument("--nproc_per_node", metavar="N", help="ranks on each host (default: 1)")
    ways = "of ddp, fp16, bf16, int8, powersgd, accumulate, accumulate:K (default: ddp fp16 powersgd accumulate)"
    p.add_argument("--ways", nargs="+", metavar="NAME", help=f"what is sent, {ways}")
    p.add_argument("--no_prediction", action="store_true", help="leave out the prediction, and the runs that it needs")
    p.add_argument("--no_parity", action="store_true", help="leave out the runs that the verdict on the loss needs")
    return p


class Comparison:
    """What was asked for, checked."""

    def __init__(self, argv: list[str], description: str = "") -> None:
        """Reads the command line; ``description`` is shown by --help.

        Raises:
            UsageError: a value that is not allowed, or a flag that contradicts the comparison.
        """
        given, self.passed_on = parser(description).parse_known_args(underscored(argv))
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
        self._check_way()
        self.lossy = lossy.is_lossy(self.config)
        self.links, self.note = self._links(given)
        for launcher in self.launchers:  # before hours are spent
            cases.command(Case(launcher, 1, 1), [])
        self.output = output_folder(given.output)

    def _check_way(self) -> None:
        if self.config.sync == "mpi" and (others := [name for name in self.launchers if name != "mpi"]):
            raise UsageError(
                f"--sync mpi with --launchers {' '.join(others)}: only mpirun's ranks are in an MPI world; give --launchers mpi, "
                "or --sync shared_memory (one machine) or ddp, which every launcher takes"
            )

    def _links(self, given: argparse.Namespace) -> tuple[list[prediction.KnownLink], str]:
        """The links to predict for, and what is to be said of them."""
        if given.no_prediction or self.batch_sizes:
            if given.links or given.link:
                what = "--no_prediction" if given.no_prediction else "--batch_sizes"
                raise UsageError(f"{what} with --link or --links: nothing is predicted; leave one of them out")
            return [], ""
        return prediction.known_links(given.links, prediction.parse_links(given.link))

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
            return alone(self.flags) if single_process else self.flags
        per_rank = self.config.batch_size or JOBS[self.config.job].global_batch_size
        flags = [w for w in self.flags]
        if self.config.batch_size is None or single_process:
            flags = without(flags, "--batch_size")
            flags += ["--global_batch_size", str(per_rank * world_size)] if single_process else ["--batch_size", str(per_rank)]
        flags = alone(flags) if single_process else flags
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
            round_ = [Job(c, "timed", tuple(self.flags_of(c)), repeat, label) for c in all_cases]
            if self.cores > self.threads:
                whole_machine = Case("plain", 1, self.cores)
                flags = tuple(self.flags_of(whole_machine))
                round_.append(Job(whole_machine, "baseline", flags, repeat, f"all threads, {label}"))
            for batch in self.computed():
                flags = tuple(flags_of_batch(self.flags, self.config, batch))
                round_.append(Job(one, "compute", flags, repeat, f"batch of {batch}, {label}"))
            jobs += round_ if repeat % 2 == 0 else round_[::-1]
        return jobs

    def flags_of(self, case: Case) -> list[str]:
        """Training flags of a timed run of ``case``; one process averages with nobody, whatever the way."""
        flags = self.flags_for(case.world_size)
        return alone(flags) if case.launcher == "plain" and case.world_size == 1 else flags

    def computed(self) -> list[int]:
        """Smaller batches at which one process's step is timed for the prediction; with weak scaling a rank's batch stays."""
        return smaller_batches(self.config) if self.links and not self.weak else []

    def untimed(self) -> list[Job]:
        """What the verdict on the loss needs: float64 runs, references and the plot's control; of lossy runs a lossless one."""
        jobs = []
        one = Case("plain", 1, self.threads)
        if not self.parity:
            return []
        for n in self.world_sizes if self.weak else [1]:
            base = without(self.flags_for(n, single_process=True), "--precision")
            if self.lossy:
                jobs.append(Job(one, LOSSLESS, (*base, "--precision", "fp32"), label=f"lossless reference for {n}"))
                continue
            jobs.append(Job(one, "fp64 reference", (*without(base, "--epochs"), *FP64), label=f"float64 reference for {n}"))
            if self.weak:
                jobs.append(Job(one, "reference", tuple(self.flags_for(n, single_process=True)), label=f"reference for {n}"))
        for case in [] if self.lossy else self.cases():
            if case.launcher not in cases.PEERS:
                base = without(without(self.flags_of(case), "--epochs"), "--precision")
                jobs.append(Job(case, "fp64", (*base, *FP64), label="float64"))
        if not self.lossy and not self.weak and max(self.world_sizes) > 1 and self.config.sampler == "exact":
            n = max(self.world_sizes)
            jobs.append(Job(one, "control", (*alone(self.flags), "--accumulate", str(n)), label=f"control in {n}"))
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


def smaller_batches(config: TrainConfig) -> list[int]:
    """The batches at which one process's step is timed besides the whole one, for the prediction."""
    batch = config.global_batch(1)
    known = train_size(config) is not None  # else a batch of 1 may take for ever
    return prediction.batch_sizes(batch, 1 if known else -(-batch // 4))


def flags_of_batch(flags: list[str], config: TrainConfig, batch: int) -> list[str]:
    """Training flags of one process's run at a smaller batch, at a rate at which a batch of one sample does no harm."""
    for name in ("--global_batch_size", "--epochs", "--learning_rate", "--lr"):
        flags = without(flags, name)
    flags = [*flags, "--global_batch_size", str(batch), "--epochs", "1", "--lr", "0.0001"]
    if (size := train_size(config)) and config.dataset != "digits":
        flags = [*without(flags, "--data_size"), "--data_size", str(min(size, max(batch, prediction.STEPS * batch)))]
    return alone(flags)


def alone(flags: list[str]) -> list[str]:
    """``flags`` for one process: it has nothing to average or to send, and some ways refuse it."""
    for name in ("--sync", "--compress"):
        flags = without(flags, name)
    return [*flags, "--sync", "ddp"]
