"""The model of a step, by hand-computed values; the links that it takes; what it is held against; what a lossy way loses."""

import json
import math

import pytest
from PIL import Image
from rich.console import Console

from benchmarks.harness import links, machine, mpis, prediction, prediction_report, report, summary
from benchmarks.harness.cases import Case
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.links import Fit, Link
from benchmarks.harness.lossy import LOSSLESS, Lost, lost, sentence
from benchmarks.harness.prediction import KnownLink, Model
from benchmarks.harness.session import Job, Sample, Session
from common.errors import UsageError


def compute(fixed, per_sample):
    return Fit(fixed, 1 / per_sample if per_sample else math.inf, 0.0, 0.0, 3)


LINK = Link("copper", 1e-3, 1e6)  # 1 ms a message, 1 MB/s
SLOW, FREE = Link("slow", 1.0, 1.0), Link("free", 1e-15, 1e15)


# ------------------------------------------------------------------------------------------------------- the model


def test_by_hand():
    model = Model(compute(0.002, 0.001), 4000, 64)  # one process: 66 ms
    assert model.step_seconds(LINK, 1) == pytest.approx(0.066) and model.speedup(LINK, 1) == 1
    # 32 samples: 34 ms; two messages of 2 kB: 2·(1 ms + 2 ms) = 6 ms.
    assert model.step_seconds(LINK, 2) == pytest.approx(0.034 + 0.006)
    assert model.speedup(LINK, 2) == pytest.approx(66 / 40)
    # 3 ranks: the slowest has 22 samples: 24 ms; 4·(1 ms + 1.333 ms).
    assert model.step_seconds(LINK, 3) == pytest.approx(0.024 + 4 * (0.001 + 4000 / 3e6))


def test_compute_gains_nothing_beyond_a_sample_a_rank():
    model = Model(compute(0.002, 0.001), 4000, 64)
    assert [model.samples(n) for n in (1, 63, 64, 65, 1024)] == [64, 2, 1, 1, 1]
    assert model.compute_seconds(64) == model.compute_seconds(1024) == pytest.approx(0.003)
    assert model.most(FREE) == (64, pytest.approx(66 / 3)), "with a free link the model gains until each rank has one sample"


def test_where_it_stops_gaining():
    model = Model(compute(0.002, 0.001), 4000, 64)
    ranks, speedup = model.most(LINK)
    every = [model.speedup(LINK, n) for n in range(1, prediction.MOST_RANKS + 1)]
    assert 1 < ranks < 64 and speedup == max(every) == every[ranks - 1]
    assert all(s < speedup for s in every[ranks:]) and every.index(speedup) == ranks - 1
    assert model.most(SLOW) == (1, 1.0), "a link so slow never pays"
    assert model.efficient_until(SLOW) == 1
    half = model.efficient_until(LINK)
    assert every[half - 1] >= half / 2 and all(every[n - 1] < n / 2 for n in range(half + 1, 200))


def test_a_better_link_never_predicts_less():
    model = Model(compute(0.0001, 0.00001), 1e6, 256)
    better = Link("better", LINK.alpha_s / 2, LINK.beta_bytes_per_s * 2)
    for n in (2, 3, 8, 100, 1024):
        assert model.speedup(FREE, n) > model.speedup(better, n) > model.speedup(LINK, n)
        assert model.speedup(FREE, n) <= n * (1 + 1e-9)
    assert Model(model.compute, 1e3, 256).speedup(LINK, 8) > model.speedup(LINK, 8), "fewer bytes, more speedup"


def test_weak_scaling_keeps_a_ranks_work():
    model = Model(compute(0.066, 0.0), 4000, 64, weak=True)
    assert model.samples(1024) == 64 and model.speedup(FREE, 1024) == pytest.approx(1024)
    assert model.speedup(LINK, 2) == pytest.approx(2 * 66 / 72)
    assert model.most(FREE)[0] == 1024
    told = prediction.sentences(prediction.Prediction(model, [], [KnownLink(FREE, False, "--link")], []))
    assert told == [
        "free (given): this model still gains at 1,024 ranks (1,024.0 times one process); "
        "at least half of the ideal speedup up to 1,024 ranks."
    ]


@pytest.mark.parametrize(
    ("batch", "smallest", "want"),
    [(64, 1, [16, 4, 1]), (1024, 1, [256, 64, 16]), (8, 1, [2, 1]), (4, 1, [2, 1]), (3, 1, [2, 1]), (2, 1, []), (1, 1, []),
     (64, 16, [32, 16])],
)  # fmt: skip
def test_smaller_batches_enough_for_a_fit(batch, smallest, want):
    assert prediction.batch_sizes(batch, smallest) == want


def test_what_is_sent():
    result = {"parameters": 1000, "precision": "fp32"}
    assert prediction.gradient_bytes(result) == 4000
    assert prediction.gradient_bytes(result | {"precision": "fp64"}) == 8000
    assert prediction.gradient_bytes(result | {"precision": "bf16"}) == 4000, "autocast: the gradients stay float32"
    assert prediction.gradient_bytes(result | {"bytes_per_step": 500}) == 500


# ------------------------------------------------------------------------------------------------------- the links


@pytest.fixture
def collectives(tmp_path):
    """A collectives.json of this machine: gloo 1 ms and 1 GB/s at two ranks, and shared memory twenty times better."""

    def write(where=tmp_path / "collectives.json", **of_machine):
        sizes = [2**k for k in range(10, 24)]
        fits = [
            {"way": way, "world_size": 2, "collective": "all_reduce"} | links.fit(sizes, [a + s / b for s in sizes]).as_json()
            for way, a, b in (("gloo", 1e-3, 1e9), ("shared_memory", 5e-5, 2e10))
        ]
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(json.dumps({"machine": machine.describe() | of_machine, "fits": fits}))
        return where

    return write


def test_this_machines_links_are_found_and_others_are_not_merged(collectives, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known, note = prediction.known_links(None, [])
    assert known == [] and "no link is known" in note and "benchmarks/collectives.py" in note and "--link" in note
    given = [links.parse_link("1.5,100")]
    assert prediction.known_links(None, given)[1] == "", "who gives a link has something to see"
    collectives(tmp_path / prediction.MEASURED_LINKS)
    known, note = prediction.known_links(None, given)
    assert [k.name for k in known] == ["gloo", "shared_memory", "1.5 µs, 100 Gbit/s (given)"] and note == ""
    assert [k.here for k in known] == [True, True, False]
    collectives(tmp_path / prediction.MEASURED_LINKS, processor="another", load_before=9)
    known, note = prediction.known_links(None, [])
    assert known == [] and "another machine's" in note
    known, note = prediction.known_links(str(prediction.MEASURED_LINKS.parent), [])
    assert [k.name for k in known] == ["gloo (another machine's)", "shared_memory (another machine's)"]
    assert not any(k.here for k in known) and "not held against" in note


def test_a_machine_is_the_same_however_busy():
    here = machine.describe()
    assert machine.same(here, here | {"load_before": 99}) and not machine.same(here, here | {"cores": 1000})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--link", "fast"], "--link fast: not allowed; give ALPHA_US,GBIT"),
        (["--link", "1,0"], "--link 1,0"),
        (["--links", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--no_prediction", "--link", "1,1"], "--no_prediction with --link"),
        (["--batch_sizes", "8", "--link", "1,1"], "--batch_sizes with --link"),
        (["--sync", "mpi"], "--sync mpi with --launchers plain spawn torchrun: "),
        (["--sync", "mpi", "--launchers", "torchrun", "mpi"], "give --launchers mpi"),
        (["--sync", "mpi", "--batch_sizes", "8"], "give --launchers mpi"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, said, tmp_path):
    with pytest.raises(UsageError) as caught:
        Comparison([*arguments, "--output", str(tmp_path)])
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- the plan


def test_one_way_for_all_launchers_and_none_for_one_process(tmp_path):
    asked = Comparison(["--sync", "mpi", "--launchers", "mpi", "--world_sizes", "1", "2", "--output", str(tmp_path)])
    jobs = asked.timed() + asked.untimed()
    ways = {(j.case.launcher, j.flags[j.flags.index("--sync") + 1]) for j in jobs}
    assert ways == {("plain", "ddp"), ("mpi", "mpi")}, "plain.py would refuse mpi"
    assert all(j.flags.count("--sync") == 1 for j in jobs)


def test_smaller_batches_are_timed_with_the_others_where_links_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--job", "random", "--launchers", "plain", "--world_sizes", "2", "--repeats", "2", "--output", str(tmp_path)]
    assert not [j for j in Comparison(flags).timed() if j.role == "compute"], "nothing to predict for"
    jobs = Comparison([*flags, "--link", "1,1", "--lr", "0.5"]).timed()
    extra = [j for j in jobs if j.role == "compute"]
    assert [j.repeat for j in jobs] == sorted(j.repeat for j in jobs) and len(extra) == 6
    assert [j.flags[j.flags.index("--global_batch_size") + 1] for j in extra] == ["16", "4", "1", "1", "4", "16"]
    smallest = " ".join(extra[2].flags)
    assert "--data_size 400" in smallest and "--epochs 1" in smallest and "--lr 0.0001" in smallest and "0.5" not in smallest
    assert not [j for j in Comparison([*flags, "--link", "1,1", "--scaling", "weak"]).timed() if j.role == "compute"]


@pytest.mark.parametrize("extra", [("--compress", "int8"), ("--precision", "bf16")])
def test_a_lossy_way_is_held_against_a_lossless_process(tmp_path, extra):
    flags = ["--launchers", "spawn", "--world_sizes", "1", "2", "--output", str(tmp_path), *extra]
    asked = Comparison(flags)
    (job,) = asked.untimed()
    text = " ".join(job.flags)
    assert job.role == LOSSLESS and job.case == Case("plain", 1, asked.threads)
    assert text.endswith("--precision fp32") and text.count("--precision") == 1 and "--compress" not in text
    weak = Comparison([*flags, "--scaling", "weak"]).untimed()
    assert [j.label for j in weak] == ["lossless reference for 1", "lossless reference for 2"]
    assert Comparison([*flags, "--no_parity"]).untimed() == []


# ------------------------------------------------------------------------------------------------------- the figures


def sample(launcher, n, role, repeat, step_ms, batch=64, steps=11, **more):
    result = {
        "loss_per_step": [1.0] * steps,
        "step_seconds": step_ms / 1000 * (steps - 1),
        "samples_per_second": batch / step_ms * 1000,
        "train_seconds": step_ms / 1000 * (steps - 1),
        "global_batch_size": batch,
        "parameters": 1000,
        "precision": "fp32",
        "world_size": n,
        "sync": "ddp",
        "backend": "gloo",
        "parameter_sha256": "abc",
        "train_loss_per_epoch": [1.0],
        "eval_accuracy": [0.9],
    }
    return Sample(Job(Case(launcher, n, 1), role, (), repeat, role), "python x", 1.0, result | more)


CASES = [Case("plain", 1, 1), Case("spawn", 2, 1), Case("spawn", 4, 1), Case("torchrun", 2, 1), Case("mpi", 2, 1)]


@pytest.fixture
def session():
    """Steps of 2 ms and 1 ms a sample, so of 66 ms in one process."""
    made = Session(Console(width=132, record=True), 60)
    for repeat in range(3):
        made.samples += [sample("plain", 1, "timed", repeat, 66)]
        made.samples += [sample("plain", 1, "compute", repeat, 2 + b, batch=b) for b in (16, 4, 1)]
        made.samples += [
            sample("spawn", 2, "timed", repeat, 44),
            sample("spawn", 4, "timed", repeat, 33),
            sample("torchrun", 2, "timed", repeat, 40, sync="shared_memory"),
            sample("mpi", 2, "timed", repeat, 40, sync="mpi"),
        ]
    return made


def predicted(session, known, weak=False):
    rows = summary.summarise(session, CASES, 1, 2, weak)
    return prediction.predict(session, rows, known, 1, weak)


def test_compute_is_fitted_and_prediction_is_held_against_measurement(session, collectives, monkeypatch):
    known, _ = prediction.known_links(str(collectives()), [links.parse_link("10,1")])
    found = predicted(session, known)
    assert found.model.compute.alpha_s == pytest.approx(0.002) and found.model.compute.beta_bytes_per_s == pytest.approx(1000)
    assert found.model.gradient_bytes == 4000 and found.model.batch == 64
    assert [s.samples for s in found.steps] == pytest.approx([64, 16, 4, 1]) and found.steps[0].seconds.median == pytest.approx(
        0.066
    )
    by_case = {(c.row.case.launcher, c.row.case.world_size): c for c in found.compared}
    assert set(by_case) == {("spawn", 2), ("spawn", 4), ("torchrun", 2), ("mpi", 2)}
    spawn = by_case["spawn", 2]
    # gloo at two ranks: 1 ms + 4 µs, as fitted.
    assert spawn.known.link.name == "gloo" and spawn.predicted == pytest.approx(66 / (34 + 1.004), rel=1e-4)
    assert spawn.measured.median == pytest.approx(1.5) and spawn.ratio == pytest.approx(66 / 35.004 / 1.5, rel=1e-4)
    assert by_case["spawn", 4].predicted == pytest.approx(66 / (18 + 6 * (0.5 + 0.001)), rel=1e-3)
    assert by_case["torchrun", 2].known.link.name == "shared_memory"
    assert by_case["mpi", 2].known is None and by_case["mpi", 2].ratio is None, "its link was not measured"
    written = json.loads(json.dumps(found.as_json()))
    gloo = written["links"][0]
    assert gloo["speedup"]["1"] == 1 and set(gloo["speedup"]) == {str(2**k) for k in range(11)}
    assert gloo["gains_until_ranks"] == found.model.most(known[0].link)[0]
    assert written["compared"][0]["predicted_over_measured"] == spawn.ratio
    assert written["model"]["fixed_seconds"] == pytest.approx(0.002) and written["model"]["assumptions"]


def test_mpis_link_is_its_own(session, monkeypatch):
    monkeypatch.setattr(mpis, "named", lambda name: mpis.Mpi(name or "MPICH", "5", "mpirun", "python"))
    known = [KnownLink(Link(f"mpi ({name})", 1e-5, 1e9, None, 2), True, "x") for name in ("Open MPI", "MPICH")]
    found = predicted(session, known)
    assert {c.row.case.launcher: c.known.link.name for c in found.compared if c.known} == {"mpi": "mpi (MPICH)"}


def test_weak_scaling_multiplies_what_is_measured(session):
    session.samples = [s for s in session.samples if s.job.role != "compute"]
    found = predicted(session, [KnownLink(Link("gloo", 5e-4, 2e9, None, 2), True, "x")], weak=True)
    spawn = next(c for c in found.compared if c.row.case.launcher == "spawn")
    assert spawn.measured.median == pytest.approx(3) and spawn.predicted == pytest.approx(2 * 66 / 67.002, rel=1e-3)


def test_too_few_batch_sizes_give_no_prediction(session):
    session.samples = [s for s in session.samples if s.job.role != "compute"]
    assert predicted(session, [KnownLink(LINK, False, "--link")]) is None
    session.samples = []
    assert predicted(session, [KnownLink(LINK, False, "--link")], weak=True) is None


def test_the_screen_and_the_picture_tell_it(session, collectives, tmp_path):
    known, _ = prediction.known_links(str(collectives()), [links.parse_link("25,10")])
    found = predicted(session, known)
    prediction_report.show(session.console, found)
    text = " ".join(session.console.export_text().split())
    for words in (
        "One process's step takes 2 ms and 1,000 µs a sample",
        "a rank sends 4,000 bytes",
        "gloo: this model stops gaining at",
        "25 µs, 10 Gbit/s (given): this model",
        "predicted / measured",
        *prediction.ASSUMPTIONS,
        "The link of mpi was not measured here",
    ):
        assert words in text, words
    png, svg = prediction_report.picture(found, tmp_path, "a machine", 1)
    with Image.open(png) as picture:
        assert picture.width > 1000
    drawn = " ".join(svg.read_text().split())
    assert "predicted: gloo" in drawn and "measured: spawn" in drawn and "a machine" in drawn and "Assumed: " in drawn


# ------------------------------------------------------------------------------------------------------- what is lost


def curve(losses, train, accuracy):
    return {"loss_per_step": losses, "train_loss_per_epoch": [9.0, train], "eval_accuracy": [0.1, accuracy]}


def test_what_a_lossy_way_loses():
    reference = curve([2.0, 1.0, *[0.5] * 18, 0.4], 0.5, 0.95)
    found = lost(curve([2.0, 1.1, *[0.5] * 18, 4.0], 0.55, 0.945), reference)
    assert (found.curve, found.train_loss, found.accuracy_points) == (
        pytest.approx(0.1), pytest.approx(0.1), pytest.approx(-0.5),
    )  # fmt: skip
    assert lost(None, reference) is None and lost(reference, None) is None
    assert lost(curve([1.0], None, None), reference) == Lost(0.5, None, None), "diverged, and a job without accuracy"
    assert sentence([found, Lost(0.2, -0.01, 0.1)]) == (
        "Against one lossless process (float32), the widest difference: the loss of the first 20 steps by at most 2.0e-01 of it, "
        "the last epoch's train loss by +10.00%, the accuracy by -0.50 points."
    )


def test_a_lossy_comparison_prints_differences_instead_of_verdicts(session):
    for s in session.samples:
        s.result |= {"precision": "bf16", "train_loss_per_epoch": [1.05], "eval_accuracy": [0.88]}
    session.samples.append(sample("plain", 1, LOSSLESS, 0, 66))
    rows = summary.summarise(session, CASES, 1, 2, False)
    report.show(session.console, rows, 2, 1, False)
    assert report.verdicts(session.console, session, rows) is True
    text = " ".join(session.console.export_text().split())
    assert "how far from one lossless process's" in text and "+5.00%" in text and "-2.00" in text
    assert "not promised: bf16 rounds" in text and "the widest difference" in text and "BROKEN" not in text and "same " not in text
    assert json.loads(json.dumps(rows[0].as_json()))["lost"]["accuracy_points"] == pytest.approx(-2)


def test_what_auto_chose_is_told(session, tmp_path):
    rows = summary.summarise(session, CASES, 1, 2, False)
    asked = Comparison(["--sync", "auto", "--launchers", "spawn", "--world_sizes", "2", "--output", str(tmp_path)])
    report.show_way(session.console, rows, asked.config)
    text = session.console.export_text()
    assert "--sync auto chose ddp for spawn, 2 ranks; spawn, 4 ranks." in text
    assert "--sync auto chose shared_memory for torchrun, 2 ranks." in text


def test_launchers_that_averaged_in_another_way_need_not_agree_to_the_bit(session):
    for s in session.samples:
        if s.job.case.launcher == "torchrun":
            s.result["parameter_sha256"] = "other"
    assert summary.same_to_the_bit(summary.summarise(session, CASES, 1, 2, False)) == {}
    for s in session.samples:
        s.result["sync"] = "ddp"
    assert summary.same_to_the_bit(summary.summarise(session, CASES, 1, 2, False)) == {2: False}
