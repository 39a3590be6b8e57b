"""What a person sees while it trains."""

from __future__ import annotations

import contextlib
import math
import shutil
import socket
import sys
from collections.abc import Sequence
from io import StringIO

from torch import nn

from common import models
from common.config import TrainConfig
from common.device import cores_of
from common.gradients import Way
from common.process_group import Group
from common.rank import Rank

GAP = 2  # blanks between the columns of a table


class Console:
    """Prints for one rank. The others are silent unless ``--log_all_ranks``.

    Each node's first rank speaks; where all nodes share a terminal, rank 0 alone.
    """

    def __init__(self, config: TrainConfig, rank: Rank) -> None:
        """Speaks for ``rank``."""
        self.config, self.rank = config, rank
        first = rank.rank if rank.one_terminal else rank.local_rank
        self.speaks = first == 0 or config.log_all_ranks
        self.prefix = f"[Rank {rank.rank}] " if config.log_all_ranks else ""

    def line(self, text: str, everyone: bool = False, prefix: str | None = None) -> None:
        """Prints in one write, so that the lines of several ranks do not run into each other."""
        if self.speaks or everyone:
            mark = self.prefix if prefix is None else prefix
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.write("".join(f"{mark}{row}\n" for row in text.splitlines()))
                sys.stdout.flush()

    def arrived(self, group: Group) -> None:
        """Each node's first rank tells how it reaches the other nodes; with ``--debug`` rank 0, which process each rank is."""
        if group.network:
            self.line(f"{socket.gethostname()}: {group.network}", everyone=self.rank.local_rank == 0)
        if self.config.debug and self.rank.rank == 0:
            pids = [f"{number} is {a['pid']} on {a['host']}" for number, a in enumerate(group.arrivals)]
            self.line(f"Process ids: rank {', '.join(pids)}")

    def joined(self, group: Group, threads: int) -> None:
        """Every rank says once that it is there; rank 0 then tells what is about to run."""
        r = self.rank
        self.line(
            f"Process initialized on {socket.gethostname()}, local_rank: {r.local_rank}, world_size: {r.world_size}",
            everyone=True,
            prefix=f"[Rank {r.rank}] ",
        )
        if r.rank == 0:
            c = self.config
            batch = c.global_batch(r.world_size)
            per_rank = batch / (r.world_size * c.accumulate)
            again = f", restart {r.restart}" if r.restart else ""
            nodes = len({a["node_rank"] for a in group.arrivals})
            self.line(
                f"Launcher {r.title}{again}: {r.world_size} rank{'s' * (r.world_size > 1)} on {nodes} node{'s' * (nodes > 1)}, "
                f"{group.device.type}, {group.backend or 'no process group'}, {threads} thread{'s' * (threads > 1)} per rank\n"
                f"Job {c.job}: model {c.model}, data {c.dataset}, {c.epochs} epoch{'s' * (c.epochs > 1)}, "
                f"learning rate {c.learning_rate:g}, {c.precision}, seed {c.seed}, sampler {c.sampler}\n"
                f"Batch: {batch} samples a step, {per_rank:g} per rank and forward pass"
            )

    def way(self, way: Way) -> None:
        """Rank 0 tells how gradients become one."""
        if self.rank.rank == 0 and self.rank.world_size > 1:
            compressed = f", sent as {self.config.compress}" if self.config.compress else ""
            chosen = f" (--sync {self.config.sync}: {way.reason})" if way.reason else ""
            self.line(f"Gradients: {way.name}{compressed}{chosen}")

    def cores(self, group: Group) -> None:
        """Rank 0 tells where a launcher has bound its node's ranks to fewer cores than it may use itself."""
        used = set().union(*group.local_cores())
        if self.rank.rank == 0 and len(used) < (there := len(cores_of(self.rank.launchers[-1:]) | used)):
            many = len(group.local_cores()) > 1
            self.line(
                f"Cores: the launcher has bound {'these ranks' if many else 'this rank'} to {len(used)} of {there} cores, the "
                "others stay idle; mpirun --bind-to none leaves all"
            )

    def unlike_one_process(self, model: nn.Module) -> None:
        """Rank 0 tells of layers for which N ranks are not one process."""
        kinds = [name for name in models.batch_dependent(model) if "Norm" in name and "Sync" not in name]
        if self.rank.rank == 0 and self.rank.world_size > 1 and kinds:
            self.line(
                f"Note: {', '.join(kinds)} normalises each rank's part of a batch by itself, so {self.rank.world_size} ranks do "
                "not compute what one process does: give --sync_batchnorm (CUDA), or take GroupNorm or LayerNorm"
            )

    def compute(self, device: str, optimizer: str) -> None:
        """Rank 0 tells in which numbers, layout and kernels a step is computed."""
        if self.rank.rank == 0:
            c = self.config
            half = f"autocast to {c.precision}, float32 weights" if c.precision in ("bf16", "fp16") else c.precision
            extra = [name for name in ("channels_last", "compile", "sync_batchnorm", "keep_memory") if getattr(c, name)]
            slow = " (fp16 is very slow on CPU; bf16 is not)" if c.precision == "fp16" and device == "cpu" else ""
            self.line(f"Compute: {', '.join([half, *extra, optimizer])}{slow}")

    def model(self, model: nn.Module) -> None:
        """Rank 0 shows the model."""
        if self.rank.rank == 0:
            self.line("Model:\n" + models.describe(model))

    def step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """This rank's own loss, every ``--log_every`` steps."""
        self.line(f"Epoch [{epoch}/{self.config.epochs}] Step [{step}/{steps}] - Local Loss: {loss:.6f}")

    def epoch(self, epoch: int, train_loss: float, eval_loss: float, accuracy: float | None) -> None:
        """The losses of the whole group."""
        tail = "" if accuracy is None else f", Eval Accuracy: {100 * accuracy:.2f} %"
        if self.config.dataset == "text":
            tail = f" ({eval_loss / math.log(2):.4f} bits per byte)"
        self.line(f"Epoch [{epoch}/{self.config.epochs}] - Train Loss: {train_loss:.6f}, Eval Loss: {eval_loss:.6f}{tail}")

    def summary(
        self,
        train_s: float,
        samples_per_s: float | None,
        launch_s: float | None,
        tokens_per_s: float | None = None,
        used: float | None = None,
    ) -> None:
        """Rank 0 tells the times; ``used``: the part of the devices' peak that the model's operations were."""
        if self.rank.rank == 0:
            launch = "" if launch_s is None else f" (after {launch_s:.2f} s to launch, first step included)"
            rate = "" if samples_per_s is None else f", {samples_per_s:,.0f} samples/s"
            rate += "" if tokens_per_s is None else f", {tokens_per_s:,.0f} tokens/s"
            rate += "" if used is None else f", model FLOPs utilisation {100 * used:.1f} %"
            epochs = self.config.epochs
            self.line(f"Total time: {train_s:.2f} s{launch}, average time per epoch: {train_s / epochs:.3f} s{rate}")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> str:
    """``rows`` as text in columns under ``headers`` (none: leave them out).

    A terminal's width is kept to: columns that do not fit come below, beside the first one again, and a cell that does not fit
    is folded. Elsewhere the table is as wide as it needs, so that nothing is cut.
    """
    from rich.console import Console as Screen
    from rich.table import Table

    width = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else 10_000
    screen = Screen(file=StringIO(), width=max(20, width), color_system=None, markup=False, emoji=False, highlight=False)
    columns = list(zip(*([headers] if headers else []), *rows, strict=True))
    needs = [GAP + max(len(line) for cell in column for line in cell.splitlines() or [""]) for column in columns]
    blocks = [[0]]
    for number in range(1, len(columns)):
        if len(blocks[-1]) > 1 and sum(needs[n] for n in (*blocks[-1], number)) - GAP > width:
            blocks.append([0])
        blocks[-1].append(number)
    for block in blocks:
        if block is not blocks[0]:
            screen.print()
        drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=bool(headers), header_style="")
        for number in block:
            drawn.add_column(headers[number] if headers else "", overflow="fold")
        for row in rows:
            drawn.add_row(*(row[number] for number in block))
        screen.print(drawn)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(" " * indent + row.rstrip() for row in text.splitlines())
