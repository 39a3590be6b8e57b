"""A whole training, measured alike under every tool: through hooks, so that a tool's own loop stays as its documentation has it."""

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import job
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

TEST_BATCH = 512  # images a forward pass without gradients; the launchers' EVAL_BATCH


class Recorder:
    """Notes what a rank trained and when; two calls a step, microseconds."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Watches the bare ``model`` and ``optimizer``, before a tool wraps them."""
        self.model = model
        self.samples = self.steps = self.samples_first_step = 0
        self.first_step_done = 0.0
        model.register_forward_pre_hook(self._seen)
        optimizer.register_step_post_hook(self._stepped)

    def _seen(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training:
            self.samples += len(inputs[0])

    def _stepped(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == 1:
            self.first_step_done, self.samples_first_step = clock(), self.samples

    def done(self, accuracy: float) -> None:
        """After the last epoch's evaluation, which found ``accuracy``: writes the rank's record."""
        training_done = clock()
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        # As in job.train: gloo's threads may still hold a tensor, and an interpreter that ends then dies by SIGABRT (accelerate: 4
        # runs of 24). Told, so that it is not counted against the tool.
        began_waiting = clock()
        time.sleep(0.1)
        measured = {
            "waited_seconds": clock() - began_waiting,
            "first_step_done": self.first_step_done,
            "samples_first_step": self.samples_first_step,
            "training_done": training_done,
            "samples": self.samples,
            "steps": self.steps,
            "test_accuracy": accuracy,
            "parameter_sha256": digest.hexdigest(),
            "backend": dist.get_backend() if dist.is_initialized() else None,
            "finished": True,
        }
        job.write(job.who_i_am() | measured)


def clock() -> float:
    """Seconds on the one clock that all processes of a machine share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def loaders(world_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """(training, test) loaders with DataLoader's defaults, for a tool that shares each batch out itself."""
    return (
        DataLoader(job.digits(), batch_size=job.GLOBAL_BATCH // world_size, shuffle=True),
        DataLoader(job.digits(test=True), batch_size=TEST_BATCH),
    )


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Iterable[Any],
    test: Iterable[Any],
    epochs: int,
    backward: Callable[[Tensor], object],
    gather: Callable[[Tensor], Tensor],
) -> float:
    """The loop that accelerate's and Fabric's guides convert: train and, after each epoch, test.

    Args:
        model: what the tool made of the model.
        optimizer: what it made of the optimizer.
        train: its training batches.
        test: its test batches.
        epochs: passes over ``train``.
        backward: its backward pass.
        gather: gives every rank's part of a tensor (n,), along any dimensions.

    Returns:
        The last epoch's test accuracy, over all ranks.
    """
    accuracy = 0.0
    for _ in range(epochs):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            backward(F.cross_entropy(model(images), labels))
            optimizer.step()
        model.eval()
        right = seen = 0
        with torch.no_grad():
            for images, labels in test:
                hits = gather(model(images).argmax(1) == labels)
                right += int(hits.sum())
                seen += hits.numel()
        accuracy = right / seen
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"test accuracy {accuracy:.4f}", flush=True)
    return accuracy
