"""What a person reads at the end of a comparison, on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import lossy
from benchmarks.harness.lossy import Lost
from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread
from benchmarks.harness.summary import Row, noisy, same_to_the_bit
from common.config import TrainConfig

OVERSUBSCRIBED = "*"


def cell(value: Spread | None, digits: int = 2, scale: float = 1.0) -> str:
    """``value`` times ``scale`` for a table."""
    if value is None:
        return "–"
    return Spread(value.median * scale, value.low * scale, value.high * scale, value.samples).text(digits)


def _ranks(row: Row) -> str:
    return f"{row.case.world_size}{OVERSUBSCRIBED if row.oversubscribed else ''}"


def table(title: str, *columns: str) -> Table:
    """An empty table in the project's style; the first column is what the rows are about."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="", pad_edge=False, box=None)
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    return made


def _lost(lost: Lost | None) -> tuple[str, str, str]:
    if lost is None:
        return "–", "–", "–"
    return (
        "–" if lost.curve is None else f"{lost.curve:.1e}",
        "–" if lost.train_loss is None else f"{lost.train_loss:+.2%}",
        "–" if lost.accuracy_points is None else f"{lost.accuracy_points:+.2f}",
    )


def way(config: TrainConfig) -> str:
    """How gradients become one, for the beginning of a caption."""
    extra = "".join(
        f", {text}" for text in (config.compress and f"--compress {config.compress}", _half(config) and config.precision) if text
    )
    return f"--sync {config.sync}{extra}; "


def other_loops(launchers: Sequence[str]) -> str:
    """What a caption says of those among ``launchers`` whose samples come in another order than ours, so that losses differ."""
    orders = {"tutorial": "DistributedSampler's, padded", "hf_trainer": "the Trainer's own, the last batch filled up"}
    told = [f"{name}: {orders[name]}" for name in launchers if name in orders]
    return f"Order of samples: {'; '.join(told)}: not compared step by step. " if told else ""


def _half(config: TrainConfig) -> bool:
    return config.precision not in ("fp32", "fp64")


def show_way(console: Console, rows: list[Row], config: TrainConfig) -> None:
    """Says how gradients became one: with --sync auto, what it chose for each launcher."""
    if config.sync != "auto":
        return
    chosen: dict[str, list[str]] = {}
    for row in rows:
        if row.sync and row.case.world_size > 1:
            chosen.setdefault(row.sync, []).append(row.case.name)
    for name, launched in chosen.items():
        console.print(f"--sync auto chose {name} for {'; '.join(launched)}.", markup=False, highlight=False)


def show(console: Console, rows: list[Row], cores: int, threads: int, weak: bool) -> None:
    """The tables: time, speedup, loss."""
    s = "s" * (threads > 1)
    time = table(
        f"Time: median (range), {threads} thread{s} per rank",
        "launcher", "ranks", "command s", "launch s", "training s", "leaving s", "samples/s", "MiB/rank",
    )  # fmt: skip
    scaling = "weak scaling: N·t(1)/t(N)" if weak else "strong scaling: t(1)/t(N)"
    gain = table(
        f"Speedup over one process, {scaling}",
        "launcher", "ranks", f"training vs {threads} thread{s}", "efficiency", f"training vs {cores} threads",
        f"command vs {threads} thread{s}", f"command vs {cores} threads",
    )  # fmt: skip
    loses = any(row.lost for row in rows)
    judged = ("first 20 steps", "train loss", "accuracy, points") if loses else ("fp64, whole curve", "fp32, 20 steps", "verdict")
    title = "Loss: how far from one lossless process's?" if loses else "Loss: is it the single process's?"
    loss = table(title, "launcher", "ranks", "train loss", "eval loss", "accuracy", *judged)
    for row in rows:
        f, head = row.figures, (row.name, _ranks(row))
        time.add_row(
            *head,
            cell(f["wall_seconds"]), cell(f["launch_seconds"]), cell(f["train_seconds"]), cell(f["leave_seconds"]),
            cell(f["samples_per_second"], 0), f"{m.median / 2**20:,.0f}" if (m := f["peak_memory_bytes"]) else "–",
        )  # fmt: skip
        gain.add_row(
            *head,
            cell(row.speedup["train_seconds/one_rank"]), f"{e.median:.0%}" if (e := row.efficiency) else "–",
            cell(row.speedup["train_seconds/all_threads"]), cell(row.speedup["wall_seconds/one_rank"]),
            cell(row.speedup["wall_seconds/all_threads"]),
        )  # fmt: skip
        parity = row.parity
        loss.add_row(
            *head,
            f"{x.median:.5f}" if (x := f["train_loss_per_epoch"]) else "–",
            f"{x.median:.5f}" if (x := f["eval_loss_per_epoch"]) else "–",
            f"{x.median:.2%}" if (x := f["eval_accuracy"]) else "–",
            *(_lost(row.lost) if loses else (
                f"{parity.fp64:.1e}" if parity and parity.fp64 is not None else "–",
                f"{parity.fp32:.1e}" if parity and parity.fp32 is not None else "–",
                parity.verdict() if parity else "–",
            )),
        )  # fmt: skip
    for each in (time, gain, loss):
        console.print(each)
        console.print()
    if any(row.oversubscribed for row in rows):
        console.print(f"{OVERSUBSCRIBED} oversubscribed: more ranks × threads than the {cores} cores here.", highlight=False)


def verdicts(console: Console, session: Session, rows: list[Row]) -> bool:
    """Sentences that follow from the tables; returns whether all is well."""
    well = True
    judged = [row for row in rows if row.parity and row.parity.holds is not None]
    broken = [row.case.name for row in judged if row.parity and not row.parity.holds]
    if broken:
        well = False
        console.print(f"PARITY BROKEN: {'; '.join(broken)} did not compute the single process's loss.", style="bold red")
    elif judged:
        worst = max(row.parity.fp64 for row in judged if row.parity and row.parity.fp64 is not None)
        console.print(
            f"Same loss: all {len(judged)} agree with the single process (float64, worst relative difference {worst:.0e})."
        )
    for reason in sorted({row.parity.verdict() for row in rows if row.parity and not row.parity.promised}):
        console.print(f"Same loss {reason}.")
    if losses := [row.lost for row in rows if row.lost and row.parity and not row.parity.promised]:
        console.print(lossy.sentence(losses), markup=False, highlight=False)
    for world_size, same in same_to_the_bit(rows).items():
        told = "ended with the same parameters to the bit" if same else "did NOT end with the same parameters to the bit"
        console.print(f"At {world_size} rank{'s' * (world_size > 1)} all launchers {told}.", style="" if same else "bold red")
        well = well and same
    if names := noisy(rows):
        show_noisy(console, names)
    return show_failures(console, session) and well


def show_noisy(console: Console, names: list[str]) -> None:
    """Says that the cases ``names`` differ too much from repeat to repeat."""
    console.print(
        f"Noisy: the repeats of {'; '.join(names)} differ by more than a quarter. Close other programs, or ask for "
        "--repeats 7; do not read small differences from this run.",
        style="yellow",
    )


def show_failures(console: Console, session: Session) -> bool:
    """Tells of every run that went wrong, with its last words; returns whether there was none."""
    for sample in session.failures:
        console.print("FAILED: ", style="bold red", end="")
        console.print(f"{sample.failure}\ncommand: {sample.command}", markup=False, highlight=False)
    return not session.failures


def batch_table(points: list[dict[str, Any]], target: float) -> Table:
    """One row a launcher, world size and batch size."""
    made = table(
        "Batch sizes: median (range)",
        "launcher", "ranks", "batch size", "learning rate", "samples/s", f"training s to {target:.0%}",
    )  # fmt: skip
    for p in points:
        reached = cell(p["seconds_to_target"]) if p["seconds_to_target"] or not p["has_accuracy"] else "not reached"
        made.add_row(
            p["launcher"], str(p["world_size"]), str(p["batch_size"]), f"{p['learning_rate']:g}",
            cell(p["samples_per_second"], 0), reached,
        )  # fmt: skip
    return made
