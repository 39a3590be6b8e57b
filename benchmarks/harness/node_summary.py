"""From the runs of compare.py --nodes to figures: throughput against one rank's, the predicted one, what was lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness import collective_report, links
from benchmarks.harness.cases import Case
from benchmarks.harness.cluster import Probe, rate_text
from benchmarks.harness.links import FEWEST_SIZES, Link
from benchmarks.harness.lossy import Lost, lost
from benchmarks.harness.node_cases import LINK, PLAIN, NodeCase
from benchmarks.harness.parity import Parity, judge
from benchmarks.harness.prediction import ASSUMPTIONS, Model, gradient_bytes, steps_of_one
from benchmarks.harness.session import Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import by_repeat, first_result
from common.config import TrainConfig

RATE, STEP = "samples_per_second_later", "step_seconds_later"


@dataclass(frozen=True)
class Row:
    """All about one case."""

    case: NodeCase
    oversubscribed: bool
    """More ranks × threads than cores."""
    samples_per_second: Spread
    step_seconds: Spread
    speedup: Spread
    """Samples per second over those of one rank with as many threads, in the same repeat."""
    sent_bytes: float
    """What a rank hands to the collectives in a step."""
    predicted: float | None
    """Speedup; None where there is no link, or nothing to predict by."""
    parity: Parity
    lost: Lost | None
    parameters: str | None
    """SHA-256 of the trained parameters, if all repeats agree."""

    @property
    def ratio(self) -> float | None:
        """Predicted / measured speedup."""
        return self.predicted / self.speedup.median if self.predicted is not None else None

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        case = self.case
        return {
            "launcher": case.launcher,
            "nodes": case.nodes,
            "world_size": case.world_size,
            "rate": case.rate if case.nodes > 1 else None,
            "way": case.way.title,
            "threads": case.threads,
            "oversubscribed": self.oversubscribed,
            "samples_per_second": self.samples_per_second.as_json(),
            "step_seconds": self.step_seconds.as_json(),
            "speedup": self.speedup.as_json(),
            "sent_bytes_per_step": self.sent_bytes,
            "predicted_speedup": self.predicted,
            "predicted_over_measured": self.ratio,
            "parity": self.parity.as_json(),
            "lost": self.lost and self.lost.as_json(),
            "parameter_sha256": self.parameters,
        }


@dataclass(frozen=True)
class Found:
    """All that the runs gave."""

    rows: list[Row]
    one: Spread | None
    """Samples per second of one rank."""
    probes: list[Probe]
    links: dict[str, Link] = field(default_factory=dict)
    """By rate: α and β as ``link_nodes`` nodes found them."""
    models: dict[str, Model] = field(default_factory=dict)
    """By the title of a way: its step, on as many ranks as it was last measured with."""

    def of(self, rate: str, title: str, launcher: str) -> list[Row]:
        """The rows of a way and launcher over links of ``rate``, by nodes; on one host there is none.

        One rank sends nothing, so compressing begins where plain ddp does.
        """
        most = max(r.case.world_size for r in self.rows if r.case.nodes == 1)
        begins = PLAIN if most == 1 and title.startswith("--compress") else title
        mine = [r for r in self.rows if r.case.way.title == (begins if r.case.nodes == 1 else title)]
        mine = [r for r in mine if r.case.nodes > 1 or r.case.world_size == most]
        return [r for r in mine if (r.case.nodes == 1 and r.case.launcher in (launcher, "plain")) or
                (r.case.rate, r.case.launcher) == (rate, launcher)]  # fmt: skip

    def same_at_every_rate(self) -> dict[str, bool]:
        """{launcher, nodes and way: whether the parameters at the end are the same to the bit at all rates}; of several rates.

        PowerSGD's differ in the last bits from one run to the next, whatever the link.
        """
        found = {}
        for case in dict.fromkeys(replace(r.case, rate="") for r in self.rows if r.case.nodes > 1):
            if case.way.compress == "powersgd":
                continue
            mine = [r.parameters for r in self.rows if replace(r.case, rate="") == case]
            if len(mine) > 1:
                found[f"{case.title}, {case.nodes} nodes, {case.way.title}"] = len(set(mine)) == 1 and None not in mine
        return found

    def prediction_as_json(self) -> dict[str, Any] | None:
        """For a result file."""
        if not self.models:
            return None
        compute = next(iter(self.models.values())).compute
        return {
            "formula": "t(N) = K·(c0 + c1·b) + 2(N-1)·(α + S/(N·β)), K backward passes a step",
            "assumptions": ASSUMPTIONS,
            "compute_fit": {"fixed_seconds": compute.alpha_s, "seconds_per_sample": 1 / compute.beta_bytes_per_s},
            "compute_fit_error": {"median": compute.median_error, "largest": compute.largest_error},
            "links": [link.as_json() | {"rate": rate} for rate, link in self.links.items()],
        }


def effective_bytes(sent: float, compress: str, ranks: int) -> float:
    """The bytes whose ring all-reduce moves as much as ``sent`` bytes of each rank do.

    int8's messages are not summed on the way: each rank gets those of all others, (N-1)·S, where an all-reduce of S' moves
    2(N-1)/N·S'.
    """
    return sent * ranks / 2 if compress == "int8" else sent


def summarise(
    session: Session, cases: Sequence[NodeCase], one: Case, cores: int, probes: list[Probe], config: TrainConfig
) -> Found:
    """A row a case that gave something, with the prediction where the runs that it needs are there."""
    base, alone = session.of("timed", one), by_repeat(session.of("timed", one), RATE)
    known = measured_links(session)
    steps = steps_of_one(session, one.threads)
    compute = links.fit([s.samples for s in steps], [s.seconds.median for s in steps]) if len(steps) >= FEWEST_SIZES else None
    rows, models = [], {}
    for case in [NodeCase("plain", 1, one.threads), *cases]:  # the first is what all is measured against
        timed = session.of("timed", case if case in cases else one)
        first = first_result(timed)
        rate, seconds = spread([s.value(RATE) for s in timed]), spread([s.value(STEP) for s in timed])
        speedup = paired_ratio(by_repeat(timed, RATE), alone)
        if not first or not rate or not seconds or not speedup:
            continue
        sent, predicted = (gradient_bytes(first) if case.world_size > 1 else 0.0), None
        if compute and known:
            model = Model(compute, sent, config.global_batch(1), passes=case.way.passes)
            models[case.way.title] = model
            if case.nodes > 1 and (link := known.get(case.rate)):
                predicted = predicted_speedup(model, link, case.world_size, case.way.compress)
        whole = first_result(base) if case.way.passes == 1 else first_result(_of_way(session, "reference", case))
        parity = judge(
            first_result(session.of("fp64", replace(case, rate="unlimited"))),
            first_result(_of_way(session, "fp64 reference", case)),
            first,
            whole,
        )
        digests = {s.result.get("parameter_sha256") for s in timed if s.result}
        rows.append(
            Row(
                case,
                case.world_size * case.threads > cores,
                rate,
                seconds,
                speedup,
                sent,
                predicted,
                parity,
                None if parity.promised else lost(first, whole),
                digests.pop() if len(digests) == 1 else None,
            )
        )
    return Found(rows, spread(list(alone.values())), probes, known, models)


def _of_way(session: Session, role: str, case: NodeCase) -> list[Any]:
    return [s for s in session.of(role) if s.job.label.endswith(f" for {case.way.title}")]


def predicted_speedup(model: Model, link: Link, ranks: int, compress: str) -> float:
    """Of ``ranks`` ranks over ``link``."""
    return replace(model, gradient_bytes=effective_bytes(model.gradient_bytes, compress, ranks)).speedup(link, ranks)


def measured_links(session: Session) -> dict[str, Link]:
    """{rate: the link behind the all-reduces that were measured over it}."""
    fitted = collective_report.fits(collective_report.summarise(session, LINK))
    return {f.case.variant: Link.measured(rate_text(f.case.variant), f.fit, f.case.world_size) for f in fitted}


@dataclass(frozen=True)
class Off:
    """How far predictions are from measurements: |predicted / measured - 1|."""

    median: float
    largest: float
    where: NodeCase


def off(rows: Sequence[Row]) -> Off | None:
    """Of the rows that have a prediction."""
    found = [(abs(ratio - 1), row.case) for row in rows if (ratio := row.ratio) is not None]
    if not found:
        return None
    largest, where = max(found, key=lambda each: each[0])
    return Off(statistics.median(error for error, _ in found), largest, where)
