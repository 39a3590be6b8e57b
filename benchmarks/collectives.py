"""How long all_reduce, all_gather, broadcast and reduce_scatter take, by size and by what carries the bytes.

    python benchmarks/collectives.py
    python benchmarks/collectives.py --ways gloo shared_memory "mpi (Open MPI)" --world_sizes 2 4 --min 4KB --max 1MB --factor 2
    python benchmarks/collectives.py --ways gloo my_module:MyAllReduce            # a way of your own: benchmarks/collective_ways.py
    python benchmarks/collectives.py --nodes 2 --rate unlimited 1gbit 100mbit     # over the links of a virtual cluster's hosts

Every way's ranks are started anew each repeat, the ways one after the other, with one thread a rank; each result is checked. A time
is that of the slowest rank, the median over the calls of a run, then the median and range over the repeats. Algorithm and bus
bandwidth are nccl-tests' (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Among the ways the machine's
memory copies are measured, which bound them (benchmarks/collective_loop.py says how and why). Leaves collectives.json (machine,
versions, commit, command, α and β of t = α + n/β, the time of each call) and collectives.png and .svg. The exit status is 1 if
a run failed or a result was wrong, or if a way that was named is not here.
"""

import argparse
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import collective_plots, collective_report, collective_runs, machine, mpis, report
from benchmarks.harness.bandwidth import COLLECTIVES, parse_size, size_text
from benchmarks.harness.cases import Case
from benchmarks.harness.cluster import UNLIMITED, Hosts, Probe, bytes_per_s, parse_rate
from benchmarks.harness.collective_runs import COPIES, MEMORY_COPY, WAYS, Plan
from benchmarks.harness.command_line import Parser, converted, output_folder
from benchmarks.harness.session import Job, Session
from common.command_line import underscored
from common.errors import UsageError, exit_status
from common.files import write_json
from common.values import one_of, part, positive, whole

SCHEMA_VERSION = 1


def parser() -> Parser:
    """The command line."""
    p = Parser("collectives.py", "collectives.py [flags]", __doc__ or "")
    ways = f'of {", ".join(WAYS)}, one MPI: "mpi (Open MPI)", or module:Class of your own (default: all that are here)'
    p.add_argument("--ways", nargs="+", metavar="NAME", help=ways)
    p.add_argument("--collectives", nargs="+", default=COLLECTIVES, metavar="NAME", help=f"of {', '.join(COLLECTIVES)}")
    p.add_argument("--world_sizes", nargs="+", metavar="N", help="numbers of ranks (default: 2)")
    p.add_argument("--nodes", nargs="+", metavar="N", help="instead: on so many hosts of a virtual cluster, by gloo; with it:")
    p.add_argument("--rate", nargs="+", metavar="RATE", help="of the links, each measured: unlimited (default), 1gbit, 100mbit …")
    p.add_argument("--delay", metavar="TIME", help="of a link, one way: 2ms (default: none)")
    p.add_argument("--nproc_per_node", metavar="N", help="ranks on each host (default: 1)")
    p.add_argument("--min", default="1KB", metavar="SIZE", help="smallest size; K, M are 2^10, 2^20 bytes (default: 1KB)")
    p.add_argument("--max", metavar="SIZE", help="largest size (default: 64MB; with --nodes 4MB)")
    p.add_argument("--factor", default="4", metavar="N", help="from each size to the next (default: 4)")
    p.add_argument("--sizes", nargs="+", metavar="SIZE", help="these sizes instead")
    p.add_argument("--repeats", default="5", metavar="N", help="runs of each way (default: 5)")
    p.add_argument("--output", default="out/collectives", metavar="DIR", help="folder for all files (default: out/collectives)")
    p.add_argument("--time_limit", default="300", metavar="S", help="seconds after which a run is stopped (default: 300)")
    return p


class Asked:
    """What was asked for, checked."""

    def __init__(self, argv: list[str]) -> None:
        """Reads the command line and looks which ways are here.

        Raises:
            UsageError: a value that is not allowed, or none of the ways is here.
        """
        given = parser().parse_args(underscored(argv))
        self.collectives = list(dict.fromkeys(converted("collectives", n, one_of(*COLLECTIVES)) for n in given.collectives))
        self.nodes, self.per_node, self.rates, self.hosts = self._over_hosts(given)
        self.world_sizes = sorted({converted("world_sizes", n, whole(2)) for n in given.world_sizes or ["2"]})
        if self.hosts:
            self.world_sizes = [n * self.per_node for n in self.nodes]
        self.sizes = self._sizes(given.sizes, given.min, given.max or ("4MB" if self.hosts else "64MB"), given.factor)
        self.repeats: int = converted("repeats", given.repeats, whole(1))
        self.limit_s: float = converted("time_limit", given.time_limit, positive)
        names = [
            converted("ways", name, part(*collective_runs.titles())) for name in given.ways or (["gloo"] if self.hosts else WAYS)
        ]
        if self.hosts and (near := [name for name in names if name != "gloo" and not collective_runs.is_own(name)]):
            raise UsageError(f"--ways {near[0]} with --nodes: not measured over hosts; give gloo, or a class of your own")
        self.output = output_folder(given.output)
        here = collective_runs.find(names)
        self.ways, self.missing, self.gpus = here.found, here.missing, here.gpus
        self.unmet = here.unmet if given.ways else []  # a way that was named is to be measured
        if not self.ways:
            raise UsageError("; ".join(f"--ways {name}: {reason}" for name, reason in self.missing.items()))
        self.cores = machine.usable_cores()

    @staticmethod
    def _over_hosts(given: argparse.Namespace) -> tuple[list[int], int, list[str], Hosts | None]:
        """(numbers of hosts, ranks on each, rates, the hosts); no hosts without --nodes."""
        if given.nodes is None:
            if alone := next((n for n in ("rate", "delay", "nproc_per_node") if getattr(given, n) is not None), None):
                raise UsageError(
                    f"--{alone} without --nodes: it is about a virtual cluster's hosts; give --nodes 2, or leave it out"
                )
            return [], 1, [], None
        if given.world_sizes:
            raise UsageError("--world_sizes with --nodes: ranks are nodes × --nproc_per_node; leave it out")
        nodes = sorted({converted("nodes", n, whole(2)) for n in given.nodes})
        rates = list(dict.fromkeys(converted("rate", text, parse_rate) for text in given.rate or [UNLIMITED]))
        return nodes, converted("nproc_per_node", given.nproc_per_node or "1", whole(1)), rates, Hosts(max(nodes), given.delay)

    @staticmethod
    def _sizes(sizes: list[str] | None, least: str, most: str, factor: str) -> list[int]:
        if sizes:
            return sorted({converted("sizes", text, parse_size) for text in sizes})
        size, last = converted("min", least, parse_size), converted("max", most, parse_size)
        step, found = converted("factor", factor, whole(2)), []
        if size > last:
            raise UsageError(f"--min {least} with --max {most}: the smallest size is above the largest; give --min up to --max")
        while size <= last:
            found.append(size)
            size *= step
        return found

    def cases(self) -> list[Case]:
        """What is measured, side by side at each number of ranks, the memory copies last."""
        found = []
        if self.hosts:
            return [Case(way, n, 1, rate) for n in self.world_sizes for rate in self.rates for way, _ in self.ways]
        for n in self.world_sizes:
            # NCCL takes one rank a GPU: with fewer GPUs than ranks it is measured on all there are.
            found += [Case(way, min(n, self.gpus) if way == "nccl" else n, 1, variant) for way, variant in self.ways]
            found.append(Case(MEMORY_COPY, n, 1))
        return list(dict.fromkeys(found))

    def jobs(self) -> list[Job]:
        """All runs: repeats interleaved over the ways, the order turned round every time."""
        jobs: list[Job] = []
        for repeat in range(self.repeats):
            order = self.cases() if repeat % 2 == 0 else self.cases()[::-1]
            jobs += [Job(c, "timed", (self.plan(c).as_text(),), repeat, f"repeat {repeat + 1} of {self.repeats}") for c in order]
        return jobs

    def plan(self, case: Case) -> Plan:
        """What the ranks of a run measure."""
        kinds = COPIES if case.launcher == MEMORY_COPY else self.collectives
        if self.hosts:
            nodes, rate = case.world_size // self.per_node, bytes_per_s(case.variant)
            return Plan(case.launcher, case.world_size, kinds, self.sizes, self.limit_s, nodes, rate)
        return Plan(case.launcher, case.world_size, kinds, self.sizes, self.limit_s)

    def settings(self) -> dict[str, Any]:
        """For the result file."""
        names = ("collectives", "world_sizes", "sizes", "repeats")
        return {
            "ways": list(dict.fromkeys(case.title for case in self.cases())),
            "not_run": self.missing,
            **{name: getattr(self, name) for name in names},
            **({"nodes": self.nodes, "rates": self.rates, "delay": self.hosts.delay} if self.hosts else {}),
            "threads_per_rank": 1,
            "dtype": "float32",
            "mpis": {name: mpi.version for name, mpi in mpis.found().items()},
        }


def main() -> int:
    """Runs, writes, draws, tells."""
    asked = Asked(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/collectives.py")
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    start = collective_runs.start_on(asked.hosts) if asked.hosts else collective_runs.start
    session = Session(console, asked.limit_s, start, collective_runs.read)
    jobs = asked.jobs()
    probes: list[Probe] = []

    def tell_missing() -> None:
        for name, reason in asked.missing.items():
            console.print(f"{name} is not measured: {reason}", style="yellow", markup=False, highlight=False)

    def record(complete: bool) -> tuple[list[collective_report.Row], list[collective_report.Fitted], Path]:
        rows = collective_report.summarise(session)
        fitted = collective_report.fits(rows)
        path = asked.output / "collectives.json"
        content = {
            "schema_version": SCHEMA_VERSION,
            "complete": complete,
            **about,
            "settings": asked.settings(),
            **({"links": [probe.as_json() for probe in probes]} if asked.hosts else {}),
            "summary": [row.as_json() for row in rows if not collective_report.is_copy(row)],
            "memory_copies": [row.as_json() for row in rows if collective_report.is_copy(row)],
            "fits": [each.as_json() for each in fitted],
            "standings": [each.as_json() for each in collective_report.standings(rows)],
            "samples": [sample.as_json() for sample in session.samples],
        }
        write_json(path, content)
        return rows, fitted, path

    tell_missing()
    sizes = (
        f"{len(asked.sizes)} size{'s' * (len(asked.sizes) > 1)} from {size_text(asked.sizes[0])} to {size_text(asked.sizes[-1])}"
    )
    console.print(f"{len(jobs)} runs, {sizes}, on {caption}", markup=False, highlight=False)
    try:
        with asked.hosts or nullcontext():
            if asked.hosts:
                probes += asked.hosts.probe_all(asked.rates, console)
            session.carry_out(jobs)
    except KeyboardInterrupt:
        *_, path = record(complete=False)
        console.print(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.", markup=False, highlight=False)
        return 130
    rows, fitted, path = record(complete=True)
    console.print()
    for title, shown in collective_report.tables(rows, fitted, asked.repeats, asked.cores):
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(shown)
        console.print()
    collective_report.tell(console, rows, collective_report.standings(rows), len(asked.sizes), asked.cores)
    for sentence in collective_report.link_sentences(rows):
        console.print(sentence, markup=False, highlight=False)
    paths = [path]
    if rows:
        paths += collective_plots.draw(rows, fitted, asked.output, caption, asked.cores)
    tell_missing()
    well = report.show_failures(console, session)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", markup=False, highlight=False)
    return 0 if well and not asked.unmet else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
