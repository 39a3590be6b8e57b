"""The job of every script here, as one writes it without this project: data, model, a few steps, and what a rank leaves behind."""

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

DIGITS = Path(__file__).resolve().parents[2] / "common" / "data" / "digits.npz"
GLOBAL_BATCH = 64  # samples a step over all ranks


class CNN(nn.Module):
    """The digits CNN: 421,642 parameters, the same as the launchers train."""

    def __init__(self) -> None:
        """1→32→64 channels of 3×3, then 3,136→128→10."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, 128)
        self.classes = nn.Linear(128, 10)
        for layer in (self.conv1, self.conv2, self.hidden):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) → logits (n, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.hidden(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)))
        logits: Tensor = self.classes(x)
        return logits


def arguments() -> argparse.Namespace:
    """What every script takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world_size", type=int, default=1, help="ranks, where the script starts them itself")
    parser.add_argument("--start_method", default="spawn", help="bare_spawn.py only: spawn, forkserver or fork")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=0, help="instead of a few steps: whole training (fitting.py)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and, in whole training, the order")
    return parser.parse_args()


def digits(test: bool = False) -> TensorDataset:
    """1,437 training digits, or 360 to test: images float32 (n, 1, 28, 28), labels int64 (n,)."""
    with np.load(DIGITS) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    x = F.interpolate(images.float().div_(16).unsqueeze(1), size=(28, 28), mode="bilinear", align_corners=False)
    order, cut = torch.from_numpy(np.random.default_rng(0).permutation(len(x))), len(x) * 4 // 5
    chosen = order[cut:] if test else order[:cut]
    return TensorDataset(x.sub_(0.305).div_(0.325)[chosen], labels.long()[chosen])


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def run(threads: int, steps: int) -> None:
    """The whole job in plain PyTorch: DDP as the rank that the process group says; alone where there is no group."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = digits()
    model: nn.Module = CNN()
    loader = DataLoader(data, batch_size=GLOBAL_BATCH)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
        loader = DataLoader(data, batch_size=GLOBAL_BATCH // dist.get_world_size(), sampler=DistributedSampler(data, shuffle=False))
    train(model, sgd(model), loader, steps)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    steps: int,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> None:
    """A few steps; this rank's record is written after the first and, whole, at the end."""
    record: dict[str, Any] = {}
    for step, (images, labels) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        backward(loss)
        optimizer.step()
        if step == 0:
            record = who_i_am() | {
                "first_step_done": time.clock_gettime(time.CLOCK_BOOTTIME),  # one clock for all processes of a machine
                "loss_sum_first_step": loss.item() * len(labels),
                "samples_first_step": len(labels),
                "finished": False,
            }
            write(record)
    # gloo's threads let go of the last step's tensors a moment later; an interpreter that ends meanwhile dies with SIGABRT
    # ("terminate called without an active exception": one run of three under mpirun). Long after the step that is timed.
    time.sleep(0.1)
    write(record | {"finished": True})


def who_i_am() -> dict[str, Any]:
    """This rank, as torch.distributed says."""
    joined = dist.is_initialized()
    return {
        "rank": dist.get_rank() if joined else 0,
        "world_size": dist.get_world_size() if joined else 1,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "threads": torch.get_num_threads(),
    }


def write(record: dict[str, Any]) -> None:
    """The record as rank-R.json in the folder that LAUNCHLAB_PEER_OUTPUT names, whole or not at all; without it, on the screen."""
    folder = os.environ.get("LAUNCHLAB_PEER_OUTPUT")
    if not folder:
        print(json.dumps(record), flush=True)
        return
    path = Path(folder, f"rank-{record['rank']}.json")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record))
    part.replace(path)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
