"""What a person reads at the end of compare.py --nodes, on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from benchmarks.harness import lossy
from benchmarks.harness.cluster import rate_text
from benchmarks.harness.node_summary import Found, Row, off
from benchmarks.harness.prediction import ASSUMPTIONS
from benchmarks.harness.report import OVERSUBSCRIBED, cell, show_failures, show_noisy, table
from benchmarks.harness.session import Session

MILLION = 1e6


def link_words(rate: str) -> str:
    """``link: 100 Mbit/s``."""
    return f"link: {rate_text(rate)}"


def show(console: Console, found: Found, cores: int, threads: int) -> None:
    """The tables: links, throughput per link, loss."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    s = "s" * (threads > 1)
    made = table(
        "Links: what a plain socket gets; α + n/β of a ring's step",
        "asked for", "measured", "round trip ms", "α µs", "β MB/s", "fit off by (median)",
    )  # fmt: skip
    for probe in found.probes:
        link = found.links.get(probe.rate)
        fitted = ("–", "–", "–")
        if link and link.fit:
            beta = f"{link.beta_bytes_per_s / MILLION:,.1f}" if link.beta_bytes_per_s < float("inf") else "∞"
            fitted = (f"{link.alpha_s * MILLION:,.0f}", beta, f"{link.fit.median_error:.0%}")
        made.add_row(rate_text(probe.rate), probe.measured_text, f"{1e3 * probe.round_trip_s:.2f}", *fitted)
    console.print(made)
    console.print()
    one = f"one rank with {threads} thread{s}" + (f" ({found.one.median:,.0f} samples/s)" if found.one else "")
    for probe in found.probes:
        shown = table(
            f"{link_words(probe.rate)}; speedup: samples/s against those of {one}",
            "gradients", "nodes", "ranks", "samples/s", "speedup", "predicted", "predicted / measured", "step ms", "MB sent a step",
        )  # fmt: skip
        for row in (r for r in found.rows if r.case.nodes == 1 or r.case.rate == probe.rate):
            star = OVERSUBSCRIBED * row.oversubscribed
            shown.add_row(
                _who(found.rows, row), f"{row.case.nodes}{star}", str(row.case.world_size), cell(row.samples_per_second, 0),
                cell(row.speedup), f"{row.predicted:.2f}" if row.predicted is not None else "–",
                f"{row.ratio:.2f}" if row.ratio is not None else "–", cell(row.step_seconds, 1, 1e3),
                f"{row.sent_bytes / MILLION:.3g}" if row.sent_bytes else "–",
            )  # fmt: skip
        console.print(shown)
        console.print()
    console.print(_loss(found.rows))
    console.print()
    if any(row.oversubscribed for row in found.rows):
        say(
            f"{OVERSUBSCRIBED} more ranks × threads than the {cores} cores here: the hosts share them, so what is measured there "
            "is not what as many machines would reach. The prediction is: it gives each rank cores of its own."
        )
    if parts := {row.case.way.passes for row in found.rows if row.case.way.passes > 1}:
        for k in sorted(parts):
            say(
                f"--accumulate {k}: a step is {k} backward passes and one all-reduce, so its batch is {k} times as large here. "
                "Compare its samples/s, not its steps; it learns in fewer, larger steps."
            )


def _who(rows: Sequence[Row], row: Row) -> str:
    several = len({r.case.launcher for r in rows if r.case.world_size > 1}) > 1
    return f"{row.case.launcher}, {row.case.way.title}" if several else row.case.way.title


def _loss(rows: Sequence[Row]) -> object:
    made = table(
        "Loss: is it one process's? What loses something on purpose: how far off",
        "gradients", "nodes", "fp64, whole curve", "first 20 steps", "train loss", "accuracy, points", "verdict",
    )  # fmt: skip
    seen = set()
    for row in rows:
        key = (row.case.launcher, row.case.nodes, row.case.way)
        if key in seen or row.case.world_size == 1:
            continue
        seen.add(key)
        p, less = row.parity, row.lost
        made.add_row(
            _who(rows, row), str(row.case.nodes),
            f"{p.fp64:.1e}" if p.fp64 is not None else "–",
            f"{p.fp32:.1e}" if p.fp32 is not None else "–",
            f"{less.train_loss:+.2%}" if less and less.train_loss is not None else "–",
            f"{less.accuracy_points:+.2f}" if less and less.accuracy_points is not None else "–",
            p.verdict().partition(":")[0],
        )  # fmt: skip
    return made


def sentences(found: Found) -> list[str]:
    """What follows from the tables: what each link costs, and how good the prediction is."""
    told = [probe.complaint for probe in found.probes if probe.complaint]
    for probe in found.probes:
        rows = [r for r in found.rows if r.case.nodes > 1 and r.case.rate == probe.rate]
        if not rows:
            continue
        fewest = min(r.case.nodes for r in rows)
        there = sorted((r for r in rows if r.case.nodes == fewest), key=lambda r: r.speedup.median, reverse=True)
        plain = next((r for r in there if r.case.way.title == "ddp"), None)
        words = [f"{fewest} nodes, {rate_text(probe.rate)}:"]
        if plain and (link := found.links.get(probe.rate)) and (model := found.models.get("ddp")):
            reduce_ms = 1e3 * link.all_reduce_seconds(plain.sent_bytes, plain.case.world_size)
            own = 1e3 * model.compute_seconds(plain.case.world_size)
            words.append(f"by α and β an all-reduce of the gradients takes {reduce_ms:.3g} ms, computing a step {own:.3g} ms;")
        if plain:
            words.append(f"plain ddp is {plain.speedup.median:.2f} times as fast as one rank;")
        if len(there) > 1:
            words.append(f"fastest is {there[0].case.way.title} ({there[0].speedup.median:.2f} times).")
        told.append(" ".join(words).rstrip(":;") + "." * (words[-1][-1] in ":;"))
    for shares, where in ((False, "where each rank has cores of its own"), (True, "where ranks share cores")):
        if how := off([r for r in found.rows if r.oversubscribed == shares]):
            told.append(
                f"Predictions are off by {how.median:.0%} (median) and {how.largest:.0%} at most ({how.where.name}) {where}."
            )
    return told


def verdicts(console: Console, session: Session, found: Found) -> bool:
    """The verdicts on the loss, and what went wrong; whether all is well."""
    well = True
    judged = [r for r in found.rows if r.parity.holds is not None]
    if broken := list(dict.fromkeys(r.case.name for r in judged if not r.parity.holds)):
        well = False
        console.print(f"PARITY BROKEN: {'; '.join(broken)} did not compute one process's loss.", style="bold red", highlight=False)
    elif judged:
        worst = max(r.parity.fp64 for r in judged if r.parity.fp64 is not None)
        nodes = sorted({r.case.nodes for r in judged})
        console.print(
            f"Same loss: what loses nothing agrees with one process, on {' and '.join(map(str, nodes))} nodes "
            f"({len(judged)} cases, float64, worst relative difference {worst:.0e}).",
            highlight=False,
        )
    if losses := [r.lost for r in found.rows if r.lost]:
        console.print(lossy.sentence(losses), markup=False, highlight=False)
    if same := found.same_at_every_rate():
        if wrong := [name for name, equal in same.items() if not equal]:
            well = False
            console.print(
                f"Links changed the result: {'; '.join(wrong)} did NOT end with the same parameters to the bit at every rate.",
                style="bold red", highlight=False,
            )  # fmt: skip
        else:
            console.print("A link's rate changes nothing but time: the same parameters to the bit at every rate.", highlight=False)
    if names := [r.case.name for r in found.rows if r.samples_per_second.noisy]:
        show_noisy(console, names)
    return show_failures(console, session) and well


def show_prediction(console: Console, found: Found) -> None:
    """What the prediction is made of."""
    if not found.models:
        return
    compute = next(iter(found.models.values())).compute
    console.print(
        f"Prediction: one rank's backward pass and step take {1e3 * compute.alpha_s:.3g} ms and "
        f"{MILLION / compute.beta_bytes_per_s:.3g} µs a sample; the links' α and β as above. "
        f"It assumes that {'; '.join(ASSUMPTIONS)}.",
        markup=False, highlight=False,
    )  # fmt: skip
