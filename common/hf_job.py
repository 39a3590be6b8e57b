"""The job in the words of the Hugging Face Trainer, which has a loop of its own: samples, metrics, settings, and what is noted.

Imports no transformers: that is ``launchers/hf_trainer.py``'s to do.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from common import checkpoint, datasets, models, now, optimizers
from common.checks import check_world
from common.config import TrainConfig
from common.device import choose_backend, choose_device, usable_cores
from common.errors import UsageError
from common.events import Phases
from common.files import write_json
from common.rank import Rank
from common.values import AS_SHIPPED

EVAL_BATCH = 512
ORDER = "the Trainer's own shuffle, and a last batch filled up to all ranks' size"
_NOT_ITS: dict[str, object] = {
    "sync": "ddp",
    "compress": None,
    "sampler": "exact",
    "channels_last": False,
    "sync_batchnorm": False,
    "step_times": False,
    "inspect": False,
}


def check(config: TrainConfig, world_size: int) -> None:
    """Refuses what the Trainer does not do.

    Raises:
        UsageError: a flag that belongs to our own loop, or a batch that it cannot share out.
    """
    for name, default in _NOT_ITS.items():
        if getattr(config, name) != default:
            raise UsageError(f"--{name} with hf_trainer.py: the Trainer has a loop of its own, without it; leave it out")
    if config.precision == "fp64":
        raise UsageError("--precision fp64 with hf_trainer.py: the Trainer computes in fp32, bf16 or fp16")
    if config.global_batch(world_size) % (world_size * config.accumulate):
        parts = world_size * config.accumulate
        raise UsageError(
            f"--global_batch_size {config.global_batch(world_size)} with hf_trainer.py: the Trainer gives each of {parts} parts as "
            "much; give a multiple, or --batch_size"
        )


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """A data set of the job's for a DataLoader: whole batches are gathered at once where that is possible."""

    def __init__(self, data: datasets.Dataset) -> None:
        """Holds ``data``."""
        self.data = data

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample."""
        x, y = self.data[index]
        return x, y

    def set_epoch(self, epoch: int) -> None:
        """Passes it on to data that differ from epoch to epoch; accelerate's loader calls it."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch."""
        return datasets.fetch(self.data, torch.tensor(indices), torch.device("cpu"), torch.float32)


class Collate:
    """The batch as the keyword arguments of the model's ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        """``model``'s first parameter is the input, whatever it is called; the second must be ``labels``."""
        self.x = next(iter(inspect.signature(model.forward).parameters))

    def __call__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """``batch``: what ``Samples.__getitems__`` gave."""
        x, y = batch
        return {self.x: x, "labels": y}


def accuracy(predictions: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """For ``compute_metrics``: the share of right classes; nothing for labels that are none."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        return {}
    return {"accuracy": float((predictions.argmax(1) == labels).mean())}


class Notes:
    """What a rank trained, and when: through hooks, so that the Trainer's loop stays as it is."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, phases: Phases) -> None:
        """Watches the bare ``model`` and its ``optimizer``."""
        self.phases = phases
        self.samples_after_first_step = 0
        self.step_seconds: list[float] = []  # of each epoch's training, without the very first step
        self.eval_seconds = 0.0
        self.epoch_end_seconds: list[float] = []  # of each epoch's evaluation, from the end of the first step
        self._began = self._stepped = self._evaluating = self._evaluated = 0.0
        model.register_forward_pre_hook(self._forward, with_kwargs=True)
        model.register_forward_hook(self._forwarded)
        optimizer.register_step_post_hook(self._step)

    def _forward(self, model: nn.Module, inputs: Sequence[Any], named: dict[str, Tensor]) -> None:
        if not model.training:
            if not self._evaluating:
                self._evaluating = now()
                self.end_epoch()
            return
        self._end_evaluation()
        self._began = self._began or now()
        if "first_step_done" in self.phases.marks:
            self.samples_after_first_step += len(named["labels"])

    def _forwarded(self, model: nn.Module, *_: Any) -> None:
        if not model.training:
            self._evaluated = now()

    def _end_evaluation(self) -> None:
        if self._evaluating:
            self.eval_seconds += self._evaluated - self._evaluating
            self.epoch_end_seconds.append(self.phases.now() - (now() - self._evaluated) - self.phases.marks["first_step_done"])
            self._evaluating = 0.0

    def _step(self, *_: Any) -> None:
        self._stepped = now()
        if "first_step_done" not in self.phases.marks:
            self.phases.mark("first_step_done")
            self._began = self._stepped

    def end_epoch(self) -> None:
        """The epoch's last step is done."""
        if self._began:
            self.step_seconds.append(self._stepped - self._began)
            self._began = 0.0

    def done(self) -> None:
        """The last epoch has been evaluated."""
        self.end_epoch()
        self._end_evaluation()
        self.phases.mark("training_done")


class Session:
    """Model, data, optimizer and settings of a run, ready for the Trainer."""

    def __init__(self, config: TrainConfig, rank: Rank, phases: Phases) -> None:
        """Makes them.

        Raises:
            UsageError: the configuration does not fit the Trainer, this machine or these ranks.
        """
        check(config, rank.world_size)
        self.config, self.rank, self.phases = config, rank, phases
        self.device = choose_device(config, rank)
        if config.threads != AS_SHIPPED:
            torch.set_num_threads(config.threads or max(1, len(usable_cores()) // rank.local_world_size))
        cpu = torch.device("cpu")
        train, evaluation = datasets.load_datasets(config, cpu, torch.float32, print)
        check_world(config, rank.world_size, len(train))
        self.train_data, self.eval_data = Samples(train), Samples(evaluation)
        self.model = models.build_model(config)
        if list(inspect.signature(self.model.forward).parameters)[1:2] != ["labels"]:
            raise UsageError(
                f"--model {config.model} with hf_trainer.py: the Trainer's models compute their loss; forward(x, labels=None) must "
                "return a dict with loss and logits"
            )
        if config.resume:
            said = checkpoint.resume(config.resume, self.model)
            if rank.rank == 0:
                print(said, flush=True)
        self.model.to(self.device)
        self.optimizer = optimizers.make(self.model, config)
        steps = config.epochs * -(-len(train) // config.global_batch(rank.world_size))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: optimizers.rate_factor(config, step, steps))
        self.notes = Notes(self.model, self.optimizer, phases)
        phases.mark("model_built")

    def arguments(self) -> dict[str, Any]:
        """For ``TrainingArguments``."""
        config, rank = self.config, self.rank
        return {
            "use_cpu": self.device.type == "cpu",
            "seed": config.seed,
            "num_train_epochs": config.epochs,
            "per_device_train_batch_size": config.global_batch(rank.world_size) // (rank.world_size * config.accumulate),
            "gradient_accumulation_steps": config.accumulate,
            "per_device_eval_batch_size": EVAL_BATCH,
            "max_grad_norm": config.clip,
            "bf16": config.precision == "bf16",
            "fp16": config.precision == "fp16",
            "torch_compile": config.compile,
            "eval_strategy": "epoch",
            "logging_strategy": "epoch",
            "save_strategy": "epoch" if config.save else "no",
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "label_names": ["labels"],
            "remove_unused_columns": False,
            "dataloader_pin_memory": self.device.type == "cuda",
            "ddp_backend": choose_backend(config, self.device) if rank.forms_group else None,
            "ddp_find_unused_parameters": config.find_unused_parameters,
            "ddp_bucket_cap_mb": max(1, round(config.bucket_mb)),
            "ddp_timeout": round(config.patience(rank.one_node)),
        }

    def finish(self, log: Sequence[dict[str, float]]) -> None:
        """Writes what was asked for; ``log``: the Trainer's ``state.log_history``."""
        self.notes.done()
        backend = dist.get_backend() if dist.is_initialized() else None
        config, found = self.config, result(self.config, self.model, self.notes, log, self.rank.world_size, backend)
        if self.rank.rank == 0:
            rate = found["samples_per_second"]
            told = f", {rate:,.0f} samples/s" if rate else ""
            print(f"Total time: {found['train_seconds']:.2f} s{told}", flush=True)
            if config.save:
                checkpoint.save(config.save, self.model, config)
            if config.result:
                write_json(config.result, found)
        if backend:
            time.sleep(0.1)  # for gloo's threads, as in benchmarks/peer_scripts: they may hold a tensor as the interpreter ends
            dist.destroy_process_group()


def result(
    config: TrainConfig, model: nn.Module, notes: Notes, log: Sequence[dict[str, float]], world_size: int, backend: str | None
) -> dict[str, Any]:
    """What ``--result`` holds; ``log``: the Trainer's ``state.log_history``."""
    marks = notes.phases.marks
    accuracies = [line.get("eval_accuracy") for line in log if "eval_loss" in line]
    step_seconds = sum(notes.step_seconds)
    rate = notes.samples_after_first_step * world_size / step_seconds if step_seconds else None
    return {
        "launcher": "hf_trainer",
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "device": next(model.parameters()).device.type,
        "backend": backend,
        "job": config.job,
        "model": config.model,
        "dataset": config.dataset,
        "precision": config.precision,
        "sampler": "trainer",
        "order": ORDER,
        "optimizer": config.optimizer,
        "global_batch_size": config.global_batch(world_size),
        "learning_rate": config.learning_rate,
        "epochs": config.epochs,
        "seed": config.seed,
        "parameters": models.count_parameters(model),
        "parameter_sha256": checkpoint.sha256(model),
        "loss_per_step": [],
        "train_loss_per_epoch": [line["loss"] for line in log if "loss" in line],
        "eval_loss_per_epoch": [line["eval_loss"] for line in log if "eval_loss" in line],
        "eval_accuracy": accuracies,
        "learning_rate_per_epoch": [line["learning_rate"] for line in log if "learning_rate" in line],
        "train_seconds": marks["training_done"] - marks["first_step_done"],
        "step_seconds": step_seconds,
        "step_seconds_per_epoch": notes.step_seconds,
        "eval_seconds": notes.eval_seconds,
        "epoch_end_seconds": notes.epoch_end_seconds,
        "samples_per_second": rate,
        "launch_seconds": marks["first_step_done"] if notes.phases.known else None,
        "phases": marks,
        "torch_version": torch.__version__,
    }
