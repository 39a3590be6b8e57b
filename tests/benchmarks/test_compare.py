"""compare.py as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.harness.runner import REPOSITORY, run
from tests.common import hub_files

pytestmark = pytest.mark.launch

COMPARE = [sys.executable, str(REPOSITORY / "benchmarks" / "compare.py")]
SMALL = ["--job", "random", "--data_size", "300", "--epochs", "1", "--repeats", "1"]

USER_MODULE = '''
import torch
from torch import nn

class SumLoss(nn.Module):
    """Breaks the rule that a loss is a mean over the samples."""
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 2)
    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels, reduction="sum")}

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(20, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

class FailsAmongSeveral(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 2)
    def forward(self, x):
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1 and torch.is_grad_enabled():
            raise ValueError("no company, please")
        return self.layer(x)
'''


@pytest.fixture
def user(tmp_path):
    (tmp_path / "own.py").write_text(USER_MODULE)
    return {"PYTHONPATH": str(tmp_path)}


def read(folder: Path):
    return json.loads((folder / "compare.json").read_text())


def test_all_launchers_end_to_end(tmp_path):
    outcome = run([*COMPARE, *SMALL, "--world_sizes", "1", "2", "--output", str(tmp_path)], 400)
    assert outcome.ok, outcome.tail(40)
    written = read(tmp_path)
    assert written["schema_version"] == 1 and written["complete"]
    assert {"machine", "versions", "commit", "command", "samples", "summary", "settings", "created"} <= written.keys()
    assert written["machine"]["processor"] and written["versions"]["torch"]
    rows = {(r["launcher"], r["world_size"]): r for r in written["summary"]}
    assert set(rows) == {(name, n) for name in ("plain", "spawn", "torchrun", "mpi") for n in (1, 2)}
    for row in rows.values():
        assert row["parity"]["holds"] is True
        for figure in (
            "wall_seconds",
            "launch_seconds",
            "train_seconds",
            "leave_seconds",
            "samples_per_second",
            "peak_memory_bytes",
        ):
            assert row["figures"][figure]["median"] > 0, (row["launcher"], figure)
        f = row["figures"]
        parts = sum(f[name]["median"] for name in ("launch_seconds", "train_seconds", "leave_seconds"))
        assert parts == pytest.approx(f["wall_seconds"]["median"], abs=0.05)
        assert set(row["speedup"]) == {f"{w}_seconds/{b}" for w in ("train", "wall") for b in ("one_rank", "all_threads")}
    assert len({rows[name, 2]["parameter_sha256"] for name in ("plain", "spawn", "torchrun", "mpi")}) == 1
    threads = {s["result"]["threads_per_rank"] for s in written["samples"] if s["role"] == "timed"}
    assert len(threads) == 1, "every launcher gets the same threads"
    for name in ("speedup", "loss", "wall_clock"):
        for kind in (".png", ".svg"):
            assert (tmp_path / f"{name}{kind}").stat().st_size > 5000
    assert "Same loss" in outcome.stdout and "same parameters to the bit" in outcome.stdout
    assert not outcome.stderr


def test_one_way_for_all_and_a_prediction(tmp_path):
    flags = ["--launchers", "spawn", "torchrun", "--world_sizes", "2", "--sync", "shared_memory", "--link", "25,10"]
    outcome = run([*COMPARE, *SMALL, *flags, "--link", "1.5,100", "--output", str(tmp_path)], 300)
    assert outcome.ok, outcome.tail(40)
    written = read(tmp_path)
    assert written["settings"]["sync"] == "shared_memory"
    assert {row["sync"] for row in written["summary"]} == {"shared_memory"} and all(
        r["parity"]["holds"] for r in written["summary"]
    )
    by_role = {role: [s for s in written["samples"] if s["role"] == role] for role in ("timed", "compute")}
    assert [s["result"]["global_batch_size"] for s in by_role["compute"]] == [16, 4, 1]
    assert {s["result"]["sync"] for s in by_role["timed"] if s["world_size"] > 1} == {"shared_memory"}
    predicted = written["prediction"]
    assert predicted["model"]["gradient_bytes"] == 4 * (20 * 2 + 2) and len(predicted["model"]["compute_steps"]) == 4
    given = [link for link in predicted["links"] if link["source"] == "--link"]
    assert [link["name"] for link in given] == ["25 µs, 10 Gbit/s", "1.5 µs, 100 Gbit/s"]
    assert all(link["gains_until_ranks"] >= 1 and link["speedup"]["1024"] > 0 for link in given)
    measured = {(c["launcher"], c["world_size"]): c["measured_speedup"]["median"] for c in predicted["compared"]}
    assert set(measured) == {("spawn", 2), ("torchrun", 2)} and all(value > 0 for value in measured.values())
    assert "Prediction from compute time" in outcome.stdout and "25 µs, 10 Gbit/s (given): this model" in outcome.stdout
    assert "It assumes that" in outcome.stdout
    for kind in (".png", ".svg"):
        assert (tmp_path / f"prediction{kind}").stat().st_size > 5000


@pytest.mark.parametrize("lossy", [("--precision", "bf16"), ("--compress", "bf16")], ids=lambda lossy: lossy[0])
def test_a_lossy_way_is_measured_and_not_judged(tmp_path, lossy):
    flags = ["--launchers", "spawn", "--world_sizes", "2", "--no_prediction", *lossy]
    outcome = run([*COMPARE, *SMALL, *flags, "--output", str(tmp_path)], 300)
    assert outcome.ok and not outcome.stderr, outcome.tail(40)
    (row,) = read(tmp_path)["summary"]
    assert row["parity"]["holds"] is None and "not promised" in row["parity"]["verdict"]
    assert row["lost"]["curve_difference"] >= 0 and row["lost"]["accuracy_points"] is not None
    assert "Against one lossless process" in outcome.stdout and "Same loss: all" not in outcome.stdout
    roles = {s["role"] for s in read(tmp_path)["samples"]}
    assert "lossless" in roles and not roles & {"fp64", "fp64 reference", "control"}
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_broken_parity_is_told_and_fails(tmp_path, user):
    flags = [
        "--launchers",
        "plain",
        "--world_sizes",
        "1",
        "2",
        "--model",
        "own:SumLoss",
        "--lr",
        "0.001",
        "--output",
        str(tmp_path),
    ]
    outcome = run([*COMPARE, *SMALL, *flags], 300, user)
    assert outcome.status == 1, outcome.tail(40)
    assert "PARITY BROKEN: plain, 2 ranks" in outcome.stdout and "plain, 1 rank" not in outcome.stdout.split("PARITY BROKEN", 1)[1]
    assert {r["world_size"]: r["parity"]["holds"] for r in read(tmp_path)["summary"]} == {1: True, 2: False}


def test_batch_statistics_are_not_promised(tmp_path, user):
    flags = ["--launchers", "plain", "--world_sizes", "2", "--model", "own:Normed", "--output", str(tmp_path)]
    outcome = run([*COMPARE, *SMALL, *flags], 300, user)
    assert outcome.status == 0, outcome.tail(40)
    assert "not promised: BatchNorm1d" in outcome.stdout


def test_a_failed_run_is_told_with_its_last_words_and_the_others_are_kept(tmp_path, user):
    flags = ["--launchers", "plain", "spawn", "--world_sizes", "1", "2", "--model", "own:FailsAmongSeveral", "--no_parity"]
    outcome = run([*COMPARE, *SMALL, *flags, "--output", str(tmp_path)], 300, user)
    assert outcome.status == 1, outcome.tail(40)
    assert "FAILED: spawn, 2 ranks" in outcome.stdout and "no company, please" in outcome.stdout
    medians = {(r["launcher"], r["world_size"]): r["figures"]["train_seconds"] for r in read(tmp_path)["summary"]}
    assert medians["plain", 1] and medians["spawn", 1] and not medians["plain", 2] and not medians["spawn", 2]


def test_ctrl_c_stops_within_three_seconds_and_keeps_what_was_measured(tmp_path):
    flags = ["--launchers", "torchrun", "--world_sizes", "1", "2", "--repeats", "50", "--job", "random", "--no_parity"]
    environment = os.environ | {"LAUNCHLAB_TEST": str(tmp_path)}
    process = subprocess.Popen(
        [*COMPARE, *flags, "--output", str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        lines = []
        while len([line for line in lines if line.startswith(b"[")]) < 2:  # two runs made, a third under way
            assert process.stdout
            lines.append(process.stdout.readline())
            assert lines[-1], "compare.py ended early"
        time.sleep(1.5)
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        process.communicate(timeout=20)
        assert time.monotonic() - began < 3
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()
    written = read(tmp_path)
    assert not written["complete"] and len([s for s in written["samples"] if s["result"]]) >= 2
    ours = [p for p in psutil.process_iter() if _environment(p).get("LAUNCHLAB_TEST") == str(tmp_path)]
    assert not ours


def _environment(process):
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def test_weak_scaling(tmp_path):
    flags = [
        "--launchers",
        "plain",
        "--world_sizes",
        "1",
        "2",
        "--scaling",
        "weak",
        "--batch_size",
        "32",
        "--output",
        str(tmp_path),
    ]
    outcome = run([*COMPARE, *SMALL, *flags], 300)
    assert outcome.status == 0, outcome.tail(40)
    assert "weak scaling" in outcome.stdout and "BROKEN" not in outcome.stdout
    results = {s["world_size"]: s["result"] for s in read(tmp_path)["samples"] if s["role"] == "timed"}
    steps = {n: len(r["loss_per_step"]) for n, r in results.items()}
    assert steps[1] == steps[2] and results[2]["global_batch_size"] == 64, "as much work for each rank"


def test_batch_sizes(tmp_path):
    flags = ["--batch_sizes", "32", "128", "--launchers", "plain", "--world_sizes", "1", "--scale_lr", "linear", "--repeats", "1"]
    outcome = run([*COMPARE, *flags, "--target_accuracy", "0.5", "--output", str(tmp_path)], 300)
    assert outcome.status == 0, outcome.tail(40)
    small, large = read(tmp_path)["summary"]
    assert (small["batch_size"], large["batch_size"]) == (32, 128)
    assert large["learning_rate"] == pytest.approx(4 * small["learning_rate"])
    assert small["samples_per_second"]["median"] > 0 and small["seconds_to_target"]["median"] > 0
    assert (tmp_path / "batch_sizes.png").is_file() and (tmp_path / "batch_sizes.svg").is_file()


def test_other_loops_can_be_measured_beside(tmp_path):
    """The tutorial's and the Trainer's: of time, loss and accuracy there is as much, of parity nothing is claimed."""
    hub_files.write(tmp_path / "data", "cifar10", train=300, test=60)
    flags = ["--launchers", "torchrun", "tutorial", "hf_trainer", "--world_sizes", "1", "2", "--repeats", "1", "--epochs", "1"]
    flags += ["--job", "cifar10", "--data_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "kept")]
    outcome = run([*COMPARE, *flags, "--output", str(tmp_path / "out")], 300, folder=tmp_path)
    assert outcome.status == 0, outcome.tail(40)
    found = read(tmp_path / "out")
    assert all(r["figures"]["samples_per_second"]["median"] > 0 for r in found["summary"])
    samples = [s for s in found["samples"] if s["launcher"] == "hf_trainer"]
    assert {s["world_size"] for s in samples} == {1, 2}
    assert all(s["result"]["eval_accuracy"][0] > 0 and s["result"]["train_loss_per_epoch"][0] > 0 for s in samples)
    for picture in ("speedup.svg", "loss.svg", "learning.svg"):
        assert "Trainer" in (tmp_path / "out" / picture).read_text()
    assert not list(tmp_path.glob("cifar_net*")), "a measured run saves no model"


def test_a_trainer_that_is_not_here_is_told_before_anything_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['transformers'] = None")
    outcome = run([*COMPARE, "--launchers", "hf_trainer"], 60, {"PYTHONPATH": str(tmp_path)})
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1 and "pip install -e '.[hf]'" in outcome.stderr


def test_bad_input_exits_with_two_and_one_line():
    outcome = run([*COMPARE, "--launchers", "horse"], 60)
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1 and "horse" in outcome.stderr
