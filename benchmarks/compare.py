"""The main job: the same training under each launcher, against one process: time, loss, speedup.

    python benchmarks/compare.py
    python benchmarks/compare.py --launchers plain mpi --world_sizes 1 2 4 8 --repeats 7 --job random --output out/random
    python benchmarks/compare.py --batch_sizes 16 32 64 128 --launchers torchrun --world_sizes 1 2
    python benchmarks/compare.py --nodes 1 2 4 --rate unlimited 1gbit 100mbit          over several hosts, of a virtual cluster

Launchers are run as a user would run them, one after the other, the repeats interleaved. Flags that are not listed here go to the
launchers (--epochs 10, --lr 0.01, --model my.module:Net …).
"""

import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.harness import batch_sizes, cases, machine, node_comparison, plots, prediction, prediction_report, report, summary
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.node_main import compare_nodes
from benchmarks.harness.session import Session
from common.errors import exit_status
from common.files import write_json

SCHEMA_VERSION = 1


def record(
    asked: Comparison,
    session: Session,
    about: dict[str, Any],
    rows: list[dict[str, Any]],
    complete: bool,
    predicted: prediction.Prediction | None = None,
) -> Path:
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
            "sync": asked.config.sync,
            "compress": asked.config.compress,
            "precision": asked.config.precision,
            "links": [known.name for known in asked.links],
            "flags": asked.flags,
        },
        "summary": rows,
        "prediction": predicted and predicted.as_json(),
        "samples": [sample.as_json() for sample in session.samples],
    }
    write_json(path, content)
    return path


def main() -> int:
    """Runs, writes, draws, tells."""
    if node_comparison.wanted(sys.argv[1:]):
        return compare_nodes(sys.argv[1:], __doc__ or "")
    asked = Comparison(sys.argv[1:], __doc__ or "")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops everything and keeps what was measured
    console = Console(width=None if sys.stdout.isatty() else 132)
    about = machine.about("benchmarks/compare.py")
    caption = report.way(asked.config) + machine.caption(about["machine"], about["versions"], about["commit"])
    session = Session(console, asked.limit_s)
    untimed, timed = ([], asked.sized()) if asked.batch_sizes else (asked.untimed(), asked.timed())
    console.print(f"{len(untimed) + len(timed)} runs on {caption}", highlight=False)
    caption = report.other_loops(asked.launchers) + caption
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
    predicted = prediction.predict(session, rows, asked.links, asked.threads, asked.weak) if asked.links else None
    paths = [record(asked, session, about, [row.as_json() for row in rows], complete=True, predicted=predicted)]
    report.show(console, rows, asked.cores, asked.threads, asked.weak)
    report.show_way(console, rows, asked.config)
    well = report.verdicts(console, session, rows)
    if predicted:
        prediction_report.show(console, predicted)
        paths += prediction_report.picture(predicted, asked.output, caption, asked.threads)
    elif asked.links:
        console.print("No prediction: one process's step was not measured at three batch sizes or more.", highlight=False)
    if asked.note:
        console.print(asked.note, markup=False, highlight=False)
    if any(row.figures["train_seconds"] for row in rows):
        paths += plots.speedup(rows, asked.output, caption, asked.cores, asked.threads, asked.weak)
        paths += plots.wall_clock(rows, asked.output, caption)
        paths += plots.loss(session, rows, asked.output, caption, asked.threads, asked.weak)
        if set(asked.launchers) & set(cases.PEERS):
            paths += plots.learning(session, rows, asked.output, caption)
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well else 1


def finish_batch_sizes(asked: Comparison, session: Session, console: Console, about: dict[str, Any], caption: str) -> int:
    """The table, file and picture of --batch_sizes."""
    points = batch_sizes.points(session, asked.target)
    paths = [record(asked, session, about, [batch_sizes.as_json(p) for p in points], complete=True)]
    console.print(report.batch_table(points, asked.target))
    if points:
        paths += plots.batch_sizes(points, asked.output, caption, asked.target, asked.rule)
    well = report.verdicts(console, session, [])
    console.print(f"Written to {asked.output}: {', '.join(p.name for p in paths)}", highlight=False)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
