"""Which samples each rank sees at each step.

The loss of N ranks is the loss of one: an epoch's shuffle depends on (seed, epoch) only, is cut into global batches, and each
batch into one part a rank. Parts differ by one sample at most; none is padded or dropped. A part's gradient is a mean over its own
samples and DDP averages over ranks, so each part is weighted with (its samples × parts / samples of the batch): the sum is then
exactly the global batch's mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.random  # noqa: F401  or the first step imports it
import torch

from common.config import TrainConfig
from common.rank import Rank


def part_of(samples: int, parts: int, index: int) -> slice:
    """The ``index``-th of ``parts`` consecutive parts of ``samples``, whose sizes differ by one at most."""
    return slice(samples * index // parts, samples * (index + 1) // parts)


@dataclass(frozen=True)
class Share:
    """One backward pass of one rank."""

    indices: torch.Tensor
    """int64, shape (n,); n ≥ 1 even where the share is empty: a rank without samples must still take part in the all-reduce."""
    samples: int
    """How many of them count; 0 for a stand-in."""
    weight: float
    """What the mean loss of this pass is multiplied with before backward."""


class Exact:
    """Every sample once an epoch, whatever the number of ranks."""

    def __init__(self, length: int, global_batch: int, rank: Rank, seed: int, accumulate: int = 1) -> None:
        """Shares ``length`` samples in batches of ``global_batch`` over ``rank.world_size`` × ``accumulate`` parts."""
        self.length, self.global_batch, self.seed = length, global_batch, seed
        self.rank, self.accumulate = rank, accumulate
        self.steps = -(-length // global_batch)
        self.samples_per_epoch = length

    def batch_samples(self) -> torch.Tensor:
        """float64, shape (steps,): samples that count in each step, over all ranks."""
        sizes = torch.full((self.steps,), float(self.global_batch), dtype=torch.float64)
        sizes[-1] = self.length - (self.steps - 1) * self.global_batch
        return sizes

    def epoch(self, epoch: int) -> Iterator[list[Share]]:
        """This rank's shares, a list a step with ``accumulate`` entries."""
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.length))
        parts = self.rank.world_size * self.accumulate
        mine = range(self.rank.rank * self.accumulate, (self.rank.rank + 1) * self.accumulate)
        for start in range(0, self.length, self.global_batch):
            n = min(self.global_batch, self.length - start)
            shares = []
            for index in mine:
                part = part_of(n, parts, index)
                samples = part.stop - part.start
                first = start + part.start if samples else start
                # DDP divides by the ranks, not by the parts that each adds up.
                shares.append(Share(order[first : first + (samples or 1)], samples, samples * self.rank.world_size / n))
            yield shares


class Distributed:
    """PyTorch's DistributedSampler: pads until the ranks have equally many, averages ranks as equals.

    Some samples count twice and the last batch's ranks may weigh too much, so N ranks do not compute what one computes. Source:
    https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.distributed.DistributedSampler
    """

    def __init__(self, length: int, global_batch: int, rank: Rank, seed: int, accumulate: int = 1) -> None:
        """Shares ``length`` samples; ``global_batch`` must be a multiple of ``rank.world_size`` × ``accumulate``."""
        from torch.utils.data.distributed import DistributedSampler

        self.sampler: DistributedSampler[int] = DistributedSampler(
            range(length),  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=rank.world_size,
            rank=rank.rank,
            seed=seed,
        )
        self.rank, self.accumulate = rank, accumulate
        self.batch = global_batch // rank.world_size  # this rank's samples a step
        self.steps = -(-len(self.sampler) // self.batch)
        self.samples_per_epoch = len(self.sampler) * rank.world_size

    def batch_samples(self) -> torch.Tensor:
        """float64, shape (steps,): samples that count in each step, over all ranks, padding included."""
        sizes = torch.full((self.steps,), float(self.batch), dtype=torch.float64)
        sizes[-1] = len(self.sampler) - (self.steps - 1) * self.batch
        return sizes * self.rank.world_size

    def epoch(self, epoch: int) -> Iterator[list[Share]]:
        """This rank's shares, a list a step with ``accumulate`` entries."""
        self.sampler.set_epoch(epoch)
        order = torch.tensor(list(self.sampler))
        for start in range(0, len(order), self.batch):
            batch = order[start : start + self.batch]
            shares = []
            for index in range(self.accumulate):
                indices = batch[part_of(len(batch), self.accumulate, index)]
                shares.append(Share(indices if len(indices) else batch[:1], len(indices), len(indices) / len(batch)))
            yield shares


class Uneven:
    """Ranks with unevenly much data, as where each has a shard of its own: nothing is padded, nothing dropped.

    Rank r's part of an epoch is proportional to world size + r, so that the last rank has nearly twice as many samples as rank 0
    and makes as many more steps; each cuts its part into batches of its own share of the global batch. Once a rank has no data
    left, the others go on without it, and wait in every all-reduce for what it would have sent: without ``common.uneven`` the
    run hangs there until the time-out.

    DDP divides the sum of gradients by all ranks, those without data included. With the weight (own samples × world size / samples
    of the step) each step's gradient is the mean over the samples that the active ranks have brought to it.
    """

    def __init__(self, length: int, global_batch: int, rank: Rank, seed: int, accumulate: int = 1) -> None:
        """Shares ``length`` samples; the steps of all ranks are known to each, since their parts are."""
        world = rank.world_size
        ends = np.cumsum([0, *range(world, 2 * world)])
        cuts = (length * ends // ends[-1]).tolist()
        batches = [len(range(global_batch)[part_of(global_batch, world, r)]) for r in range(world)]
        self.own_part, self.own_batch = slice(cuts[rank.rank], cuts[rank.rank + 1]), batches[rank.rank]
        self.length, self.seed, self.world_size, self.accumulate = length, seed, world, accumulate
        parts = np.diff(cuts)
        self.steps = max(-(-part // batch) for part, batch in zip(parts.tolist(), batches, strict=True))
        """Those of the rank that makes most; a rank's own may be fewer."""
        done = np.outer(np.arange(self.steps), batches)  # before each step, by each rank
        self.samples = np.clip(parts - done, 0, batches).sum(axis=1)
        self.samples_per_epoch = length

    def batch_samples(self) -> torch.Tensor:
        """float64, shape (steps,): samples that count in each step, over the ranks that still have data."""
        return torch.from_numpy(self.samples.astype(np.float64))

    def epoch(self, epoch: int) -> Iterator[list[Share]]:
        """This rank's shares, a list a step with ``accumulate`` entries; it ends when its data does."""
        order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.length))[self.own_part]
        for batch, samples in zip(order.split(self.own_batch), self.samples.tolist(), strict=False):
            shares = []
            for index in range(self.accumulate):
                indices = batch[part_of(len(batch), self.accumulate, index)]
                weight = len(indices) * self.world_size / samples
                shares.append(Share(indices if len(indices) else batch[:1], len(indices), weight))
            yield shares


Sampler = Exact | Distributed | Uneven


def make_sampler(config: TrainConfig, length: int, rank: Rank) -> Sampler:
    """The sampler that ``--sampler`` names."""
    kinds: dict[str, type[Exact] | type[Distributed] | type[Uneven]] = {
        "exact": Exact,
        "distributed": Distributed,
        "uneven": Uneven,
    }
    return kinds[config.sampler](length, config.global_batch(rank.world_size), rank, config.seed, config.accumulate)
