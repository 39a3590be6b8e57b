"""The same job written the way tutorials write it, to measure against: DistributedSampler, one sample at a time, default collate.

torchrun --standalone --nproc_per_node=2 benchmarks/tutorial_loop.py --epochs 3 --result tutorial.json

After https://docs.pytorch.org/tutorials/beginner/ddp_series_multigpu.html: what is done, not its words. It never looks at
test data; here each epoch ends with the test loop of https://docs.pytorch.org/tutorials/beginner/basics/optimization_tutorial.html,
its samples shared out by a DistributedSampler too, so that it does what the launchers do.
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
from common.command_line import parse_config
from common.errors import exit_status
from common.files import write_json
from common.process_group import carry_out

TEST_BATCH = 512  # images a forward pass without gradients, as in common/loop.py


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


def tested(model: DistributedDataParallel, loader: DataLoader[tuple[Tensor, Tensor]]) -> float | None:
    """The accuracy over all ranks' parts of ``loader``; None for labels that are no classes."""
    found = torch.zeros(2)  # right, of so many
    model.eval()
    with torch.no_grad():
        for x, y in loader:
            if not y.is_floating_point():
                found += torch.tensor([(model(x)["logits"].argmax(1) == y).sum(), len(y)])
    model.train()
    # Not the tutorial's: else one run in some dozens, on a busy machine, is aborted as the interpreter ends.
    carry_out(lambda: dist.all_reduce(found), [found], wait=True)
    right, of = found.tolist()
    return right / of if of else None


def main() -> None:
    """One rank of the tutorial's loop; rank 0 writes ``--result``."""
    config = parse_config("tutorial_loop.py", __doc__ or "")
    phases = events.Phases(events.command_started(events.launching_ancestors()))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(config.threads or 1)
    dist.init_process_group("gloo")
    train_data, test_data = datasets.load_datasets(config, torch.device("cpu"), torch.float32)
    sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(OneByOne(train_data), seed=config.seed)
    batch = config.global_batch(world_size) // world_size
    loader = DataLoader(OneByOne(train_data), batch_size=batch, sampler=sampler)
    test_sampler: DistributedSampler[tuple[Tensor, Tensor]] = DistributedSampler(OneByOne(test_data), shuffle=False)
    test_loader = DataLoader(OneByOne(test_data), batch_size=TEST_BATCH, sampler=test_sampler)
    model = DistributedDataParallel(models.build_model(config))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)
    losses, accuracies, ends, samples, step_seconds = [], [], [], 0, 0.0
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        total, began = torch.zeros(()), phases.now()
        for x, y in loader:
            optimizer.zero_grad()
            loss = model(x, y)["loss"]
            loss.backward()
            optimizer.step()
            total += loss.detach()
            if "first_step_done" in phases.marks:
                samples += len(x) * world_size
            else:
                began = phases.mark("first_step_done")
        step_seconds += phases.now() - began
        losses.append(float(total) / len(loader))
        accuracies.append(tested(model, test_loader))
        ends.append(phases.now() - phases.marks["first_step_done"])
    phases.mark("training_done")
    dist.barrier()
    if rank == 0:
        seconds = phases.marks["training_done"] - phases.marks["first_step_done"]
        found = "" if accuracies[-1] is None else f", test accuracy {accuracies[-1]:.4f}"
        rate = samples / step_seconds
        print(f"Tutorial loop: {world_size} ranks, {rate:,.0f} samples/s, rank 0's last loss {losses[-1]:.4f}{found}")
        if config.result:
            result = {
                "launcher": "tutorial",
                "world_size": world_size,
                "threads_per_rank": torch.get_num_threads(),
                "backend": dist.get_backend(),
                "precision": "fp32",
                "sampler": "distributed",
                "loss_per_step": [],
                "train_loss_per_epoch": losses,
                "eval_accuracy": accuracies,
                "train_seconds": seconds,
                "step_seconds": step_seconds,
                "epoch_end_seconds": ends,
                "samples_per_second": rate,
                "launch_seconds": phases.marks["first_step_done"],
                "phases": phases.marks,
            }
            write_json(config.result, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(exit_status(main))
