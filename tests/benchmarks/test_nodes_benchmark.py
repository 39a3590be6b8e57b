"""compare.py --nodes and collectives.py --nodes as a user runs them, on hosts of a virtual cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from PIL import Image

from benchmarks.harness.runner import REPOSITORY, Running, run

pytestmark = pytest.mark.launch

COMPARE = [sys.executable, str(REPOSITORY / "benchmarks" / "compare.py"), "--repeats", "1"]
COLLECTIVES = [sys.executable, str(REPOSITORY / "benchmarks" / "collectives.py"), "--repeats", "1"]
ON_HOSTS = [sys.executable, str(REPOSITORY / "benchmarks" / "on_hosts.py")]
RATE = "50mbit"
SMALL = ["--job", "random", "--data_size", "300", "--no_prediction", "--no_parity"]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """One comparison over two links: (what was printed, the folder, nodes.json)."""
    folder = tmp_path_factory.mktemp("nodes")
    flags = ["--nodes", "1", "2", "--rate", "unlimited", RATE, "--ways", "ddp", "fp16", "accumulate:2", "--threads", "1"]
    flags += ["--global_batch_size", "240"]  # few steps, so that a slow link takes little time
    outcome = run([*COMPARE, *flags, "--time_limit", "300", "--output", str(folder)], 900)
    assert outcome.ok and not outcome.stderr, outcome.tail(40)
    return outcome.stdout, folder, json.loads((folder / "nodes.json").read_text())


def test_files(comparison):
    out, folder, written = comparison
    assert written["schema_version"] == 1 and written["complete"]
    assert {"machine", "versions", "commit", "command", "samples", "summary", "settings", "links", "prediction"} <= written.keys()
    assert written["settings"]["threads_per_rank"] == 1 and written["settings"]["nodes"] == [1, 2]
    assert {(r["nodes"], r["rate"], r["way"]) for r in written["summary"]} == {
        (1, None, "ddp"), (1, None, "--accumulate 2"),
        *((2, rate, way) for rate in ("unlimited", RATE) for way in ("ddp", "--compress fp16", "--accumulate 2")),
    }  # fmt: skip
    several = [s["result"] for s in written["samples"] if s["nodes"] == 2]
    assert len(several) == 8 and all(r["hosts"] == ["node1", "node2"] for r in several), "ranks were on two hosts"
    assert {s["result"]["threads_per_rank"] for s in written["samples"] if s["role"] == "timed"} == {1}
    with Image.open(folder / "nodes.png") as picture:
        assert picture.width > 1000
    assert (folder / "nodes.svg").stat().st_size > 5000
    typed = next(s["command"] for s in written["samples"] if s["rate"] == RATE and s["role"] == "timed")
    assert typed.startswith("python -m common.virtual_cluster --nodes 2 --rate 50mbit -- python launchers/spawn.py --nnodes 2")
    assert "Written to" in out and "nodes.json, nodes.png, nodes.svg" in out


def test_links_are_measured_and_decide(comparison):
    out, _, written = comparison
    free, slow = written["links"]
    assert (free["rate"], slow["rate"]) == ("unlimited", RATE)
    assert 25e6 < slow["measured_bits_per_s"] < 52e6 and free["measured_bits_per_s"] > 3 * slow["measured_bits_per_s"]
    assert 0 < slow["round_trip_seconds"] < 0.05
    rows = {(r["nodes"], r["rate"], r["way"]): r for r in written["summary"]}

    def step(rate, way):
        return rows[2, rate, way]["step_seconds"]["median"]

    assert step(RATE, "ddp") > 2 * step("unlimited", "ddp"), "1.7 MB take 270 ms at 50 Mbit/s"
    assert step(RATE, "ddp") > 0.25, "the link cannot carry it in less"
    assert step(RATE, "--compress fp16") < 0.8 * step(RATE, "ddp")
    accumulated = rows[2, RATE, "--accumulate 2"]["samples_per_second"]["median"]
    assert accumulated > 1.1 * rows[2, RATE, "ddp"]["samples_per_second"]["median"], "half as many all-reduces a sample"
    assert rows[1, None, "ddp"]["speedup"]["median"] == 1.0


def test_the_prediction_stands_beside(comparison):
    out, _, written = comparison
    links = {link["rate"]: link for link in written["prediction"]["links"]}
    # 6.25 MB/s of the link, less what headers take.
    assert 3e-3 < links[RATE]["step_beta_gb_per_s"] < 10e-3 and links["unlimited"]["step_beta_gb_per_s"] > 0.03
    rows = [r for r in written["summary"] if r["nodes"] == 2]
    assert all(r["predicted_speedup"] > 0 for r in rows)
    predicted = {(r["rate"], r["way"]): r["predicted_speedup"] for r in rows}
    assert predicted[RATE, "ddp"] < predicted[RATE, "--compress fp16"] < predicted["unlimited", "ddp"] * 1.05
    assert "predicted / measured" in out and "Predictions are off by" in out and "It assumes that" in out


def test_the_loss_is_judged(comparison):
    out, _, written = comparison
    rows = [r for r in written["summary"] if r["nodes"] == 2]
    assert {r["way"] for r in rows if r["parity"]["holds"] is True} == {"ddp", "--accumulate 2"}
    lossy = [r for r in rows if r["way"] == "--compress fp16"]
    assert all(r["parity"]["holds"] is None and 0 < r["lost"]["curve_difference"] < 0.1 for r in lossy)
    assert "Same loss: what loses nothing agrees with one process, on 2 nodes (4 cases" in out
    assert "A link's rate changes nothing but time: the same parameters to the bit at every rate." in out


def test_torchrun_with_two_ranks_on_each_host_and_a_delay(tmp_path):
    flags = [
        "--nodes",
        "2",
        "--nproc_per_node",
        "2",
        "--launchers",
        "torchrun",
        "--rate",
        "1gbit",
        "--delay",
        "2ms",
        "--ways",
        "ddp",
    ]
    outcome = run([*COMPARE, *flags, *SMALL, "--threads", "1", "--time_limit", "200", "--output", str(tmp_path)], 400)
    assert outcome.ok, outcome.tail(40)
    written = json.loads((tmp_path / "nodes.json").read_text())
    one, two = written["summary"]
    assert (one["world_size"], two["world_size"], two["nodes"], two["launcher"]) == (1, 4, 2, "torchrun")
    assert written["links"][0]["round_trip_seconds"] > 0.0038
    # The ring over four ranks crosses the link at least once a step, each way.
    assert two["step_seconds"]["median"] > 0.004 > one["step_seconds"]["median"]


def test_collectives_over_a_link(tmp_path):
    flags = ["--nodes", "2", "--rate", "unlimited", "50mbit", "--sizes", "1KB", "64KB", "512KB", "--collectives", "all_reduce"]
    outcome = run([*COLLECTIVES, *flags, "--output", str(tmp_path)], 300)
    assert outcome.ok and not outcome.stderr, outcome.tail(40)
    written = json.loads((tmp_path / "collectives.json").read_text())
    assert [link["rate"] for link in written["links"]] == ["unlimited", "50mbit"] and not written["memory_copies"]
    largest = {r["way"]: r["seconds"]["median"] for r in written["summary"] if r["size"] == 2**19}
    assert largest["gloo (50mbit)"] > 2**19 * 8 / 50e6 * 0.95, "no faster than the link"
    assert largest["gloo (50mbit)"] > 2 * largest["gloo (unlimited)"]
    assert {f["way"] for f in written["fits"]} == {"gloo (unlimited)", "gloo (50mbit)"}
    assert "of what the link's rate allows" in outcome.stdout
    for kind in (".png", ".svg"):
        assert (tmp_path / f"collectives{kind}").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*COMPARE, "--nodes", "1"], "one host has no link"),
        ([*COMPARE, "--rate", "1gbit"], "--rate without --nodes"),
        ([*COLLECTIVES, "--nodes", "2", "--ways", "mpi"], "--ways mpi with --nodes"),
        ([*COLLECTIVES, "--delay", "1ms"], "--delay without --nodes"),
    ],
)
def test_bad_input_exits_with_two_and_one_line(words, told):
    outcome = run(words, 60)
    assert outcome.status == 2 and outcome.stderr.count("\n") == 1 and told in outcome.stderr


def test_one_failing_host_ends_the_others():
    began = time.monotonic()
    commands = [["sleep", "60"], [sys.executable, "-c", "raise SystemExit(3)"]]
    outcome = run([*ON_HOSTS, json.dumps(commands)], 30)
    assert outcome.status == 1 and "host 1 ended first, with exit status 3" in outcome.stderr and not outcome.left_behind
    assert time.monotonic() - began < 20


def _commands(folder):
    """{process id: command line} of all that inherited this test's mark, on whatever host."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("LAUNCHLAB_TEST") == str(folder):
                found[process.pid] = " ".join(process.cmdline())
    return found


def test_ctrl_c_leaves_no_host_and_keeps_what_was_measured(tmp_path):
    flags = ["--nodes", "2", "--rate", "1mbit", "--ways", "ddp", "--no_prediction", "--no_parity", "--threads", "1"]
    process = Running([*COMPARE, *flags, "--output", str(tmp_path)], 200, {"LAUNCHLAB_TEST": str(tmp_path)})
    try:
        # The first run, of one rank, is over; the second takes minutes over such a link.
        until = time.monotonic() + 120
        while not any("--nnodes" in words for words in _commands(tmp_path).values()) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1.0)
        os.kill(next(pid for pid, words in _commands(tmp_path).items() if "compare.py" in words), signal.SIGINT)
        began = time.monotonic()
        while _commands(tmp_path) and time.monotonic() < began + 30:
            time.sleep(0.1)
        assert not _commands(tmp_path), "all of it ends by itself"
        outcome = process.wait()
    finally:
        process.kill()
    assert outcome.status == 130 and "Stopped. The 1 runs made so far" in outcome.stdout, outcome.tail()
    written = json.loads((tmp_path / "nodes.json").read_text())
    assert not written["complete"] and len(written["samples"]) == 1
    bridges = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, timeout=20, check=True).stdout
    assert "bridge0" not in bridges, "nothing of the cluster is in this machine's own network"
