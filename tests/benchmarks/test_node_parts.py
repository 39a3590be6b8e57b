"""compare.py --nodes without hosts: what is asked for, what is run, how figures come from runs, what is told and drawn."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import collective_loop
from benchmarks.collective_ranks import rank_from_environment
from benchmarks.harness import cases, cluster, node_cases, node_comparison, node_plots, node_report, node_summary
from benchmarks.harness.cases import Case
from benchmarks.harness.cluster import Probe
from benchmarks.harness.collective_report import Row as CollectiveRow
from benchmarks.harness.collective_report import link_sentences
from benchmarks.harness.collective_runs import Plan
from benchmarks.harness.links import Fit, Link
from benchmarks.harness.node_cases import LINK, NodeCase, NodeWay
from benchmarks.harness.node_comparison import NodeComparison, wanted
from benchmarks.harness.prediction import Model
from benchmarks.harness.session import Job, Sample, Session
from benchmarks.harness.statistics import Spread
from common.command_line import parse_config
from common.errors import RunError, UsageError

DDP, FP16, FOUR = NodeWay(), NodeWay("fp16"), NodeWay(passes=4)


# -------------------------------------------------------------------------------------------------------------- links


def test_rates():
    assert [cluster.parse_rate(text) for text in ("Unlimited", "100Mbit", "2.5gbit")] == ["unlimited", "100mbit", "2.5gbit"]
    assert [cluster.rate_text(rate) for rate in ("unlimited", "1gbit", "100mbit", "512kbit")] == [
        "unlimited", "1 Gbit/s", "100 Mbit/s", "512 kbit/s",
    ]  # fmt: skip
    assert cluster.bytes_per_s("100mbit") == 12.5e6 and cluster.bytes_per_s("unlimited") is None
    for wrong in ("fast", "0mbit", "100", "-1mbit", ""):
        with pytest.raises(ValueError, match="unlimited, or a number with kbit, mbit or gbit"):
            cluster.parse_rate(wrong)


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (Probe("100mbit", 95.6e6, 1e-4), ""),
        (Probe("unlimited", 5e9, 1e-4), ""),
        (Probe("100mbit", 62e6, 1e-4), "The 100 Mbit/s link carries 62 Mbit/s: read its figures as those of such a link."),
        (Probe("1gbit", 4e9, 1e-4), "carries 4 Gbit/s"),
        (Probe("unlimited", 4e9, 0.0042, 0.002), ""),
        (Probe("100mbit", 62e6, 0.009, 0.002), "carries 62 Mbit/s and has a round trip of 9.00 ms, not 4:"),
    ],
)
def test_a_link_that_is_not_what_was_asked_for_is_told(probe, words):
    assert words in probe.complaint and bool(words) == bool(probe.complaint)
    assert json.loads(json.dumps(probe.as_json()))["measured_bits_per_s"] == probe.bits_per_s


def test_fewer_calls_over_a_slow_link():
    calls = [collective_loop.iterations(size, 12.5e6) for size in (2**10, 2**16, 2**19, 2**22)]
    assert calls == [200, 190, 23, 10]
    assert collective_loop.iterations(2**22, 1e12) == collective_loop.iterations(2**22) == 64


def test_ranks_of_several_hosts(monkeypatch):
    plan = Plan.from_text(Plan("gloo", 4, ("all_reduce",), (1024,), 60.0, nodes=2, bytes_per_s=1e6).as_text())
    for name, value in {"RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    rank = rank_from_environment(plan)
    assert (rank.rank, rank.local_rank, rank.local_world_size, rank.node_rank, rank.world_size) == (3, 1, 2, 1, 4)
    assert (rank.master_addr, rank.master_port, rank.one_node) == ("node1", 29500, False)
    alone = rank_from_environment(Plan("gloo", 4, (), (), 1.0))
    assert (alone.local_rank, alone.master_addr, alone.one_node) == (3, "127.0.0.1", True)


def test_how_much_of_a_links_rate_an_all_reduce_gets():
    def row(rate, size, seconds):
        return CollectiveRow(Case("gloo", 4, 1, rate), "all_reduce", size, size, {0: seconds})

    told = link_sentences([row("100mbit", 1000, 0.001), row("100mbit", 10**6, 0.15), row("unlimited", 10**6, 0.01)])
    # 1 MB over 4 ranks: 1.5 MB cross each link, 0.12 s at 12.5 MB/s.
    assert told == ["all_reduce of 976.6 KiB, gloo (100mbit), 4 ranks: 80% of what the link's rate allows."]


# -------------------------------------------------------------------------------------------------------- what is asked


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Makes a NodeComparison; whether a cluster can be made here does not matter, since none is."""
    monkeypatch.setattr(cluster, "missing", lambda: "")
    monkeypatch.setattr(node_comparison.machine, "usable_cores", lambda: 2)
    return lambda *flags: NodeComparison([*flags, "--output", str(tmp_path / "out")])


def test_without_nodes_nothing_changes():
    assert not wanted([]) and not wanted(["--world_sizes", "1", "2"]) and wanted(["--nodes", "1", "2"])
    with pytest.raises(UsageError, match="--rate without --nodes"):
        wanted(["--rate", "1gbit"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "1"], "one host has no link"),
        (["--nodes", "0", "2"], "--nodes 0: not allowed"),
        (["--nodes", "2", "--rate", "fast"], "--rate fast: not allowed"),
        (["--nodes", "2", "--delay", "soon"], "--delay soon: not allowed"),
        (["--nodes", "2", "--ways", "zip"], "--ways zip: not allowed"),
        (["--nodes", "2", "--ways", "accumulate:1"], "--ways accumulate:1: not allowed"),
        (["--nodes", "2", "--compress", "fp16"], "--ways sets it"),
        (["--nodes", "2", "--accumulate=2"], "--ways sets it"),
        (["--nodes", "2", "--launchers", "mpi"], "--launchers mpi: not allowed"),
        (["--nodes", "2", "--world_sizes", "2"], "--world_sizes with --nodes"),
        (["--nodes", "2", "--link", "25,10"], "--link with --nodes"),
        (["--nodes", "2", "--scaling", "weak"], "--scaling weak with --nodes"),
        (["--nodes", "2", "--batch_size", "8"], "--batch_size with --nodes"),
        (["--nodes", "2", "--sync", "shared_memory"], "--sync shared_memory with --nodes"),
        (["--nodes", "2", "--threads", "as_shipped"], "--threads as_shipped"),
        (["--nodes", "2", "--nnodes", "2"], "sets it itself"),
        (["--nodes", "2", "--ways", "accumulate:100"], "larger than the data"),
        (["--nodes", "2", "--ways", "fp16", "--sync", "by_hand"], "only ddp sends gradients smaller"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(asked, flags, words):
    with pytest.raises(UsageError, match=words) as refused:
        asked(*flags)
    assert "\n" not in str(refused.value)


def test_where_no_cluster_can_be_made_one_line_says_so(asked, monkeypatch):
    monkeypatch.setattr(cluster, "missing", lambda: "a virtual cluster needs iproute2: apt install iproute2")
    with pytest.raises(UsageError, match="apt install iproute2"):
        asked("--nodes", "1", "2")


def test_the_runs_of_the_default_comparison(asked):
    it = asked("--nodes", "1", "2", "4", "--repeats", "2")
    assert it.threads == 1 and it.rates == ["unlimited", "1gbit", "100mbit"]
    cases = it.cases()
    assert [c.name for c in cases[:2]] == ["1 node, --accumulate 4", "2 nodes, unlimited, ddp"]
    assert len(cases) == 1 + 2 * 3 * 4 and {c.world_size for c in cases} == {1, 2, 4}
    jobs = it.timed()
    first, second = ([j for j in jobs if j.repeat == r] for r in (0, 1))
    assert [(j.case, j.role) for j in second] == [(j.case, j.role) for j in first][::-1], "the order turns round"
    assert len(first) == 1 + 25 + 3 + 3, "one rank, the cases, three smaller batches, three links"
    order = [r for j in first if (r := j.case.variant if j.role == LINK else getattr(j.case, "nodes", 1) > 1 and j.case.rate)]
    assert order == sorted(order, key=it.rates.index), "a rate stays until all of its runs are made"
    links = [Plan.from_text(j.flags[0]) for j in first if j.role == LINK]
    assert [(p.nodes, p.world_size, p.bytes_per_s) for p in links] == [(2, 2, None), (2, 2, 1.25e8), (2, 2, 1.25e7)]
    assert len({j.flags.index("--epochs") for j in first if j.role == "timed"}) >= 1


def test_what_each_way_adds_to_the_command_line(asked):
    it = asked("--nodes", "1", "2", "--ways", "ddp", "int8", "accumulate:3", "--rate", "1gbit", "--lr", "0.02")

    def config(way, ranks):
        case = next(c for c in it.cases() if (c.way.title, c.world_size) == (way, ranks))
        return parse_config("spawn.py", argv=it.flags_of(case))

    assert (config("ddp", 2).compress, config("ddp", 2).global_batch_size, config("ddp", 2).learning_rate) == (None, 64, 0.02)
    assert config("--compress int8", 2).compress == "int8"
    for ranks in (1, 2):
        assert (config("--accumulate 3", ranks).accumulate, config("--accumulate 3", ranks).global_batch_size) == (3, 192)


def test_what_the_verdict_needs(asked):
    it = asked("--nodes", "1", "2", "4")
    jobs = it.untimed()
    told = [(j.role, j.label, getattr(j.case, "nodes", 1)) for j in jobs]
    assert told == [
        ("fp64 reference", "float64 reference for ddp", 1),
        ("fp64 reference", "float64 reference for --accumulate 4", 1),
        ("reference", "reference for --accumulate 4", 1),
        ("fp64", "float64", 2), ("fp64", "float64", 2), ("fp64", "float64", 4), ("fp64", "float64", 4),
    ]  # fmt: skip
    configs = [parse_config("spawn.py", argv=list(j.flags)) for j in jobs]
    assert [c.precision for c in configs] == ["fp64", "fp64", "fp32", *["fp64"] * 4]
    assert [c.accumulate for c in configs] == [1, 1, 1, 1, 4, 1, 4], "a reference takes its batch at once"
    assert [c.global_batch_size for c in configs] == [64, 256, 256, 64, 256, 64, 256]
    assert asked("--nodes", "2", "--no_parity").untimed() == []
    assert asked("--nodes", "2", "--precision", "bf16").untimed() == [], "nothing is promised"


def test_commands_of_the_launchers():
    script = {name: cases.script_of("launchers", name) for name in ("spawn", "torchrun", "elastic")}
    for launcher, words in {
        "spawn": [sys.executable, script["spawn"], "--nnodes", "2", "--nproc_per_node", "3", "--node_rank", "{rank}"],
        "torchrun": ["--node_rank", "{rank}", "--master_addr", "{master}", "--master_port", "29500", script["torchrun"]],
        "elastic": [script["elastic"], "--nnodes", "2", "--nproc_per_node", "3", "--master_addr", "{master}"],
    }.items():
        made = node_cases.command(NodeCase(launcher, 6, 2, nodes=2), ["--lr", "1"])
        at = made.index(words[0])
        assert made[at : at + len(words)] == words and made[-4:] == ["--lr", "1", "--threads", "2"]


# ------------------------------------------------------------------------------------------------------------- figures


def result(steps, step_ms, rate, **more):
    """Two epochs; the first is slow, the second takes ``step_ms`` a step and ``rate`` samples/s."""
    half = steps // 2
    per_epoch = [0.5 + half * step_ms / 1000, half * step_ms / 1000]
    seconds = sum(per_epoch)
    samples = rate * per_epoch[1]  # of an epoch
    return {
        "epochs": 2, "loss_per_step": [1.0, 0.5] * half, "step_seconds": seconds, "step_seconds_per_epoch": per_epoch,
        "global_batch_size": 64, "samples_per_second": (2 * samples - 64) / seconds, "parameters": 1000, "bytes_per_step": 0,
        "world_size": 1, "parameter_sha256": "same", "train_loss_per_epoch": [1.0, 0.5], "eval_accuracy": [0.5, 0.9],
    } | more  # fmt: skip


def test_figures_are_those_of_the_epochs_after_the_first():
    found = node_cases.later_epochs(result(40, 20.0, 3200.0))
    assert found["samples_per_second_later"] == pytest.approx(3200) and found["step_seconds_later"] == pytest.approx(0.020)
    single = result(40, 20.0, 3200.0) | {"epochs": 1}
    assert node_cases.later_epochs(single)["samples_per_second_later"] == single["samples_per_second"]
    assert node_cases.later_epochs(single)["step_seconds_later"] == single["step_seconds"] / 39
    with pytest.raises(RunError, match="one step"):
        node_cases.later_epochs(single | {"samples_per_second": None})


def sample(case, role, repeat, found, label=""):
    return Sample(Job(case, role, (), repeat, label), "typed", 1.0, found)


def timed(case, repeat, step_ms, rate, **more):
    found = result(40, step_ms, rate, world_size=case.world_size, compress=getattr(case, "way", DDP).compress or None, **more)
    return sample(case, "timed", repeat, found | node_cases.later_epochs(found))


ONE = Case("plain", 1, 1)
LINK_CASE = Case("gloo", 2, 1, "100mbit")


def case_of(nodes, way=DDP, rate="100mbit"):
    return NodeCase("spawn" if nodes > 1 else "plain", nodes, 1, nodes=nodes, rate=rate if nodes > 1 else "unlimited", way=way)


CASES = [case_of(1, FOUR), case_of(2), case_of(2, FP16), case_of(4), case_of(2, rate="unlimited"), case_of(4, FOUR)]


@pytest.fixture
def session():
    made = Session(Console(record=True, width=160, force_terminal=False), 60.0)
    slower = {0: 1.0, 1: 1.25}  # the second repeat met a busy machine: ratios within a repeat do not see it
    sizes = (1000, 10**5, 10**6)
    for repeat, factor in slower.items():

        def add(case, step_ms, rate, factor=factor, repeat=repeat, **more):
            made.samples.append(timed(case, repeat, step_ms * factor, rate / factor, **more))

        add(ONE, 20.0, 3200.0)
        add(CASES[0], 80.0, 3200.0, global_batch_size=256)
        for case, step_ms, sent in zip(CASES[1:5], (160.0, 80.0, 320.0, 10.0), (4e5, 2e5, 4e5, 4e5), strict=True):
            add(case, step_ms, 64 / step_ms * 1000, bytes_per_step=sent)
        add(CASES[5], 400.0, 640.0, global_batch_size=256, bytes_per_step=4e5)
        for batch in (16, 4, 1):  # c(b) = 4 ms + 0.25 ms a sample, as the whole batch of 64: 20 ms
            found = {
                "global_batch_size": batch, "loss_per_step": [1.0] * 41, "step_seconds": 40 * (0.004 + 0.00025 * batch) * factor,
            }  # fmt: skip
            found["samples_per_second"] = 40 * batch / found["step_seconds"]
            made.samples.append(sample(ONE, "compute", repeat, found))
        measured = [  # 1 ms + n / 10 MB/s
            {"collective": "all_reduce", "size": n, "bytes": n, "microseconds": [1000 + n / 10]} for n in sizes
        ]  # fmt: skip
        made.samples.append(sample(LINK_CASE, LINK, repeat, {"measured": measured}))
    # One process's steps at the full batch are what plain ddp is held against.
    for s in made.samples:
        if s.job.case == ONE and s.job.role == "timed":
            s.result |= {"step_seconds": 39 * 0.020 * slower[s.job.repeat], "samples_per_second": 3200 / slower[s.job.repeat]}
    return made


@pytest.fixture
def found(session, asked):
    config = asked("--nodes", "1", "2").config
    probes = [Probe("100mbit", 95.6e6, 1e-4), Probe("unlimited", 9e9, 5e-5)]
    return node_summary.summarise(session, CASES, ONE, 2, probes, config)


def test_rows_by_hand(found):
    rows = {(r.case.nodes, r.case.rate, r.case.way.title): r for r in found.rows}
    assert found.rows[0].speedup.median == 1.0 and found.rows[0].case.world_size == 1, "the first is what all is measured against"
    plain, fp16 = rows[2, "100mbit", "ddp"], rows[2, "100mbit", "--compress fp16"]
    assert plain.speedup.median == pytest.approx(400 / 3200) and plain.speedup.high == pytest.approx(plain.speedup.low)
    assert plain.samples_per_second.noisy is False and plain.samples_per_second.high > plain.samples_per_second.low
    assert not plain.oversubscribed and rows[4, "100mbit", "ddp"].oversubscribed
    # 2 ranks, 32 samples: 12 ms; 0.4 MB: 1 ms + 40 ms; one process: 20 ms.
    fit = 1.125  # the medians of the two repeats; α and β did not change
    assert plain.predicted == pytest.approx(20 * fit / (12 * fit + 41), rel=0.02)
    assert fp16.predicted == pytest.approx(20 * fit / (12 * fit + 21), rel=0.02)
    assert plain.ratio == pytest.approx(plain.predicted / 0.125)
    # Four passes of 16 samples (8 ms each); the ring over 4 ranks: 6 steps of 0.5 ms and 0.1 MB at 10 MB/s.
    four = rows[4, "100mbit", "--accumulate 4"]
    assert four.predicted == pytest.approx(80 * fit / (32 * fit + 6 * (0.5 + 10)), rel=0.02)
    assert rows[2, "unlimited", "ddp"].predicted is None, "that link was not measured"
    assert fp16.parity.holds is None and fp16.lost is not None and plain.lost is None
    told = json.loads(json.dumps([r.as_json() for r in found.rows] + [found.prediction_as_json()]))
    assert told[1]["nodes"] == 1 and told[1]["rate"] is None and told[-1]["links"][0]["rate"] == "100mbit"


def test_accumulation_sends_less_often_and_int8_sends_to_everyone():
    link = Link("wire", 0.0, 1e6)
    compute = Fit(0.010, float("inf"), 0.0, 0.0, 3)
    once, four = Model(compute, 1e5, 64), Model(compute, 1e5, 64, passes=4)
    assert once.step_seconds(link, 2) == pytest.approx(0.010 + 0.1) and four.step_seconds(link, 2) == pytest.approx(0.040 + 0.1)
    assert four.speedup(link, 2) == pytest.approx(40 / 140) and once.speedup(link, 2) == pytest.approx(10 / 110)
    # Of 8 ranks each gets 7 messages of S bytes: 7 S / β.
    same = node_summary.effective_bytes(1e5, "int8", 8)
    assert link.all_reduce_seconds(same, 8) == pytest.approx(7 * 1e5 / 1e6)
    assert node_summary.effective_bytes(1e5, "fp16", 8) == 1e5


def test_a_link_must_not_change_the_result(found, session):
    assert found.same_at_every_rate() == {"spawn, 2 nodes, ddp": True}
    assert node_report.verdicts(session.console, session, found)
    row = next(r for r in found.rows if r.case.nodes == 2 and r.case.rate == "unlimited")
    found.rows[found.rows.index(row)] = node_summary.replace(row, parameters="other")
    assert found.same_at_every_rate() == {"spawn, 2 nodes, ddp": False}
    assert not node_report.verdicts(session.console, session, found)
    assert "did NOT end with the same parameters" in session.console.export_text()


def test_the_verdict_on_the_loss(session, asked):
    config = asked("--nodes", "1", "2").config
    good = {"loss_per_step": [1.0, 0.5], "precision": "fp64", "world_size": 2}
    session.samples.append(sample(ONE, "fp64 reference", 0, good, "float64 reference for ddp"))
    session.samples.append(sample(node_summary.replace(CASES[1], rate="unlimited"), "fp64", 0, good, "float64"))

    def judged():
        return node_summary.summarise(session, CASES, ONE, 2, [], config)

    assert {r.case.rate for r in judged().rows if r.parity.holds} == {"100mbit", "unlimited"}, "one run for all rates"
    session.samples[-1].result = good | {"loss_per_step": [1.0, 0.6]}
    assert not node_report.verdicts(session.console, session, judged())
    assert "PARITY BROKEN: 2 nodes, 100 Mbit/s, ddp" in session.console.export_text()


def test_the_screen(found, session):
    node_report.show(session.console, found, 2, 1)
    for sentence in node_report.sentences(found):
        session.console.print(sentence, markup=False)
    text = " ".join(session.console.export_text().split())
    for words in (
        "100 Mbit/s 95.6 Mbit/s 0.10",
        "link: 100 Mbit/s; speedup: samples/s against those of one rank with 1 thread (2,880 samples/s)",
        "--compress fp16 2 2",
        "ddp 4* 4",
        "* more ranks × threads than the 2 cores here",
        "--accumulate 4: a step is 4 backward passes and one all-reduce, so its batch is 4 times as large here.",
        "2 nodes, 100 Mbit/s: by α and β an all-reduce of the gradients takes 41 ms",
        "plain ddp is 0.12 times as fast as one rank; fastest is --compress fp16 (0.25 times).",
        "not promised",
        "where each rank has cores of its own.",
        "where ranks share cores.",
    ):
        assert words in text, (words, text)
    assert text.count("ddp 1 1 2,880") == 2, "one rank stands in each link's table"


def test_the_picture(found, tmp_path):
    png, svg = node_plots.draw(found, Path(tmp_path), "a machine", 2, 1, 1)
    with Image.open(png) as picture:
        assert picture.width > 1000
    drawn = " ".join(svg.read_text().split())
    for words in ("link: 100 Mbit/s", "measured 95.6 Mbit/s", "ranks share the 2 cores", "predicted from", "hollow: measured",
                  "compress fp16", "a machine"):  # fmt: skip
        assert words in drawn, words


def test_a_picture_without_prediction(found, tmp_path):
    bare = node_summary.Found([r for r in found.rows if r.case.way == DDP], found.one, found.probes[:1])
    bare.rows[1:] = [node_summary.replace(r, predicted=None, speedup=Spread(0.1, 0.1, 0.1, 1)) for r in bare.rows[1:]]
    png, svg = node_plots.draw(bare, Path(tmp_path), "a machine", 64, 1, 1)
    assert png.stat().st_size > 5000 and "share the" not in svg.read_text() and "predicted from" not in svg.read_text()
