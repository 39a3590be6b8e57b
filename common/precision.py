"""What a run computes in: the type of the weights, half precision in the products, and a scale that keeps small gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from common.config import TrainConfig
from common.errors import UsageError

WEIGHTS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """fp32 and fp64 compute in the type of the weights; bf16 and fp16 keep float32 weights and multiply in half precision.

    bf16 has float32's range and 8 bits of precision. fp16 has 11 bits and ends at 65,504 above and 6e-8 below: gradients vanish in
    it. So the loss is multiplied by a large scale before backward, and the gradients are divided by it before the step; a step
    whose gradients overflowed is left out and the scale halved (Micikevicius et al. 2018, arXiv:1710.03740). On CPU as well as on
    CUDA: PyTorch's scaler has the kernels for both, and without it fp16 loses the same gradients there.

    All ranks leave out the same steps. An overflow on one rank is inf or NaN in its part, so in the sum, which every rank gets to
    the same bit before it looks. The scale changes between steps only: what ``--accumulate`` adds up has one scale.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Computes as ``--precision`` says.

        Raises:
            UsageError: the device cannot.
        """
        self.weights = WEIGHTS[config.precision]
        """Of parameters, data and gradients."""
        self.device, self.half = device, AUTOCAST.get(config.precision)
        if device.type == "cuda" and self.half is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise UsageError(f"--precision bf16: this GPU ({name}) has no bfloat16; give --precision fp16 or fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half is torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """For forward and loss: products in half precision, sums and losses in float32 (PyTorch's lists say which)."""
        return torch.autocast(self.device.type, self.half) if self.half else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward, with the loss scaled for fp16."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by fp16's scale now, for whoever looks at them before ``step``."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, once the gradients are what all ranks agree on; left out where fp16 overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()
