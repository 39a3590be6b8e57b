"""From gradients to new weights: the optimizer, its learning rate, and a limit on the gradients' length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.precision import Precision

MOMENTUM = 0.9
BETAS = (0.9, 0.95)  # GPT-3's (Brown et al. 2020, arXiv:2005.14165, appendix B), as are the cosine's end and the clipping
COSINE_END = 0.1


def fused(model: nn.Module, config: TrainConfig) -> bool:
    """Whether one kernel updates all parameters of ``model``: on CUDA and CPU, of floats (Apple's: untried), not for fp16.

    On one core of an EPYC the digits CNN's step takes 0.07 ms instead of 0.13, the MLP's 0.019 instead of 0.044 (medians of 7).
    A trap (torch 2.13) that does not say a word: on CPU the kernel walks through memory from end to end, so a gradient must be
    laid out as its parameter. Autograd and DDP see to it; whoever sets ``.grad`` by hand has to.
    """
    return config.precision != "fp16" and all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters()
    )


def title(model: nn.Module, config: TrainConfig) -> str:
    """For a person: ``fused AdamW``."""
    name = {"sgd": "SGD", "adamw": "AdamW"}[config.optimizer]
    return f"fused {name}" if fused(model, config) else name


def make(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``--optimizer`` names, fused where that works."""
    return (sgd if config.optimizer == "sgd" else adamw)(model, config)


def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum.

    Momentum starts as zeros, of which the first step makes what it would start with. Without, torch 2.13's fused kernel fails on
    a parameter that is used for the first time when others were before it; and with a GradScaler, when the first step overflows,
    it leaves the momentum as the memory was that it reserved, and says nothing.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=MOMENTUM,
        weight_decay=config.weight_decay,
        fused=fused(model, config),
    )
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); matrices decay, biases and the gains of norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=fused(model, config))


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied with in ``step`` (from 0) of ``steps``.

    It rises in ``--warmup`` equal steps to 1; with the cosine it then falls to a tenth at the last step (Loshchilov and Hutter
    2017, arXiv:1608.03983).
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    return COSINE_END + (1 - COSINE_END) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Update:
    """One optimizer over a run's steps."""

    def __init__(self, model: nn.Module, config: TrainConfig, precision: Precision, steps: int) -> None:
        """``steps`` of them in the whole run."""
        self.config, self.precision, self.steps = config, precision, steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make(model, config)
        self.learning_rate = config.learning_rate
        """In the latest step."""
        self._changes = config.schedule != "constant" or config.warmup > 0

    def zero_grad(self) -> None:
        """Forgets the last step's gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> None:
        """New weights from the gradients, which all ranks agree on by now; ``step`` counts from 0 over the whole run."""
        if self._changes:
            self.learning_rate = self.config.learning_rate * rate_factor(self.config, step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate
        if self.config.clip:
            self.precision.unscale(self.optimizer)
            clip(self.parameters, self.config.clip)
        self.precision.step(self.optimizer)


def clip(parameters: Sequence[Tensor], most: float) -> None:
    """Shortens all gradients together to the length ``most``, if they are longer (Pascanu et al. 2013, arXiv:1211.5063).

    Of what all ranks have averaged and all parts of ``--accumulate`` have added up: shortened earlier, each rank's part would be
    shortened by another factor, and the sum would point elsewhere.
    """
    torch.nn.utils.clip_grad_norm_(parameters, most)
