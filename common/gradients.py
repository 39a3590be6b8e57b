"""How the gradients of N ranks become one: the ways of ``--sync``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import shared_memory
from common.config import MODEL_FLAGS, WITH_DDP, TrainConfig
from common.errors import UsageError
from common.process_group import Group
from common.rank import Rank

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]
"""DDP's communication hook: gets a bucket of this rank's gradients, gives their mean over the ranks."""


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

    def bytes_per_step(self) -> int:
        """What this rank hands to the collectives in a step: its gradients, or what ``--compress`` made of them in the last one."""
        ...

    def close(self) -> None:
        """After the last step: gives back what it holds."""
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

    def bytes_per_step(self) -> int:
        """Nothing is sent."""
        return 0

    def close(self) -> None:
        """Nothing to give back."""


class ByHand:
    """What data parallel training is: after backward, every gradient is summed over the ranks and divided by their number.

    A parameter that no rank has used gets a gradient of zero, where DDP with find_unused_parameters leaves it without one.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        """Starts all ranks from rank 0's parameters and buffers."""
        self.model, self.world_size = model, group.rank.world_size
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing happens before ``finish`` anyway."""
        return nullcontext()

    def finish(self) -> None:
        """An all-reduce per parameter."""
        for parameter in self.parameters:
            if parameter.grad is None:  # not used by this rank; the others wait for its part all the same
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world_size

    def bytes_per_step(self) -> int:
        """The gradients."""
        return gradient_bytes(self.model)

    def close(self) -> None:
        """Nothing to give back."""


class ByHandFlat:
    """The same with one all-reduce: the gradients are laid into one long vector.

    It travels through the CPU where the backend cannot move the device's tensors (MPS under gloo).
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        """Starts all ranks from rank 0's parameters and buffers."""
        self.model, self.world_size = model, group.rank.world_size
        self.carrier = torch.device("cpu") if group.device.type == "mps" else group.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for tensor in [*model.parameters(), *model.buffers()]:
            carried = tensor.detach().to(self.carrier)
            dist.broadcast(carried, src=0)
            tensor.data.copy_(carried)

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing happens before ``finish`` anyway."""
        return nullcontext()

    def finish(self) -> None:
        """One all-reduce of everything."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in grads]).to(self.carrier)
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = flat.split([p.numel() for p in self.parameters])
        for parameter, grad, part in zip(self.parameters, grads, parts, strict=True):
            parameter.grad = grad.copy_(part.view_as(grad))  # laid out as it was: the optimizer may walk through its memory

    def bytes_per_step(self) -> int:
        """The gradients."""
        return gradient_bytes(self.model)

    def close(self) -> None:
        """Nothing to give back."""


class DDP:
    """DistributedDataParallel: all-reduces buckets of gradients while backward goes on (Li et al., VLDB 2020, arXiv:2006.15704)."""

    def __init__(self, model: nn.Module, group: Group, config: TrainConfig, hook: Hook | None = None, state: Any = None) -> None:
        """Wraps ``model``; the gradients live in the buckets, so nothing is copied back.

        Args:
            model: the model.
            group: who averages.
            config: bucket_mb, find_unused_parameters.
            hook: averages a bucket instead of the backend's all-reduce.
            state: the hook's first argument; its ``close``, if it has one, is called after the last step.
        """
        self.state = state
        self.wrapped = DistributedDataParallel(
            model,
            device_ids=[group.device] if group.device.type == "cuda" else None,
            bucket_cap_mb=config.bucket_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.find_unused_parameters,
            static_graph=_same_every_step(config),
        )
        if hook:
            hook.__annotations__ = get_type_hints(hook)  # DDP compares the types, not their names
            self.wrapped.register_comm_hook(state, hook)
        self.model: nn.Module = self.wrapped

    def no_sync(self) -> AbstractContextManager[None]:
        """DDP's own."""
        return self.wrapped.no_sync()

    def finish(self) -> None:
        """DDP has averaged within backward."""

    def bytes_per_step(self) -> int:
        """What the hook has counted; without, or if it sends all, the gradients."""
        return getattr(self.state, "bytes_per_step", None) or gradient_bytes(self.wrapped)

    def close(self) -> None:
        """Closes the hook's state."""
        if hasattr(self.state, "close"):
            self.state.close()


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of all of ``model``'s gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _same_every_step(config: TrainConfig) -> bool:
    """Whether each step uses the same parameters in the same order: known of the built-in models only."""
    return (
        config.model in MODEL_FLAGS and config.accumulate == 1 and config.sampler != "uneven" and not config.find_unused_parameters
    )


@dataclass(frozen=True)
class Way:
    """How a run averages its gradients."""

    name: str
    """One of ``SYNCS``, never auto."""
    reason: str = ""
    """Why, where ``--sync auto`` chose it."""


def choose_way(config: TrainConfig, rank: Rank, device: torch.device) -> Way:
    """What ``--sync`` says, or for auto the fastest way that fits ``rank`` and ``device``.

    Raises:
        UsageError: the way does not fit.
    """
    obstacle = shared_memory.obstacle(rank, device)
    if config.sync == "auto":
        if config.compress:
            return Way("ddp", "--compress is its")
        if rank.world_size == 1:
            return Way("ddp", "one rank has nothing to average")
        if not obstacle:
            return Way("shared_memory", "all ranks are on this machine")
        if rank.launcher == "mpi" and device.type == "cpu":
            return Way("mpi", obstacle)
        return Way("ddp", obstacle)
    if config.sync == "shared_memory" and obstacle:
        raise UsageError(f"--sync shared_memory: {obstacle}; give --sync ddp, or auto")
    if config.sync == "mpi" and device.type != "cpu":
        raise UsageError(
            f"--sync mpi on {device.type}: MPI here moves what is in the machine's memory; give --device cpu, or --sync ddp"
        )
    if config.sync in WITH_DDP and device.type == "mps" and rank.world_size > 1:
        if config.sampler == "uneven":
            raise UsageError(
                "--sampler uneven on mps: it needs DistributedDataParallel, which gloo cannot serve there; give --device cpu"
            )
        return Way("by_hand_flat", "gloo cannot move what is on an Apple GPU")
    return Way(config.sync)


def average_over(group: Group, model: nn.Module, config: TrainConfig, way: Way) -> Gradients:
    """Sets ``way`` up for ``model``."""
    if group.rank.world_size == 1:
        return Alone(model)
    if way.name == "by_hand":
        return ByHand(model, group)
    if way.name == "by_hand_flat":
        return ByHandFlat(model, group)
    if way.name == "shared_memory":
        return DDP(model, group, config, *shared_memory.hook(group, model))
    if way.name == "mpi":
        from common import mpi_allreduce

        return DDP(model, group, config, *mpi_allreduce.hook(group, model))
    if config.compress:
        from common import compression

        return DDP(model, group, config, *compression.hook(config, group))
    return DDP(model, group, config)
