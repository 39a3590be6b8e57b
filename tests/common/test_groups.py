"""process_group.py, gradients.py, plots.py."""

import dataclasses
import json
import re
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from common import plots
from common.command_line import parse_config
from common.config import RANK_FLAGS
from common.errors import RunError, UsageError
from common.gradients import Alone, Way, average_over
from common.ports import PortReservation
from common.process_group import Group, announce, process_group
from common.rank import Rank
from tests.common.helpers import ROOT, end_group, start

CPU = torch.device("cpu")


def config(line=""):
    return parse_config("test.py", "", RANK_FLAGS, line.split(), {})


@pytest.fixture(autouse=True)
def interface(monkeypatch):
    """A group chooses the loopback interface for the whole process: forgotten after the test."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")


def join(port, *lines, world=None, ranks=None):
    """Lets ranks join in threads of this process; what each of them raised. None gets as far as a backend."""
    raised = {}

    def rank(number, line):
        try:
            with process_group(announce(Rank("t", number, world, number, world, 0, "127.0.0.1", port), config(line)), CPU):
                raised[number] = None
        except Exception as error:
            raised[number] = error  # it holds the frame, and with it rank 0's store, until all have looked

    world = world or len(lines)
    numbers = range(len(lines)) if ranks is None else ranks
    threads = [threading.Thread(target=rank, args=pair) for pair in zip(numbers, lines, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return raised


def test_missing_ranks_are_named_within_the_time_limit():
    began = time.monotonic()
    with PortReservation(0) as port:
        raised = join(port, "--timeout 1", "--timeout 1", world=4, ranks=(0, 2))
    assert time.monotonic() - began < 6
    assert {type(error) for error in raised.values()} == {RunError} and set(raised) == {0, 2}
    assert "ranks 1, 3 of 4 did not arrive within 1 s (--timeout)" in str(raised[0])
    for error in raised.values():
        assert len(str(error).splitlines()) == 1


def test_a_missing_rank_0_is_named():
    with PortReservation(0) as port:
        began = time.monotonic()
        raised = join(port, "--timeout 0.5", world=2, ranks=(1,))
    assert time.monotonic() - began < 5
    text = str(raised[1])
    assert isinstance(raised[1], RunError) and len(text.splitlines()) == 1
    assert f"rank 1 waited 0.5 s (--timeout) for rank 0 at 127.0.0.1:{port}" in text


def test_flags_that_differ_are_refused_on_all_ranks():
    with PortReservation(0) as port:
        raised = join(port, "--timeout 10", "--timeout 10", "--timeout 10 --seed 5")
    assert set(raised) == {0, 1, 2}
    for error in raised.values():
        assert isinstance(error, UsageError) and "rank 2 was given seed 5 where rank 0 has 0" in str(error)


def test_world_sizes_that_differ_are_refused():
    raised = {}

    def rank(number, world, port):
        try:
            with process_group(announce(Rank("t", number, world, number, world, 0, "127.0.0.1", port), config("--timeout 2")), CPU):
                pass
        except Exception as error:
            raised[number] = error

    began = time.monotonic()
    with PortReservation(0) as port:
        threads = [threading.Thread(target=rank, args=(number, 2 + number, port)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert isinstance(raised[0], UsageError) and str(raised[0]) == str(raised[1])
    one_way = r"rank 1 on \S+ was told of 3 ranks in all, rank 0 on \S+ of 2: give all nodes the same --nnodes and --nproc_per_node"
    other_way = r"rank 0 on \S+ was told of 2 ranks in all, rank 1 on \S+ of 3: give all nodes the same"
    assert re.match(f"{one_way}|{other_way}", str(raised[0]))
    assert time.monotonic() - began < 8  # nobody waits for the ranks that nobody is


def test_a_port_that_another_program_listens_on_is_refused():
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        raised = join(port, "--timeout 3", world=2, ranks=(0,))
    assert isinstance(raised[0], UsageError) and f"--master_port {port}: cannot be used here" in str(raised[0])


def test_a_group_of_one_joins_and_leaves():
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with PortReservation(0) as port:
        rank = Rank("t", 0, 1, 0, 1, 0, "127.0.0.1", port)
        with process_group(announce(rank, config("--timeout 10")), CPU) as group:
            assert dist.is_initialized() and group.backend == "gloo"
            assert torch.equal(group.sum(values), values) and torch.equal(group.gather(values), values[None])
            assert [a["node_rank"] for a in group.arrivals] == [0] and len(group.local_cores()) == 1
    assert not dist.is_initialized()


def test_a_process_on_its_own_forms_no_group():
    with process_group(announce(Rank("t"), config()), CPU) as group:
        assert not dist.is_initialized() and group.backend is None and group.local_cores()
        model = torch.nn.Linear(2, 2)
        gradients = average_over(group, model, config(), Way("ddp"))
        assert isinstance(gradients, Alone) and gradients.model is model
        with gradients.no_sync():
            gradients.finish()
        gradients.close()


def test_rank_0_says_when_it_cannot_reach_itself():
    """As in a container without the network on which its name is known."""
    with (
        PortReservation(0) as port,
        pytest.raises(RunError, match=rf"rank 0 does not reach itself at no-such-host.invalid:{port} .*--network host"),
    ):
        announce(Rank("t", 0, 2, 0, 1, 0, "no-such-host.invalid", port), config("--timeout 2"))


def test_cores_of_this_node_only():
    arrivals = [{"node_rank": node, "cores": [node]} for node in (0, 1, 1)]
    rank = Rank("t", 2, 3, 1, 2, 1, "h", 1)
    assert Group(rank, CPU, "gloo", arrivals).local_cores() == [[1], [1]]


# ---------------------------------------------------------------------------------- two real ranks: each way of --sync

WAYS = ["ddp", "by_hand", "by_hand_flat", *(["shared_memory"] if sys.platform == "linux" else [])]
TWO = f"""
import json, sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
from common.command_line import parse_config
from common.gradients import Way, average_over
from common.process_group import announce, process_group
from common.rank import Rank
number, port = map(int, sys.argv[1:])
torch.set_num_threads(1)
config = parse_config("test.py", argv=["--timeout", "30", "--accumulate", "2"], environment={{}})
rank = Rank("test", number, 2, number, 2, 0, "127.0.0.1", port)

def averaged(name, group):
    torch.manual_seed(number)  # each rank starts from weights of its own: rank 0's must win
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    gradients = average_over(group, net, config, Way(name))
    torch.manual_seed(100 + number)
    for backward in range(2):  # two backward passes a step, the first of them held back
        x = torch.randn(5, 3)
        if backward == 0:
            with gradients.no_sync():
                gradients.model(x).square().sum().backward()
        else:
            gradients.model(x).square().sum().backward()
    gradients.finish()
    gradients.close()
    return [p.grad.tolist() for p in net.parameters()], [p.tolist() for p in net.parameters()]

with process_group(announce(rank, config), torch.device("cpu")) as group:
    value = torch.tensor([1.0 + number, 10.0], dtype=torch.float64)
    began = time.monotonic()
    for _ in range(5):
        group.sum(value)
    five_sums = time.monotonic() - began
    told = {{"ways": {{name: averaged(name, group) for name in {WAYS}}}, "sum": group.sum(value).tolist(),
            "gather": group.gather(value).tolist(),
            "left": value.tolist(), "five sums": five_sums, "pids": [a["pid"] for a in group.arrivals]}}
    print(json.dumps(told))
"""


def test_two_ranks_average_gradients_alike_whatever_the_way():
    with PortReservation(0) as port:
        ranks = [start([sys.executable, "-W", "error", "-c", TWO, str(number), str(port)]) for number in (0, 1)]
        try:
            outputs = [rank.communicate(timeout=50) for rank in ranks]
        finally:
            for rank in ranks:
                end_group(rank)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    told = [json.loads(out.splitlines()[-1]) for out, _ in outputs]  # torch 2.9 lets gloo print before it
    for one in told:
        grads, weights = ([torch.tensor(t) for t in part] for part in one["ways"]["ddp"])
        assert len(grads) == 6 and any(g.abs().max() > 0 for g in grads)
        for name in WAYS[1:]:
            other_grads, other_weights = ([torch.tensor(t) for t in part] for part in one["ways"][name])
            for a, b in zip(grads, other_grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
        assert one["sum"] == [3.0, 20.0] and one["gather"] == [[1.0, 10.0], [2.0, 10.0]]
        assert one["left"] == [1.0 + told.index(one), 10.0]  # a sum does not touch what it was given
        assert one["five sums"] < 2  # the wait for gloo's thread ends by itself, not by its limit of 1 s each
        assert one["pids"] == [rank.pid for rank in ranks]
    assert told[0]["ways"] == told[1]["ways"]


# -------------------------------------------------------------------------------------------------------------- plots

CURVES = plots.Curves([1.0, 0.5, 0.25], [1.1, 0.6, 0.4], [0.2, 0.5, 0.9], [0.1, 0.2, 0.1], [None, 900.0, 1000.0])


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("B.PNG", b"\x89PNG")]
)
def test_curves_are_drawn_in_the_format_of_the_name(tmp_path, name, begins):
    plots.training_curves(tmp_path / name, CURVES, "digits on 2 ranks (plain)")
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_has_the_size_and_shows_something(tmp_path):
    from PIL import Image

    plots.training_curves(tmp_path / "a.png", CURVES, "t")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (8 * 150, 6 * 150)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    for wanted in plots.COLOURS[:5]:
        assert tuple(bytes.fromhex(wanted[1:])) in colours


def test_the_same_data_give_the_same_svg(tmp_path):
    for name, curves in (("a", CURVES), ("b", CURVES), ("c", dataclasses.replace(CURVES, train_loss=CURVES.eval_loss))):
        plots.training_curves(tmp_path / f"{name}.svg", curves, "t")
    a, b, c = ((tmp_path / f"{name}.svg").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "curves",
    [([1.0], [1.0], [None]), ([1.0, -1.0], [0.0, 2.0], [None, None]), ([1.0, float("nan")], [float("inf"), 1.0], [0.1, 0.1])],
)
def test_short_flat_and_diverged_curves_are_drawn(tmp_path, curves):
    plots.training_curves(tmp_path / "a.png", plots.Curves(*curves, [0.1] * len(curves[0]), [None] * len(curves[0])), "t")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_caption_is_part_of_the_picture(tmp_path):
    for name, caption in (("a", ""), ("b", "Two cores, torch 2.13, " * 20)):
        drawn = plots.figure()
        drawn.add_subplot().plot([1, 2])
        plots.save(drawn, tmp_path / f"{name}.svg", caption)
    a, b = ((tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert len(b) > len(a)


def test_ranks_may_write_to_files_of_their_own_and_print_as_they_like():
    """What describes a node, not the run, may differ between ranks."""
    from common.process_group import _PER_NODE

    fields = {field.name for field in dataclasses.fields(config())}
    assert set(_PER_NODE) <= fields and {"result", "plot", "save", "node_rank", "threads"} <= set(_PER_NODE)
    assert not {"seed", "epochs", "model", "batch_size", "accumulate", "precision"} & set(_PER_NODE)
