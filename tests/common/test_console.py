"""console.py: who speaks, and what a line looks like."""

import socket

import pytest
import torch

from common import models
from common.command_line import parse_config
from common.console import Console
from common.process_group import Group
from common.rank import Rank


def rank(number, local=0):
    return Rank("plain", number, 4, local, 2, number // 2, "127.0.0.1", 1)


def console(number, local=0, line=""):
    return Console(parse_config("t", argv=line.split(), environment={}), rank(number, local))


def test_every_rank_says_once_that_it_is_there_and_rank_0_what_runs(capfd):
    arrivals = [{"node_rank": node} for node in (0, 0, 1, 1)]
    for number in range(4):
        c = console(number, number % 2, "--batch_size 8 --accumulate 2")
        c.joined(Group(c.rank, torch.device("cpu"), "gloo", arrivals), 3)
    lines = capfd.readouterr().out.splitlines()
    here = [f"[Rank {r}] Process initialized on {socket.gethostname()}, local_rank: {r % 2}, world_size: 4" for r in range(4)]
    assert [line for line in lines if line.startswith("[Rank")] == here
    assert "Launcher plain: 4 ranks on 2 nodes, cpu, gloo, 3 threads per rank" in lines
    assert "Batch: 64 samples a step, 8 per rank and forward pass" in lines and len(lines) == 7


@pytest.mark.parametrize(
    ("number", "local", "line", "begins"),
    [
        (0, 0, "", "Epoch"),
        (2, 0, "", "Epoch"),  # the first of the second node
        (1, 1, "", None),
        (0, 0, "--log_all_ranks", "[Rank 0] Epoch"),
        (3, 1, "--log_all_ranks", "[Rank 3] Epoch"),
    ],
)
def test_who_prints_losses(capfd, number, local, line, begins):
    c = console(number, local, f"{line} --epochs 50")
    c.epoch(1, 0.5, 0.25, None)
    c.step(1, 10, 20, 0.125)
    out = capfd.readouterr().out
    tails = ["Epoch [1/50] - Train Loss: 0.500000, Eval Loss: 0.250000", "Epoch [1/50] Step [10/20] - Local Loss: 0.125000"]
    assert out == ("" if begins is None else "".join(f"{begins.removesuffix('Epoch')}{tail}\n" for tail in tails))


def test_accuracy_and_times(capfd):
    c = console(0, 0, "--epochs 4")
    c.epoch(4, 0.5, 0.25, 0.97)
    c.summary(2.0, 12345.6, 3.25)
    c.summary(2.0, None, None)
    assert capfd.readouterr().out.splitlines() == [
        "Epoch [4/4] - Train Loss: 0.500000, Eval Loss: 0.250000, Eval Accuracy: 97.00 %",
        "Total time: 2.00 s (after 3.25 s to launch, first step included), average time per epoch: 0.500 s, 12,346 samples/s",
        "Total time: 2.00 s, average time per epoch: 0.500 s",
    ]


def test_a_text_s_bits_and_tokens_and_what_is_used_of_the_device(capfd):
    c = console(0, 0, "--job text --epochs 2")
    c.epoch(1, 2.0, 1.5, 0.25)
    c.summary(2.0, 100.0, None, 12800.0, 0.4567)
    assert capfd.readouterr().out.splitlines() == [
        "Epoch [1/2] - Train Loss: 2.000000, Eval Loss: 1.500000 (2.1640 bits per byte)",
        "Total time: 2.00 s, average time per epoch: 1.000 s, 100 samples/s, 12,800 tokens/s, model FLOPs utilisation 45.7 %",
    ]


def test_rank_0_shows_the_model_and_nobody_else(capfd):
    for number in range(3):
        console(number).model(models.MLP())
    out = capfd.readouterr().out
    assert out.count("Model:") == 1 and "4,481" in out and "LayerNorm" in out
