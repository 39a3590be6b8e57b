"""The models. ``forward(x, labels=None)`` returns {"loss", "logits"} with the loss as a mean over the samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import TrainConfig
from common.errors import UsageError, one_line
from common.gpt import GPT
from common.parts import build, load_class

Output = dict[str, Tensor]


class CNN(nn.Module):
    """Two convolutions and two linear layers for 28×28 grey pictures of ten classes; 421,642 parameters."""

    def __init__(self) -> None:
        """1→32→64 channels of 3×3, each with ReLU and 2×2 max-pooling, then 3,136→128→10."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, 128)
        self.classes = nn.Linear(128, 10)
        for layer in (self.conv1, self.conv2, self.hidden):  # He et al. 2015, arXiv:1502.01852: learns in half the epochs
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor, labels: Tensor | None = None) -> Output:
        """``image`` (n, 1, 28, 28), ``labels`` int64 (n,) → logits (n, 10) and, with labels, the mean cross-entropy."""
        x = F.max_pool2d(F.relu(self.conv1(image)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits = self.classes(F.relu(self.hidden(x.flatten(1))))
        return _output(logits, labels)


class CifarNet(nn.Module):
    """Two convolutions and three linear layers for 32×32 colour pictures of ten classes; 62,006 parameters.

    Source: https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
    """

    def __init__(self) -> None:
        """3→6→16 channels of 5×5, each with ReLU and 2×2 max-pooling, then 400→120→84→10."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.hidden1 = nn.Linear(16 * 5 * 5, 120)
        self.hidden2 = nn.Linear(120, 84)
        self.classes = nn.Linear(84, 10)

    def forward(self, image: Tensor, labels: Tensor | None = None) -> Output:
        """``image`` (n, 3, 32, 32), ``labels`` int64 (n,) → logits (n, 10) and, with labels, the mean cross-entropy."""
        x = F.max_pool2d(F.relu(self.conv1(image)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits = self.classes(F.relu(self.hidden2(F.relu(self.hidden1(x.flatten(1))))))
        return _output(logits, labels)


class Linear(nn.Module):
    """One linear layer to two classes."""

    def __init__(self, input_size: int = 20) -> None:
        """``input_size`` features → 2."""
        super().__init__()
        self.classes = nn.Linear(input_size, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        """``x`` (n, input_size), ``labels`` int64 (n,) → logits (n, 2) and, with labels, the mean cross-entropy."""
        return _output(self.classes(x), labels)


class MLP(nn.Module):
    """1→64→64→1 with one LayerNorm; 4,481 parameters at ``hidden_size`` 64, no batch statistics."""

    def __init__(self, hidden_size: int = 64) -> None:
        """``hidden_size`` is the width of both hidden layers."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 1),
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        """``x`` (n, 1), ``labels`` (n, 1) → logits (n, 1) and, with labels, the mean squared error."""
        return _output(self.layers(x), labels)


def _output(logits: Tensor, labels: Tensor | None) -> Output:
    return {"logits": logits} if labels is None else {"logits": logits, "loss": mean_loss(logits, labels)}


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for whole-number labels, else the mean squared error; a mean over the samples."""
    if labels.is_floating_point():
        if logits.shape != labels.shape:  # mse_loss would stretch one over the other: no mean over samples any more
            raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must have the same shape")
        return F.mse_loss(logits, labels)
    return F.cross_entropy(logits, labels)


def takes_labels(model: nn.Module) -> bool:
    """Whether ``model.forward`` has a second parameter for the labels."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([p for p in parameters if p.kind in kinds]) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def loss_and_logits(model: Callable[..., Any], with_labels: bool, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass.

    Args:
        model: the model, or what wraps it.
        with_labels: what ``takes_labels`` says of the model itself.
        x: inputs, shape (n, …).
        y: labels, shape (n, …).

    Returns:
        The mean loss over the n samples, shape (), and the logits, shape (n, …).
    """
    output = model(x, y) if with_labels else model(x)
    if isinstance(output, dict):
        logits = output["logits"]
        loss = output.get("loss")
    else:
        logits, loss = output, None
    return (mean_loss(logits, y) if loss is None else loss), logits


def build_model(config: TrainConfig) -> nn.Module:
    """The model that ``--model`` names, with weights from ``--seed``.

    Raises:
        UsageError: a class of the user's own cannot be imported or made, or is no ``nn.Module`` with parameters.
    """
    torch.manual_seed(config.seed)
    if config.model == "cnn":
        return CNN()
    if config.model == "linear":
        return Linear(config.input_size)
    if config.model == "mlp":
        return MLP(config.hidden_size)
    if config.model == "cifar_net":
        return CifarNet()
    if config.model == "gpt":
        return GPT(config.layers, config.heads, config.width, config.context)
    made = load_class("--model", config.model)
    model = build("--model", config.model, made, {"input_size": config.input_size, "hidden_size": config.hidden_size})
    if not isinstance(model, nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"--model {config.model}: does not fit; it must be a torch.nn.Module with parameters to train")
    return model


def check_fit(config: TrainConfig, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Runs one small batch through ``model`` without changing it, where it was not made for this data set.

    Raises:
        UsageError: the model does not take these inputs and labels.
    """
    training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            loss, _ = loss_and_logits(model.eval(), takes_labels(model), x, y)
        if loss.ndim:
            raise ValueError(f"its loss has shape {tuple(loss.shape)}, not that of one number")
    except Exception as error:
        raise UsageError(
            f"--model {config.model} does not fit --dataset {config.dataset} (x {tuple(x.shape)}, y {tuple(y.shape)}): "
            f"{one_line(error)}; forward(x, labels=None) must return logits, or a dict with loss and logits"
        ) from None
    finally:
        model.train(training)


def batch_dependent(model: nn.Module) -> list[str]:
    """Kinds of layers whose output depends on the rest of the batch or on chance: for them N ranks are not one process."""
    always = (nn.modules.batchnorm._BatchNorm, nn.RReLU)

    def depends(m: nn.Module) -> bool:
        chance = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else 0
        if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):  # these drop without a layer of their own
            chance = m.dropout
        return isinstance(m, always) or chance > 0

    return sorted({type(m).__name__ for m in model.modules() if depends(m)})


def describe(model: nn.Module) -> str:
    """The model layer by layer with the shapes and numbers of its parameters, and their sum."""
    rows = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False)]
        if own:
            shapes = ", ".join("×".join(map(str, p.shape)) for p in own)
            rows.append(
                f"  {name or type(module).__name__:<16} {type(module).__name__:<12} {shapes:<28} {sum(p.numel() for p in own):>10,}"
            )
    return "\n".join([*rows, f"  {'parameters':<58} {count_parameters(model):>10,}"])


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())
