"""compare.py --nodes: runs, writes, draws, tells."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import machine, node_cases, node_plots, node_report, node_summary
from benchmarks.harness.cluster import Probe
from benchmarks.harness.node_comparison import NodeComparison
from benchmarks.harness.session import Session
from common.files import write_json

SCHEMA_VERSION = 1


def record(
    asked: NodeComparison, session: Session, about: dict[str, Any], probes: list[Probe], found: node_summary.Found | None
) -> Path:
    """Writes nodes.json; without ``found`` as one that was stopped."""
    path = asked.output / "nodes.json"
    content = {
        "schema_version": SCHEMA_VERSION,
        "complete": found is not None,
        **about,
        "settings": {
            "nodes": asked.nodes,
            "ranks_per_node": asked.per_node,
            "rates": asked.rates,
            "delay": asked.delay,
            "ways": [way.title for way in asked.ways],
            "launchers": asked.launchers,
            "repeats": asked.repeats,
            "job": asked.config.job,
            "threads_per_rank": asked.threads,
            "sync": asked.config.sync,
            "precision": asked.config.precision,
            "flags": asked.flags,
        },
        "links": [probe.as_json() for probe in probes],
        "one_rank_samples_per_second": found and found.one and found.one.as_json(),
        "summary": [row.as_json() for row in found.rows] if found else [],
        "prediction": found and found.prediction_as_json(),
        "samples": [sample.as_json() | node_cases.as_json(sample.job.case) for sample in session.samples],
    }
    write_json(path, content)
    return path


def compare_nodes(argv: list[str], description: str) -> int:
    """Carries out what ``argv`` asks for; the exit status: 1 if a run failed or the loss is not one process's."""
    asked = NodeComparison(argv, description)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 140)
    about = machine.about("benchmarks/compare.py")
    caption = machine.caption(about["machine"], about["versions"], about["commit"])
    untimed, timed = asked.untimed(), asked.timed()
    probes: list[Probe] = []
    with asked.hosts as hosts:
        session = Session(console, asked.limit_s, node_cases.start_on(hosts), node_cases.read)
        console.print(
            f"{len(untimed) + len(timed)} runs on up to {max(asked.nodes)} hosts of a virtual cluster, {caption}", highlight=False
        )
        try:
            probes += hosts.probe_all(asked.rates, console)
            session.carry_out(untimed)
            session.carry_out(timed)
        except KeyboardInterrupt:
            path = record(asked, session, about, probes, None)
            console.print(f"\nStopped. The {len(session.samples)} runs made so far are in {path}.", highlight=False)
            return 130
    found = node_summary.summarise(session, asked.cases(), asked.one, asked.cores, probes, asked.config)
    paths = [record(asked, session, about, probes, found)]
    console.print()
    node_report.show(console, found, asked.cores, asked.threads)
    for sentence in node_report.sentences(found):
        console.print(sentence, markup=False, highlight=False)
    node_report.show_prediction(console, found)
    well = node_report.verdicts(console, session, found)
    if found.rows:
        paths += node_plots.draw(found, asked.output, caption, asked.cores, asked.threads, asked.per_node)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well else 1
