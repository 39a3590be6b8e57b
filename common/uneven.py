"""Ranks that run out of data before others do: PyTorch's ``Join``.

DDP's all-reduces need every rank. Within ``Join``, a rank that has no data left does not leave: it answers each forward and
backward of the others with zeros for its part, until none has data left, and then takes over the parameters of one that went on
to the end (https://docs.pytorch.org/docs/stable/distributed.algorithms.join.html).

What DDP does not take over is the optimizer's momentum, nor fp16's scale: those of a rank that left early are some steps old, and
the ranks' parameters would part at the first step of the next epoch. ``_OptimizerToo`` brings them along.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from common.precision import Precision


def join(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, precision: Precision) -> AbstractContextManager[Any]:
    """Around one epoch's steps: ranks may make different numbers of them; all leave it with the same model and optimizer.

    Gradients are divided by all ranks to the end, also for those that left: the weights of ``sampling.Uneven`` count on it.
    """
    return Join([model, _OptimizerToo(model, optimizer, precision)], divide_by_initial_world_size=True)


class _OptimizerToo(Joinable):
    """Takes part in Join after DDP; its hook runs on every rank once all have no data left."""

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, precision: Precision) -> None:
        super().__init__()
        self.model, self.optimizer, self.precision = model, optimizer, precision

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What Join runs."""
        return _Hook(self.model, self.optimizer, self.precision)

    @property
    def join_device(self) -> torch.device:
        """DDP's."""
        device: torch.device = self.model.join_device
        return device

    @property
    def join_process_group(self) -> Any:
        """DDP's."""
        return self.model.join_process_group


class _Hook(JoinHook):
    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, precision: Precision) -> None:
        self.model, self.optimizer, self.precision = model, optimizer, precision

    def post_hook(self, is_last_joiner: bool) -> None:
        """Everybody takes over momentum and scale from a rank that made every step."""
        source = torch.tensor(dist.get_rank() if is_last_joiner else -1, device=self.model.join_device)
        dist.all_reduce(source, dist.ReduceOp.MAX)
        src = int(source)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                for _, tensor in sorted(self.optimizer.state[parameter].items()):
                    dist.broadcast(tensor, src)
        if self.precision.scaler.is_enabled():
            scale = [self.precision.scaler.state_dict()]
            dist.broadcast_object_list(scale, src)
            self.precision.scaler.load_state_dict(scale[0])
