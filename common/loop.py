"""The loop: one job, whoever launched it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common import acceleration, checkpoint, datasets, models, now, optimizers
from common.checks import check_world
from common.config import JOBS, TrainConfig
from common.console import Console
from common.device import choose_device, peak_memory_bytes, shared_out_memory_bytes, wait_for
from common.events import Phases
from common.files import write_json
from common.gpt import GPT, flops_per_token
from common.gradients import DDP, Gradients, Way, average_over, choose_way
from common.lean import spare_the_compiler
from common.meeting import Meeting, by_rank_0, check_alike, once_per_node
from common.peaks import peak_flops
from common.plots import Curves
from common.precision import Precision
from common.process_group import Group, announce, process_group, refused_together
from common.rank import Rank
from common.sampling import Sampler, make_sampler
from common.steps import Untimed, step_times, told
from common.uneven import join

Parts = tuple[datasets.Dataset, datasets.Dataset]
EVAL_BATCH = 512  # samples a forward pass without gradients


def run(config: TrainConfig, rank: Rank, phases: Phases) -> None:
    """Trains the job of ``config`` as ``rank`` and notes when each phase ended.

    Raises:
        UsageError: the configuration does not fit this machine or these ranks.
        RunError: a rank did not arrive.
    """
    console = Console(config, rank)
    arrival = announce(rank, config, phases.origin if phases.known else None)
    shipped = torch.get_num_threads()
    with refused_together(arrival):  # while the others come: what needs none of them
        check_world(config, rank.world_size)
        device = choose_device(config, rank)
        way = choose_way(config, rank, device)
        precision = Precision(config, device)
        dtype = precision.weights
        torch.set_num_threads(config.threads or 1)
        acceleration.check(config, device)
        if config.keep_memory:
            acceleration.keep_freed_memory()
        if not config.compile:
            spare_the_compiler()
        train_data, eval_data = _data(config, arrival.meeting, lambda: datasets.load_datasets(config, device, dtype, console.line))
        check_world(config, rank.world_size, len(train_data))
        model = models.build_model(config)
        if saved := config.resume:  # on rank 0, whose weights all start with
            by_rank_0(arrival.meeting, lambda: console.line(checkpoint.resume(saved, model)))
        model = acceleration.placed(model, config, device, dtype)
        job = JOBS[config.job]
        if (config.model, config.dataset) != (job.model, job.dataset):
            first = torch.arange(min(2, len(train_data)))
            models.check_fit(config, model, *datasets.fetch(train_data, first, device, dtype))
        if config.sync_batchnorm:
            model = acceleration.with_common_statistics(model)
    with process_group(arrival, device, console.arrived) as group:
        threads = group.threads(config, shipped)
        torch.set_num_threads(threads)
        phases.joined(group.clock.offset_seconds, group.clock.round_trip_seconds, group.arrivals[0]["command_started"], threads)
        console.joined(group, threads)
        console.way(way)
        console.compute(device.type, optimizers.title(model, config))
        console.cores(group)
        console.unlike_one_process(model)
        console.model(model)
        training = _Run(config, group, console, phases, model, way, train_data, eval_data, device, precision)
        training.epochs()
        training.report(threads, shipped)
    phases.mark("group_left")


def _data(config: TrainConfig, meeting: Meeting | None, load: Callable[[], Parts]) -> Parts:
    """Training and evaluation data, which are made ready once per node where they come from files, and are the same on all."""
    if config.dataset in datasets.GENERATED:
        return load()
    parts = once_per_node(meeting, load) if config.dataset in datasets.FROM_FILES else load()
    check_alike(meeting, datasets.facts(*parts), "give all nodes the same data")
    return parts


@dataclass
class _Run:
    """The state of one rank's training."""

    config: TrainConfig
    group: Group
    console: Console
    phases: Phases
    model: nn.Module
    way: Way
    train_data: datasets.Dataset
    eval_data: datasets.Dataset
    device: torch.device
    precision: Precision
    loss_per_step: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)
    eval_accuracy: list[float | None] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)  # in each epoch's last step
    times: Untimed = field(default_factory=Untimed)
    step_seconds: list[float] = field(default_factory=list)  # of each epoch's training steps, without the very first step
    eval_seconds: float = 0.0
    samples_per_epoch: int = 0
    samples_after_first_step: int = 0
    bytes_per_step: int = 0  # that this rank hands to the collectives
    epoch_end_seconds: list[float] = field(default_factory=list)  # of each epoch, from the end of the first step

    def epochs(self) -> None:
        """Trains and evaluates, epoch by epoch."""
        rank = self.group.rank
        sampler = make_sampler(self.config, len(self.train_data), rank)
        with_labels = models.takes_labels(self.model)
        if self.config.compile:
            acceleration.compile(self.model)
        self.times = step_times(self.config, self.group, self.way, self.model)
        gradients = average_over(self.group, self.model, self.config, self.way)
        update = optimizers.Update(self.model, self.config, self.precision, sampler.steps * self.config.epochs)
        self.phases.mark("model_built")
        set_epoch = getattr(self.train_data, "set_epoch", lambda epoch: None)  # of data that differ from epoch to epoch
        for epoch in range(self.config.epochs):
            set_epoch(epoch)
            with self._until_all_are_done(gradients, update.optimizer):
                sums = self._train_epoch(epoch, sampler, gradients, update, with_labels)
            wait_for(self.device)
            trained = now()
            seen = self._evaluate(with_labels)
            # One reduction an epoch: sums over samples, divided once by the number of samples.
            totals = self.group.sum(torch.cat([sums.double().cpu(), seen]))
            self.eval_seconds += now() - trained
            self.epoch_end_seconds.append(self.phases.now() - self.phases.marks["first_step_done"])
            self.learning_rates.append(update.learning_rate)
            self._note_epoch(epoch, sampler, totals)
        self.bytes_per_step = gradients.bytes_per_step()
        gradients.close()
        self.phases.mark("training_done")
        self.samples_per_epoch = sampler.samples_per_epoch
        self.samples_after_first_step = sampler.samples_per_epoch * self.config.epochs - int(sampler.batch_samples()[0])

    def _until_all_are_done(self, gradients: Gradients, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
        """Around an epoch's steps, where ranks make different numbers of them."""
        if self.config.sampler == "uneven" and isinstance(gradients, DDP):
            return join(gradients.wrapped, optimizer, self.precision)
        return nullcontext()

    def _batch(self, data: datasets.Dataset, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = datasets.fetch(data, indices, self.device, self.precision.weights)
        return (acceleration.channels_last(x) if self.config.channels_last else x), y

    def _train_epoch(
        self, epoch: int, sampler: Sampler, gradients: Gradients, update: optimizers.Update, with_labels: bool
    ) -> Tensor:
        """One pass over this rank's share; returns its summed loss per step, shape (steps,), on the device."""
        sums = torch.zeros(sampler.steps, device=self.device, dtype=self.precision.weights)
        log_every, times = self.config.log_every, self.times
        self.model.train()
        began = now()
        for step, shares in enumerate(times.steps(sampler.epoch(epoch))):
            update.zero_grad()
            times.mark("optimizer")
            for number, share in enumerate(shares, 1):
                with gradients.no_sync() if number < len(shares) or times.probing else nullcontext():
                    x, y = self._batch(self.train_data, share.indices)
                    times.mark("data")
                    with self.precision.autocast():
                        loss, _ = models.loss_and_logits(gradients.model, with_labels, x, y)
                    times.mark("forward")
                    self.precision.backward(loss if share.weight == 1 else loss * share.weight)
                    times.mark("backward")
                sums[step].add_(loss.detach(), alpha=share.samples)
                times.mark("rest")
            times.averaging(gradients).finish()
            times.mark("communication")
            update.step(epoch * sampler.steps + step)
            times.mark("optimizer")
            if epoch == step == 0:
                wait_for(self.device)
                self.phases.mark("first_step_done")
                began = now()
            if log_every and (step + 1) % log_every == 0 and self.console.speaks:
                own = sum(share.samples for share in shares)
                self.console.step(epoch + 1, step + 1, sampler.steps, float(sums[step]) / own if own else float("nan"))
        wait_for(self.device)
        self.step_seconds.append(now() - began)
        return sums

    def _evaluate(self, with_labels: bool) -> Tensor:
        """This rank's part of the evaluation data: float64 (summed loss, correct, samples, samples with a class)."""
        mine = datasets.eval_share(len(self.eval_data), self.group.rank.world_size, self.group.rank.rank)
        totals = torch.zeros(4, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad(), self.precision.autocast():
            for indices in torch.arange(mine.start, mine.stop).split(EVAL_BATCH):
                if not len(indices):
                    continue
                x, y = self._batch(self.eval_data, indices)
                loss, logits = models.loss_and_logits(self.model, with_labels, x, y)
                totals[0] += loss.double().cpu() * len(indices)
                totals[2] += len(indices)
                if logits.ndim == 2 and y.ndim == 1 and not y.is_floating_point():
                    totals[1] += (logits.argmax(1) == y).sum().cpu()
                    totals[3] += len(indices)
        return totals

    def _note_epoch(self, epoch: int, sampler: Sampler, totals: Tensor) -> None:
        steps, (loss, correct, samples, classed) = totals[:-4], totals[-4:].tolist()
        sizes = sampler.batch_samples()
        self.loss_per_step += (steps / sizes).tolist()
        self.train_loss.append(float(steps.sum() / sizes.sum()))
        self.eval_loss.append(loss / samples)
        self.eval_accuracy.append(correct / classed if classed else None)
        self.console.epoch(epoch + 1, self.train_loss[-1], self.eval_loss[-1], self.eval_accuracy[-1])

    def _used(self, tokens: float | None) -> float | None:
        """The part of the devices' peak that is the model's own operations (MFU); None where that is not known."""
        peak = peak_flops(self.device, bool(self.precision.half))
        if not (tokens and peak and isinstance(self.model, GPT)):
            return None
        return tokens * flops_per_token(self.model) / (peak * self.group.rank.world_size)

    def _curves(self, step_seconds: Tensor) -> Curves:
        """What is drawn; ``step_seconds``: the slowest rank's, shape (epochs,), the first without the very first step."""
        samples = torch.full((self.config.epochs,), float(self.samples_per_epoch))
        samples[0] -= self.samples_per_epoch * self.config.epochs - self.samples_after_first_step
        return Curves(
            self.train_loss,
            self.eval_loss,
            self.eval_accuracy,
            self.learning_rates,
            [n / s if n and s else None for n, s in zip(samples.tolist(), step_seconds.tolist(), strict=True)],
        )

    def report(self, threads: int, shipped: int) -> None:
        """Gathers what every rank measured; rank 0 tells and writes it."""
        marks = self.phases.marks
        memory_now = shared_out_memory_bytes()  # here, while every rank still has all of its own
        steps_took = [*self.step_seconds, sum(self.step_seconds)]
        own = [*marks.values(), *steps_took, self.eval_seconds, float(memory_now or 0), float(peak_memory_bytes() or 0)]
        everyone = self.group.gather(torch.tensor(own, dtype=torch.float64))
        slowest = dict(zip(marks, everyone.max(0).values.tolist(), strict=False))
        train_seconds = slowest["training_done"] - slowest["first_step_done"]
        step_seconds, eval_seconds = everyone[:, -4].max().item(), everyone[:, -3].max().item()
        rate = self.samples_after_first_step / step_seconds if self.samples_after_first_step and step_seconds else None
        launch_seconds = slowest["first_step_done"] if self.phases.known else None
        tokens = rate * self.config.context if rate and self.config.dataset == "text" else None
        used = self._used(tokens)
        self.console.summary(train_seconds, rate, launch_seconds, tokens, used)
        steps = self.times.gathered()
        if steps and not self.group.rank.rank:
            self.console.line(told(steps))
        if self.group.rank.rank:
            return
        config, rank = self.config, self.group.rank
        if config.plot:
            from common.plots import training_curves

            title = f"{config.job} on {rank.world_size} rank{'s' * (rank.world_size > 1)} ({rank.launcher})"
            seconds = everyone[:, len(marks) : -4].max(0).values
            training_curves(config.plot, self._curves(seconds), title)
        if config.save:
            checkpoint.save(config.save, self.model, config)
        if config.result:
            pss, memory = ([int(m) for m in everyone[:, column].tolist()] for column in (-2, -1))
            result: dict[str, Any] = {
                "launcher": rank.launcher,
                "start_method": rank.start_method,
                "restart": rank.restart,
                "world_size": rank.world_size,
                "threads_per_rank": threads,
                "threads_as_shipped": shipped,
                "device": self.device.type,
                "backend": self.group.backend,
                "job": config.job,
                "model": config.model,
                "dataset": config.dataset,
                "precision": config.precision,
                "channels_last": config.channels_last,
                "keep_memory": config.keep_memory,
                "compile": config.compile,
                "sync_batchnorm": config.sync_batchnorm,
                "optimizer": config.optimizer,
                "fused_optimizer": optimizers.fused(self.model, config),
                "sampler": config.sampler,
                "sync": self.way.name,
                "sync_asked": config.sync,
                "compress": config.compress,
                "bytes_per_step": self.bytes_per_step,
                "bucket_mb": config.bucket_mb,
                "accumulate": config.accumulate,
                "global_batch_size": config.global_batch(rank.world_size),
                "learning_rate": config.learning_rate,
                "learning_rate_per_epoch": self.learning_rates,
                "epochs": config.epochs,
                "seed": config.seed,
                "hosts": [a["host"] for a in self.group.arrivals],
                "cores_per_rank": [a["cores"] for a in self.group.arrivals],
                "parameters": models.count_parameters(self.model),
                "parameter_sha256": checkpoint.sha256(self.model),
                "batch_dependent_layers": models.batch_dependent(self.model),
                "loss_per_step": self.loss_per_step,
                "train_loss_per_epoch": self.train_loss,
                "eval_loss_per_epoch": self.eval_loss,
                "eval_accuracy": self.eval_accuracy,
                "train_seconds": train_seconds,
                "step_seconds": step_seconds,
                "step_seconds_per_epoch": everyone[:, len(marks) : -4].max(0).values.tolist(),
                "eval_seconds": eval_seconds,
                "step_times": steps,
                "epoch_end_seconds": self.epoch_end_seconds,
                "samples_per_second": rate,
                "tokens_per_second": tokens,
                "model_flops_utilisation": used,
                "launch_seconds": launch_seconds,
                "phases": slowest,
                "peak_memory_bytes": max(memory) or None,
                "peak_memory_bytes_per_rank": memory,
                "pss_bytes_per_rank": pss if any(pss) else None,
                "torch_version": torch.__version__,
                "pid": os.getpid(),
            }
            write_json(config.result, result)
