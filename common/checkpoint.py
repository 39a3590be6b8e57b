"""A saved model: whole or absent, never half."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import TrainConfig
from common.errors import UsageError, one_line
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


def load(what: str, path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state dict, configuration) of a saved model.

    Args:
        what: how a person has named it, for messages: ``--resume cifar_net.pth``.
        path: of the file.

    Raises:
        UsageError: it is not there, or none that ``save`` wrote.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{what}: cannot be read ({error.strerror}); train with --save FILE first, and name that file") from None
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise UsageError(f"{what}: holds no saved model ({one_line(error, 100)}); name a file that --save wrote") from None
    if not isinstance(content, dict) or set(content) != {"model", "config"}:
        raise UsageError(f"{what}: holds no model and config; name a file that --save wrote")
    return content["model"], content["config"]


def resume(path: str, model: nn.Module) -> str:
    """Gives ``model`` the weights in the file that ``--resume`` names, and returns what to say of it; raises as these two."""
    what = f"--resume {path}"
    take_over(what, *load(what, path), model)
    return f"Weights from {path}; the optimizer starts afresh"


def take_over(what: str, state: dict[str, Any], config: dict[str, Any], model: nn.Module) -> None:
    """Gives ``model`` the weights of a saved one, as ``load`` has them.

    Raises:
        UsageError: it is another model.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError:
        saved, here = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (state, model.state_dict()))
        name = next(name for name in [*saved, *here] if saved.get(name) != here.get(name))
        raise UsageError(
            f"{what}: another model's weights: {name} is {_shape(saved.get(name))} there and {_shape(here.get(name))} here; it was "
            f"trained with --model {config.get('model')}"
        ) from None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "one number"


def sha256(model: nn.Module) -> str:
    """Of names, types, shapes and bytes of all parameters and buffers: equal if and only if two models are the same to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
