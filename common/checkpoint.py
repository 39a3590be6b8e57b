"""A saved model: whole or absent, never half."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import TrainConfig
from common.files import write_whole
from common.values import Nodes


def save(path: str | Path, model: nn.Module, config: TrainConfig) -> None:
    """Writes {"model": state dict on CPU, "config": plain dict}; ``torch.load(path, weights_only=True)`` reads it.

    ``model`` is the bare one, not DDP's wrapper: no ``module.`` in its names.
    """
    state: dict[str, Any] = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    plain = {name: int(value) if type(value) is Nodes else value for name, value in dataclasses.asdict(config).items()}
    content = {"model": state, "config": plain}
    write_whole(path, lambda stream: torch.save(content, stream))


def sha256(model: nn.Module) -> str:
    """Of names, types, shapes and bytes of all parameters and buffers: equal if and only if two models are the same to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
