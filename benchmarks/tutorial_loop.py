"""The same job written the way tutorials write it, to measure against: DistributedSampler, one sample at a time, default collate.

torchrun --standalone --nproc_per_node=2 benchmarks/tutorial_loop.py --epochs 3 --result tutorial.json

After https://docs.pytorch.org/tutorials/beginner/ddp_series_multigpu.html: what is done, not its words.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset

from common import datasets, events, models
from common.config import parse_config
from common.errors import exit_status
from common.files import write_json


class OneByOne(TorchDataset[tuple[Tensor, Tensor]]):
    """Offers a data set sample by sample only."""

    def __init__(self, data: datasets.Dataset) -> None:
        """Wraps ``data``."""
        self.data = data

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample."""
        return self.data[index]


def main() -> None:
    """One rank of the tutorial's loop; rank 0 writes ``--result``."""
    config = parse_config("tutorial_loop.py", __doc__ or "")
    phases = events.Phases(events.command_started(events.launching_ancestors()))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(config.threads or 1)
    dist.init_process_group("gloo")
    train_data, _ = datasets.load_datasets(config, torch.device("cpu"), torch.float32)
    sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(OneByOne(train_data), seed=config.seed)
    batch = config.global_batch(world_size) // world_size
    loader = DataLoader(OneByOne(train_data), batch_size=batch, sampler=sampler)
    model = DistributedDataParallel(models.build_model(config))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)
    losses, samples = [], 0
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(())
        for x, y in loader:
            optimizer.zero_grad()
            loss = model(x, y)["loss"]
            loss.backward()
            optimizer.step()
            total += loss.detach()
            if "first_step_done" in phases.marks:
                samples += len(x) * world_size
            else:
                phases.mark("first_step_done")
        losses.append(float(total) / len(loader))
    phases.mark("training_done")
    dist.barrier()
    if rank == 0:
        seconds = phases.marks["training_done"] - phases.marks["first_step_done"]
        print(f"Tutorial loop: {world_size} ranks, {samples / seconds:,.0f} samples/s, rank 0's last loss {losses[-1]:.4f}")
        if config.result:
            result = {
                "launcher": "tutorial",
                "world_size": world_size,
                "threads_per_rank": torch.get_num_threads(),
                "sampler": "distributed",
                "loss_per_step": [],
                "train_loss_per_epoch": losses,
                "train_seconds": seconds,
                "samples_per_second": samples / seconds,
                "launch_seconds": phases.marks["first_step_done"],
                "phases": phases.marks,
            }
            write_json(config.result, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_status(main))
