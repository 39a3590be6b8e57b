"""Gradients sent smaller than they are (``--compress``): what is lost for what is saved.

========= ================================================= ==============================================================
compress  what a rank hands over, of n gradients of 4 bytes what is lost
========= ================================================= ==============================================================
fp16      2n bytes                                          13 of 23 bits after the point, of each gradient and again of each
                                                            sum on the way; above 65,504 infinite, below 6e-8 zero
bf16      2n bytes                                          16 of these bits; the range stays that of float32
int8      n bytes, and 4 for every 256 gradients            up to half a step, 1/254 of the largest of 256 neighbours; added to
                                                            what is sent in the next step
powersgd  rows × 2 + columns × 2 numbers instead of         all but the two strongest directions of each matrix; added to what
          rows × columns; vectors, and matrices that        is sent in the next step; nothing in the first ten steps
          this would not halve, as they are
========= ================================================= ==============================================================

fp16, bf16 and powersgd (Vogels et al., NeurIPS 2019, arXiv:1905.13727) are PyTorch's own hooks; gloo carries them all. DDP refuses
the one for bf16 without nccl, by its name, so it is called from within ours. int8 is the project's own: PyTorch's quantization
hooks fail under gloo (IndexError in their callback, torch 2.13). What int8 rounds off it keeps and adds to the next step's
gradients (error feedback: Seide et al., "1-bit SGD", Interspeech 2014; Karimireddy et al., ICML 2019, arXiv:1901.09847). Its
messages cannot be summed on the way, so every rank gets all of them, (ranks - 1) × n bytes, where an all-reduce of float32 gets
about 8n × (ranks - 1) / ranks: from eight ranks on it saves nothing.

Whatever is rounded, every rank gets the same sums, or the same messages and adds them in one order: parameters stay equal in bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.functional import pad

from common.config import TrainConfig
from common.process_group import Group

Future = torch.futures.Future[Tensor]
BLOCK = 256  # gradients that share a scale
POWERSGD_RANK = 2  # as accurate as SGD on CIFAR-10 in the paper, where 1 is not quite
POWERSGD_START = 10  # steps; PyTorch's 1,000 would never come in a short job, and DDP needs 2 to rebuild its buckets
_SMALLEST = torch.finfo(torch.float32).tiny


class Sent:
    """Counts the bytes that a rank hands to the collectives."""

    def __init__(self) -> None:
        """Nothing yet."""
        assert dist.group.WORLD
        self.group = dist.group.WORLD
        self.bytes_per_step = 0
        """Of the last whole step."""
        self._so_far = 0

    def count(self, bucket: dist.GradBucket, size: int) -> None:
        """Adds ``bucket``'s ``size`` bytes."""
        self._so_far += size
        if bucket.is_last():
            self.bytes_per_step, self._so_far = self._so_far, 0


def hook(config: TrainConfig, group: Group) -> tuple[Callable[[Any, dist.GradBucket], Future], Sent]:
    """(hook, state) for DDP that sends gradients as ``config.compress`` says."""
    if config.compress == "int8":
        return int8, Int8(group.rank.world_size)
    if config.compress == "powersgd":
        return powersgd, PowerSGD(every_parameter=not config.find_unused_parameters)
    return {"fp16": fp16, "bf16": bf16}[str(config.compress)], Sent()


def fp16(state: Sent, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's: casts to float16, divides by the number of ranks, sums."""
    state.count(bucket, bucket.buffer().numel() * 2)
    return default_hooks.fp16_compress_hook(state.group, bucket)


def bf16(state: Sent, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's: casts to bfloat16, divides by the number of ranks, sums."""
    state.count(bucket, bucket.buffer().numel() * 2)
    return default_hooks.bf16_compress_hook(state.group, bucket)


# ------------------------------------------------------------------------------------------------------------ int8


class Int8(Sent):
    """What was rounded off, by bucket."""

    def __init__(self, world_size: int) -> None:
        """Nothing yet."""
        super().__init__()
        self.world_size = world_size
        self.lost: dict[int, tuple[Tensor, Tensor]] = {}
        """By bucket: its memory, and what is still owed to it. DDP rebuilds buckets after the first step, in other memory."""


def quantise(values: Tensor) -> Tensor:
    """``values`` as whole multiples of their block's scale, which is 1/127 of its largest magnitude.

    Args:
        values: shape (n,), float32 or float64.

    Returns:
        int8: the bytes of the scales (float32, shape (blocks,)), then the multiples (n). A block that holds infinity or NaN gets
        a scale that makes all of it NaN, so an overflow is seen on every rank.
    """
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).float().clamp_min_(_SMALLEST)
    multiples = (blocks / scales).round_().nan_to_num_(0.0).to(torch.int8).flatten()[: len(values)]
    return torch.cat([scales.flatten().view(torch.int8), multiples])


def dequantise(message: Tensor, n: int) -> Tensor:
    """What ``quantise`` made of ``n`` values: float32, shape (n,), each at most half its block's scale off."""
    count = -(-n // BLOCK)
    scales = message[: 4 * count].view(torch.float32)
    multiples = message[4 * count : 4 * count + n].float()
    return (pad(multiples, (0, -n % BLOCK)).view(-1, BLOCK) * scales[:, None]).flatten()[:n]


def int8(state: Int8, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """All ranks get all messages, and average them in the order of the ranks."""
    buffer = bucket.buffer()
    n = len(buffer)
    before = state.lost.get(bucket.index())
    if before and before[0].data_ptr() == buffer.data_ptr():
        buffer += before[1]
    message = quantise(buffer)
    lost = (buffer - dequantise(message, n)).nan_to_num_(0.0, 0.0, 0.0)  # an overflow is not to stay for ever
    state.lost[bucket.index()] = buffer, lost
    state.count(bucket, len(message))
    messages = [torch.empty_like(message) for _ in range(state.world_size)]

    def mean(gathered: torch.futures.Future[list[Tensor]]) -> Tensor:
        gathered.value()  # raises if a rank was lost
        buffer.zero_()
        for each in messages:
            buffer.add_(dequantise(each, n))
        return buffer.div_(state.world_size)

    work = dist.all_gather(messages, message, async_op=True)
    return work.get_future().then(mean)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------------- powersgd


class PowerSGD(Sent):
    """PyTorch's state, with a count of what is sent."""

    def __init__(self, every_parameter: bool) -> None:
        """``every_parameter``: each step uses all of them. A matrix without gradient would stay the start of the next search."""
        super().__init__()
        self.torchs = powerSGD_hook.PowerSGDState(
            self.group,
            matrix_approximation_rank=POWERSGD_RANK,
            start_powerSGD_iter=POWERSGD_START,
            warm_start=every_parameter,
            orthogonalization_epsilon=1e-8,  # a gradient of zeros is no reason for NaN
        )


def powersgd(state: PowerSGD, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's, bucket by bucket.

    Its later all-reduces are called when the first is done; under gloo that is on another thread, where those of two buckets could
    overtake each other differently on every rank. So each bucket waits for its end.
    """
    before = state.torchs.total_numel_after_compression
    numbers, size = bucket.buffer().numel(), bucket.buffer().element_size()
    compressed = state.torchs.iter >= state.torchs.start_powerSGD_iter
    future = powerSGD_hook.powerSGD_hook(state.torchs, bucket)
    state.count(bucket, (state.torchs.total_numel_after_compression - before if compressed else numbers) * size)
    future.wait()
    return future
