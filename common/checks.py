"""What does not go together, on any machine: refused before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from common.config import DATASET_FLAGS, DIGITS_TRAIN_SIZE, LAUNCHERS_WITHOUT_MPI, TrainConfig
from common.errors import UsageError
from common.files import beside
from common.interfaces import interfaces, is_own, leads_back
from common.rank import on_this_machine


def check_gradients(name: str, config: TrainConfig, given: Mapping[str, str]) -> None:
    """Refuses ways of averaging that do not go together.

    Args:
        name: the launcher.
        config: the run.
        given: field → how it was given, of those that were.

    Raises:
        UsageError: two of them contradict each other, or the launcher's ranks cannot do it.
    """
    if config.sync == "mpi" and name in LAUNCHERS_WITHOUT_MPI:
        raise UsageError(
            f"--sync mpi under {name}: its ranks are in no MPI world; start launchers/mpi.py with mpirun, or give --sync "
            "shared_memory (one machine) or ddp"
        )
    if config.compress and config.sync not in ("ddp", "auto"):
        raise UsageError(
            f"--compress {config.compress} with --sync {config.sync}: only ddp sends gradients smaller; leave one of them out"
        )
    if config.step_times and config.sampler == "uneven":
        raise UsageError("--step_times with --sampler uneven: ranks make different numbers of steps; leave one of them out")
    if config.sampler == "uneven" and config.sync in ("by_hand", "by_hand_flat"):
        raise UsageError(
            f"--sampler uneven with --sync {config.sync}: a rank without data left would be missing in the others' all-reduces, "
            "which wait for it; only DistributedDataParallel has Join for that: give --sync ddp"
        )
    if config.sampler == "uneven" and config.sync_batchnorm:
        raise UsageError(
            "--sampler uneven with --sync_batchnorm: a rank without data left answers DDP's all-reduces (Join), not those of batch "
            "statistics, and the others would wait for it; leave one of them out"
        )
    if config.precision == "fp16" and config.compress == "powersgd":
        raise UsageError(
            "--compress powersgd with --precision fp16: PowerSGD keeps what it did not send for later, and fp16's overflows would "
            "stay in it for good; give --precision bf16, or another --compress"
        )
    for flag_name in ("bucket_mb", "find_unused_parameters"):
        if flag_name in given and config.sync in ("by_hand", "by_hand_flat"):
            raise UsageError(f"--{flag_name} with --sync {config.sync}: it is DistributedDataParallel's; leave one of them out")


def check_model(config: TrainConfig) -> None:
    """Raises UsageError where a built-in model cannot have the sizes that were given."""
    if config.model == "gpt" and config.width % config.heads:
        raise UsageError(f"--width {config.width} with --heads {config.heads}: each head takes an equal part; give a multiple")


def check_writable(what: str, path: Path) -> None:
    """Raises UsageError unless a file can be made beside ``path`` (which a write replaces as a whole)."""
    folder = path.absolute().parent
    probe = beside(path.absolute())
    try:
        if path.is_dir():
            raise UsageError(f"{what}: is a folder; name a file")
        if not folder.is_dir():
            raise UsageError(f"{what}: there is no folder {folder}; make it first, or name another file")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{what}: cannot be written ({error.strerror}); name another file") from None


def train_size(config: TrainConfig) -> int | None:
    """Training samples of a built-in data set; None for a class of the user's own, known once it is made."""
    if config.dataset == "digits":
        return DIGITS_TRAIN_SIZE
    return config.data_size if config.dataset in DATASET_FLAGS else None


def check_world(config: TrainConfig, world_size: int, samples: int | None = None) -> None:
    """Refuses what cannot be trained on ``world_size`` ranks.

    Args:
        config: the run.
        world_size: ranks in all.
        samples: training samples; by default what ``train_size`` knows without loading anything.

    Raises:
        UsageError: a batch larger than the data, or one that the chosen sampler cannot share out.
    """
    samples = train_size(config) if samples is None else samples
    batch = config.global_batch(world_size)
    if samples is not None and batch > samples:
        given = f"--global_batch_size {batch}"
        if config.batch_size is not None:
            given = f"--batch_size {config.batch_size} on {world_size} ranks, {batch} samples a step"
        raise UsageError(f"{given}: larger than the data ({samples} training samples); give a smaller one")
    if config.sampler == "distributed" and batch % (world_size * config.accumulate):
        raise UsageError(
            f"--sampler distributed with --global_batch_size {batch}: {world_size * config.accumulate} parts do not divide it; "
            "give a multiple, or --sampler exact, which cuts any batch"
        )
    if config.sampler == "uneven" and batch < world_size:
        raise UsageError(
            f"--sampler uneven with --global_batch_size {batch} on {world_size} ranks: each makes steps of its own and needs a "
            f"sample for them; give {world_size} or more"
        )
    if config.sampler == "uneven" and samples is not None and 2 * samples < 3 * world_size - 1:  # rank 0's share of sampling.Uneven
        raise UsageError(
            f"--sampler uneven with {samples} training samples on {world_size} ranks: none would be left for rank 0; start "
            "fewer ranks"
        )


def check_master(config: TrainConfig) -> None:
    """Refuses an address of rank 0 by which the ranks that are about to be started cannot meet.

    Raises:
        UsageError: it means every node itself, where there are several; or it is not this machine, where there is one.
    """
    host = config.master_addr
    if not host:
        return
    if config.nnodes == 1:
        if not is_own(host):
            raise UsageError(
                f"--master_addr {host} (or MASTER_ADDR) with one node: it is not this machine; leave it out, or give --nnodes"
            )
    elif on_this_machine(host) or (config.node_rank and host != socket.gethostname() and leads_back(host)):
        outside = next((i.address for i in interfaces() if not i.is_loopback and not i.one_link_only), None)
        raise UsageError(
            f"--master_addr {host} (or MASTER_ADDR) with --nnodes {config.nnodes}: to each node that is the node itself; give the "
            f"name or address by which the others reach node 0{f' (this machine is {outside})' if outside else ''}"
        )


def ranks_to_start(config: TrainConfig, default_per_node: int) -> tuple[int, int]:
    """(ranks on this node, ranks in all) from --world_size, --nproc_per_node and --nnodes.

    Raises:
        UsageError: they contradict each other, or the node's index is not below the number of nodes.
    """
    if config.node_rank >= config.nnodes:
        raise UsageError(
            f"--node_rank {config.node_rank} with --nnodes {config.nnodes}: give 0 to {config.nnodes - 1}, one to each node"
        )
    per_node, total = config.nproc_per_node, config.world_size
    if total is None:
        per_node = per_node or default_per_node
        total = per_node * config.nnodes
    elif per_node is None:
        per_node = total // config.nnodes
    if per_node * config.nnodes != total:
        raise UsageError(
            f"--world_size {total} with --nnodes {config.nnodes}"
            + (f" and --nproc_per_node {config.nproc_per_node}" if config.nproc_per_node else "")
            + ": ranks in all must be nodes × ranks per node; mend one of them"
        )
    if config.nnodes > 1 and not config.master_addr:
        raise UsageError(f"--nnodes {config.nnodes} without --master_addr: name the host of node 0")
    return per_node, total
