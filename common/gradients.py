"""How the gradients of N ranks become one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.process_group import Group


class Gradients(Protocol):
    """Averages gradients over the ranks: forward through ``model``, backward, then ``finish``."""

    model: nn.Module
    """What to call in the forward pass."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, forward and backward only add up this rank's own gradients."""
        ...

    def finish(self) -> None:
        """After the step's last backward: every parameter's gradient is the mean over the ranks when it returns."""
        ...


class Alone:
    """One rank has nothing to average."""

    def __init__(self, model: nn.Module) -> None:
        """Leaves ``model`` as it is."""
        self.model = model

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing to hold back."""
        return nullcontext()

    def finish(self) -> None:
        """Nothing to do."""


class DDP:
    """DistributedDataParallel: all-reduces buckets of gradients while backward goes on (Li et al., VLDB 2020, arXiv:2006.15704)."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        """Wraps ``model``; the gradients live in the buckets, so nothing is copied back."""
        device_ids = [group.device] if group.device.type == "cuda" else None
        self.wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        self.model: nn.Module = self.wrapped

    def no_sync(self) -> AbstractContextManager[None]:
        """DDP's own."""
        return self.wrapped.no_sync()

    def finish(self) -> None:
        """DDP has averaged within backward."""


class ThroughCpu:
    """For devices whose tensors the backend cannot move (MPS under gloo): one flat all-reduce of a copy on the CPU."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        """Starts all ranks from rank 0's parameters and buffers."""
        self.model, self.world_size = model, group.rank.world_size
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for tensor in [*model.parameters(), *model.buffers()]:
            copy = tensor.detach().cpu()
            dist.broadcast(copy, src=0)
            tensor.data.copy_(copy)

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing happens before ``finish`` anyway."""
        return nullcontext()

    def finish(self) -> None:
        """Averages the gradients."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.detach().flatten().cpu() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device)


def average_over(group: Group, model: nn.Module) -> Gradients:
    """The way that fits the group's size and device."""
    if group.rank.world_size == 1:
        return Alone(model)
    if group.device.type == "mps":
        return ThroughCpu(model, group)
    return DDP(model, group)
