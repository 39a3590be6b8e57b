"""What compare.py --nodes was asked for, checked, and the runs that answer it."""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.harness import lossy, machine, node_cases
from benchmarks.harness.cases import Case
from benchmarks.harness.cluster import UNLIMITED, Hosts, parse_rate
from benchmarks.harness.command_line import converted, output_folder, refuse_taken, without
from benchmarks.harness.comparison import EPOCHS, FP64, alone, flags_of_batch, parser, smaller_batches
from benchmarks.harness.node_cases import NodeCase, NodeWay, link_job, parse_way
from benchmarks.harness.session import Job
from common.checks import check_world
from common.command_line import parse_config, underscored
from common.config import TrainConfig
from common.errors import UsageError
from common.values import AS_SHIPPED, one_of, positive, whole

RATES = (UNLIMITED, "1gbit", "100mbit")
WAYS = ("ddp", "fp16", "powersgd", "accumulate")
NODE_FLAGS = ("rate", "delay", "nproc_per_node", "ways")
OTHERS_FLAGS = {
    "world_sizes": "ranks are nodes × --nproc_per_node",
    "batch_sizes": "they are another comparison",
    "links": "the links are measured as they are",
    "link": "the links are measured as they are; give --rate",
}
SET_BY_WAYS = ("--compress", "--accumulate")
ONE_MACHINE = ("shared_memory", "mpi")


def wanted(argv: list[str]) -> bool:
    """Whether a command line of compare.py asks for nodes.

    Raises:
        UsageError: it does not, and has a flag that needs them.
    """
    given, _ = parser("").parse_known_args(underscored(argv))
    if given.nodes is None and (alone_ := next((name for name in NODE_FLAGS if getattr(given, name) is not None), None)):
        raise UsageError(
            f"--{alone_} without --nodes: it is about the hosts of a virtual cluster; give --nodes 1 2 4, or leave it out"
        )
    return given.nodes is not None


class NodeComparison:
    """What was asked for, checked."""

    def __init__(self, argv: list[str], description: str = "") -> None:
        """Reads the command line; ``description`` is shown by --help.

        Raises:
            UsageError: a value that is not allowed, a flag that does not go with --nodes, or no virtual cluster can be made here.
        """
        given, passed_on = parser(description).parse_known_args(underscored(argv))
        self.nodes = sorted({converted("nodes", n, whole(1)) for n in given.nodes})
        self.per_node: int = converted("nproc_per_node", given.nproc_per_node or "1", whole(1))
        self.rates = list(dict.fromkeys(converted("rate", text, parse_rate) for text in given.rate or RATES))
        self.ways: list[NodeWay] = list(dict.fromkeys(converted("ways", text, parse_way) for text in given.ways or WAYS))
        known = one_of(*node_cases.LAUNCHERS)
        self.launchers = list(dict.fromkeys(converted("launchers", name, known) for name in given.launchers or ["spawn"]))
        self.repeats: int = converted("repeats", given.repeats, whole(1))
        self.limit_s: float = converted("time_limit", given.time_limit, positive)
        self.parity, self.prediction = not given.no_parity, not given.no_prediction
        self.cores = machine.usable_cores()
        self._check_together(given)
        self.flags = ["--job", given.job, *passed_on, "--epochs", given.epochs or str(EPOCHS)]
        refuse_taken("compare.py --nodes", self.flags)
        if taken := next((name for name in SET_BY_WAYS for word in self.flags if word.partition("=")[0] == name), None):
            raise UsageError(f"{taken} with --nodes: --ways sets it (--ways fp16 accumulate:4); leave it out")
        self.config: TrainConfig = parse_config("compare.py", argv=self.flags)
        self._check_config()
        self.threads = self.config.threads or max(1, self.cores // (max(self.nodes) * self.per_node))
        for case in self.cases():  # before hours are spent
            check_world(parse_config("spawn.py", argv=self.flags_of(case)), case.world_size)
            node_cases.command(case, [])
        self.delay: str | None = given.delay
        self.hosts = Hosts(max(self.nodes), self.delay)
        self.output = output_folder("out/nodes" if given.output == parser("").get_default("output") else given.output)

    def _check_together(self, given: argparse.Namespace) -> None:
        if max(self.nodes) < 2:
            raise UsageError(f"--nodes {' '.join(map(str, self.nodes))}: one host has no link; give 2 or more too (--nodes 1 2 4)")
        for name, why in OTHERS_FLAGS.items():
            if getattr(given, name):
                raise UsageError(f"--{name} with --nodes: {why}; leave it out")
        if converted("scaling", given.scaling, one_of("strong", "weak")) == "weak":
            raise UsageError("--scaling weak with --nodes: the total work is to stay fixed; leave one of them out")

    def _check_config(self) -> None:
        if self.config.threads == AS_SHIPPED:
            raise UsageError("--threads as_shipped: compare.py gives all the same; see benchmarks/anatomy.py --as_shipped")
        if self.config.batch_size is not None:
            raise UsageError("--batch_size with --nodes: the total work is to stay fixed; give --global_batch_size")
        if self.config.sync in ONE_MACHINE:
            raise UsageError(
                f"--sync {self.config.sync} with --nodes: it joins the ranks of one machine or of mpirun; give --sync ddp"
            )

    @property
    def one(self) -> Case:
        """What all is measured against: one rank on one host."""
        return Case("plain", 1, self.threads)

    def cases(self) -> list[NodeCase]:
        """What is compared; on one host there is no link, and one rank has nothing to compress."""
        found = []
        for launcher in self.launchers:
            for n in self.nodes:
                for rate in self.rates if n > 1 else [UNLIMITED]:
                    for way in self.ways:
                        ranks = n * self.per_node
                        if ranks > 1 or way.passes > 1:
                            name = launcher if ranks > 1 else "plain"
                            found.append(NodeCase(name, ranks, self.threads, nodes=n, rate=rate, way=way))
        return list(dict.fromkeys(found))

    def flags_of(self, case: Case) -> list[str]:
        """Training flags of a timed run of ``case``."""
        flags = self.flags if case.world_size > 1 else alone(self.flags)
        if not isinstance(case, NodeCase):
            return flags
        return case.way.flags(flags, self.config.global_batch(1), case.world_size)

    def timed(self) -> list[Job]:
        """The runs whose time counts: repeats interleaved over the cases, the order turned round every time; a rate stays set."""
        jobs = []
        first = min(n for n in self.nodes if n > 1)
        for repeat in range(self.repeats):
            label = f"repeat {repeat + 1} of {self.repeats}"
            round_ = [Job(case, "timed", tuple(self.flags_of(case)), repeat, label) for case in [self.one, *self._by_rate()]]
            if self.prediction:
                for batch in smaller_batches(self.config):
                    flags = tuple(flags_of_batch(self.flags, self.config, batch))
                    round_.append(Job(self.one, "compute", flags, repeat, f"batch of {batch}, {label}"))
                for rate in self.rates:  # beside the runs over that link
                    at = next(k for k, job in enumerate(round_) if _crosses(job.case, rate))
                    round_.insert(at, link_job(rate, first, first * self.per_node, repeat, label, self.limit_s))
            jobs += round_ if repeat % 2 == 0 else round_[::-1]
        return jobs

    def _by_rate(self) -> list[NodeCase]:
        return sorted(self.cases(), key=lambda case: (case.nodes > 1, self.rates.index(case.rate) if case.nodes > 1 else 0))

    def untimed(self) -> list[Job]:
        """What the verdict on the loss needs, of each way that loses nothing: float64 on every number of nodes, and references."""
        jobs: list[Job] = []
        if not self.parity:
            return jobs
        for way in self.lossless():
            flags = way.flags(alone(self.flags), self.config.global_batch(1), 1)
            single = without(flags, "--accumulate")
            jobs.append(Job(self.one, "fp64 reference", tuple(_fp64(single)), label=f"float64 reference for {way.title}"))
            if way.passes > 1:  # plain ddp's is the timed one
                jobs.append(Job(self.one, "reference", tuple(single), label=f"reference for {way.title}"))
        judged = [replace(c, rate=UNLIMITED) for c in self.cases() if c.way in self.lossless() and c.world_size > 1]
        return jobs + [Job(c, "fp64", tuple(_fp64(self.flags_of(c))), label="float64") for c in dict.fromkeys(judged)]

    def lossless(self) -> list[NodeWay]:
        """The ways that are bound to compute one process's loss."""
        return [] if lossy.is_lossy(self.config) else [way for way in self.ways if not way.compress]


def _fp64(flags: list[str]) -> list[str]:
    return [*without(without(flags, "--epochs"), "--precision"), *FP64]


def _crosses(case: Case, rate: str) -> bool:
    return isinstance(case, NodeCase) and case.nodes > 1 and case.rate == rate
