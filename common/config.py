"""Every flag once: its default, unit, check and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.values import Nodes, any_text, nodes, not_negative, one_of, part, positive, seconds, switch, threads, whole

DIGITS_TRAIN_SIZE = 1437  # 80 % of 1,797; a test holds it against the file


@dataclass(frozen=True)
class Job:
    """What ``--job`` picks; each part can be overridden by its own flag."""

    model: str
    dataset: str
    epochs: int
    global_batch_size: int
    learning_rate: float
    data_size: int | None = None
    optimizer: str = "sgd"
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0
    save: str | None = None


JOBS = {
    "digits": Job("cnn", "digits", epochs=10, global_batch_size=64, learning_rate=0.01),
    "random": Job("linear", "random", epochs=5, global_batch_size=64, learning_rate=0.01, data_size=4096),
    "regression": Job("mlp", "regression", epochs=50, global_batch_size=32, learning_rate=0.02, data_size=1024),
    "mnist": Job("cnn", "mnist", epochs=3, global_batch_size=64, learning_rate=0.01),
    "cifar10": Job("cifar_net", "cifar10", epochs=10, global_batch_size=64, learning_rate=0.01, save="cifar_net.pth"),
    "text": Job("gpt", "text", epochs=1, global_batch_size=16, learning_rate=0.003, data_size=8192, optimizer="adamw",
                schedule="cosine", warmup=50, weight_decay=0.1, clip=1.0),
}  # fmt: skip
SYNCS = ("ddp", "by_hand", "by_hand_flat", "shared_memory", "mpi", "auto")
WITH_DDP = ("ddp", "shared_memory", "mpi")  # those that average within DistributedDataParallel
COMPRESSIONS = ("fp16", "bf16", "int8", "powersgd")
PRECISIONS = ("fp32", "fp64", "bf16", "fp16")
# Which flags a built-in part reads, and the job that shows it.
MODEL_FLAGS: dict[str, tuple[str, ...]] = {
    "cnn": (),
    "linear": ("input_size",),
    "mlp": ("hidden_size",),
    "cifar_net": (),
    "gpt": ("layers", "heads", "width", "context"),
}
DATASET_FLAGS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "random": ("data_size", "input_size"),
    "regression": ("data_size",),
    "mnist": ("data_dir",),
    "cifar10": ("data_dir",),
    "text": ("data_dir", "data_size", "context"),
}
FLAG_JOBS = {
    "input_size": "random",
    "hidden_size": "regression",
    "layers": "text",
    "heads": "text",
    "width": "text",
    "context": "text",
    "data_size": "random, regression or text",
    "data_dir": "mnist, cifar10 or text",
}


def flag(
    group: str, convert: Callable[[str], Any], help_text: str, default: Any = None, metavar: str = "N", short: str = ""
) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(
        default=default,
        metadata={"group": group, "convert": convert, "help": help_text, "metavar": metavar, "short": short},
    )


COMMON, PARTS, UPDATE, GRADIENTS, MACHINE, OUTPUT, RANKS = (
    "what to train (the common flags)",
    "parts of the job",
    "how gradients become new weights",
    "how the ranks' gradients become one",
    "machine",
    "output",
    "starting ranks",
)


@dataclass(frozen=True)
class TrainConfig:
    """All that a run is told. Built by ``parse_config``; ``None`` means "not given" and is resolved there."""

    job: str = flag(COMMON, one_of(*JOBS), "the job: model, data, epochs and learning rate that fit", "digits", "NAME")
    epochs: int = flag(COMMON, whole(1), "passes over the training data (default: the job's)")
    batch_size: int | None = flag(COMMON, whole(1), "samples per rank per forward pass; instead of --global_batch_size")
    global_batch_size: int | None = flag(
        COMMON, whole(1), "samples per optimizer step over all ranks (default: the job's), cut evenly whatever the rank count"
    )
    learning_rate: float = flag(COMMON, positive, "the optimizer's step size (default: the job's)", None, "X", "lr")
    seed: int = flag(COMMON, whole(0, 2**31 - 1), "of the initial weights, the shuffle and generated data", 0)

    model: str = flag(PARTS, part(*MODEL_FLAGS), f"{', '.join(MODEL_FLAGS)}, or your own package.module:Name", None, "NAME")
    dataset: str = flag(PARTS, part(*DATASET_FLAGS), f"{', '.join(DATASET_FLAGS)}, or your own package.module:Name", None, "NAME")
    input_size: int = flag(PARTS, whole(1), "features of a sample (job random)", 20)
    hidden_size: int = flag(PARTS, whole(1), "width of the hidden layers (job regression)", 64)
    layers: int = flag(PARTS, whole(1), "blocks of the GPT (job text)", 4)
    heads: int = flag(PARTS, whole(1), "attention heads of a block (job text); a divisor of --width", 4)
    width: int = flag(PARTS, whole(1), "numbers per byte between the blocks (job text)", 128)
    context: int = flag(PARTS, whole(1), "bytes that a prediction may look back on, and a sample's length (job text)", 128)
    data_size: int = flag(
        PARTS, whole(1), "training samples to generate (jobs random, regression) or to take (text); a quarter more to evaluate"
    )
    data_dir: str | None = flag(
        PARTS, any_text, "read the data from here: the hub's parquet files (mnist, cifar10), a file or folder of text (text)",
        None, "DIR",
    )  # fmt: skip
    cache_dir: str = flag(
        PARTS, any_text, "where decoded data are kept for all ranks and the next run (default: ~/.cache/launchlab)", None, "DIR"
    )
    sampler: str = flag(
        PARTS,
        one_of("exact", "distributed", "uneven"),
        "exact: every sample once, whatever the rank count; distributed: PyTorch's DistributedSampler, which pads; "
        "uneven: the last ranks have up to twice as much data as the first (Join)",
        "exact",
        "NAME",
    )

    optimizer: str = flag(UPDATE, one_of("sgd", "adamw"), "sgd with momentum 0.9, or adamw (default: the job's)", None, "NAME")
    schedule: str = flag(
        UPDATE, one_of("constant", "cosine"), "of the learning rate, after the warm-up (default: the job's)", None, "NAME"
    )
    warmup: int = flag(UPDATE, whole(0), "steps in which the learning rate rises to its full size (default: the job's)")
    weight_decay: float = flag(UPDATE, not_negative, "pull of the weights towards 0 (default: the job's)", None, "X")
    clip: float = flag(
        UPDATE, not_negative, "longest that a step's gradient, over all weights, may be; 0: any (default: the job's)", None, "X"
    )

    sync: str = flag(
        GRADIENTS,
        one_of(*SYNCS),
        "ddp: DistributedDataParallel; by_hand: an all_reduce per parameter; by_hand_flat: one for all; shared_memory: DDP through "
        "a buffer that one machine's ranks share; mpi: DDP through MPI's Allreduce (mpi.py); auto: the fastest that fits",
        "ddp",
        "NAME",
    )
    compress: str | None = flag(
        GRADIENTS, one_of(*COMPRESSIONS), f"send gradients smaller, with --sync ddp: {', '.join(COMPRESSIONS)}", None, "NAME"
    )
    bucket_mb: float = flag(GRADIENTS, positive, "gradients that DDP sends together, in MiB", 25.0, "X")
    find_unused_parameters: bool = flag(GRADIENTS, switch, "for models that do not use every parameter in every step", False)
    accumulate: int = flag(GRADIENTS, whole(1), "parts that a rank's share of a step is cut into, one backward pass each", 1)

    backend: str = flag(MACHINE, one_of("auto", "gloo", "nccl"), "gloo, nccl or auto: nccl for CUDA, else gloo", "auto", "NAME")
    device: str = flag(
        MACHINE,
        one_of("auto", "cpu", "cuda", "mps"),
        "cpu, cuda, mps or auto: CUDA if each local rank has one, Apple's mps, else cpu",
        "auto",
        "NAME",
    )
    threads: int | None = flag(
        MACHINE,
        threads,
        "CPU threads per rank, or as_shipped: what the launcher left (default: this node's usable cores / its ranks)",
    )
    precision: str = flag(
        MACHINE,
        one_of(*PRECISIONS),
        "fp32 or fp64: of weights, data and gradients; bf16, fp16: float32 weights, and autocast to it (fp16 on CPU: very slow)",
        "fp32",
        "NAME",
    )
    channels_last: bool = flag(MACHINE, switch, "keep pictures and convolutions' weights with the channels last in memory", False)
    keep_memory: bool = flag(
        MACHINE,
        switch,
        "reuse freed memory from step to step instead of returning it to the system: fewer page faults (glibc)",
        False,
    )
    compile: bool = flag(MACHINE, switch, "torch.compile the model (needs a C++ compiler on CPU)", False)
    sync_batchnorm: bool = flag(MACHINE, switch, "batch statistics over all ranks (CUDA)", False)
    timeout: float | None = flag(
        MACHINE,
        seconds,
        "seconds to wait for a missing or silent rank (default: 60 on one node, 600 on several or with --compile)",
        None,
        "S",
    )

    inspect: bool = flag(OUTPUT, switch, "train nothing: tell who the ranks are, and check that they reach each other", False)
    log_every: int = flag(OUTPUT, whole(0), "print the local loss every N steps; 0: only per epoch", 0)
    step_times: bool = flag(
        OUTPUT,
        switch,
        "measure where a step's time goes, per rank (--result has the samples); every eighth step of DDP is a probe",
        False,
    )
    log_all_ranks: bool = flag(OUTPUT, switch, "every rank prints, not only each node's first", False)
    debug: bool = flag(
        OUTPUT,
        switch,
        "switch on what PyTorch, NCCL and Python can tell (it says what; no variable does this): their logs, C++ stack traces, "
        "where each rank is on kill -USR1 PID, on a crash and when it is ended",
        False,
    )
    plot: str | None = flag(OUTPUT, any_text, "save the training curves as a picture (.png, .svg or .pdf)", None, "FILE")
    save: str | None = flag(
        OUTPUT, any_text, "save the trained model and this configuration; none: do not (default: job cifar10's)", None, "FILE"
    )
    resume: str | None = flag(PARTS, any_text, "begin with the weights of a saved model, and a fresh optimizer", None, "FILE")
    result: str | None = flag(OUTPUT, any_text, "write what was measured as JSON", None, "FILE")
    events: str | None = flag(
        OUTPUT, any_text, "write when each phase of each rank ended, a file of JSON lines a rank", None, "DIR"
    )

    world_size: int = flag(RANKS, whole(1), "ranks in all, over all nodes")
    nproc_per_node: int = flag(RANKS, whole(1), "ranks on this node (default: the visible GPUs, else 4 for spawn, 1 for plain)")
    nnodes: Nodes = flag(RANKS, nodes, "nodes; elastic takes MIN:MAX too: it goes on with as many as there are", Nodes(1))
    node_rank: int = flag(RANKS, whole(0), "this node's index, 0 to nnodes - 1", 0)
    max_restarts: int = flag(RANKS, whole(0), "how often the ranks are started again after one has failed", 3)
    start_method: str | None = flag(
        RANKS,
        one_of("forkserver", "spawn", "fork"),
        "multiprocessing's: forkserver (ranks are forked from a server that has imported torch; default on Linux), "
        "spawn (a fresh Python each), fork (copies of the parent)",
        None,
        "NAME",
    )
    master_addr: str = flag(RANKS, any_text, "address of node 0 (default: 127.0.0.1 on one node)", None, "HOST")
    master_port: int = flag(RANKS, whole(0, 65535), "port of rank 0 (default: 0, a free one, on one node; 29500 on several)")

    def patience(self, one_node: bool) -> float:
        """Seconds to wait for a rank: ``--timeout``, else short on one node, where ranks start together, unless they compile."""
        return self.timeout or (60.0 if one_node and not self.compile else 600.0)

    def global_batch(self, world_size: int) -> int:
        """Samples per optimizer step over all ranks."""
        if self.batch_size is not None:
            return self.batch_size * self.accumulate * world_size
        assert self.global_batch_size is not None
        return self.global_batch_size


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
RANK_FLAGS = tuple(
    name for name, f in FIELDS.items() if f.metadata["group"] == RANKS and name not in ("start_method", "max_restarts")
)
SPAWN_FLAGS = (*RANK_FLAGS, "start_method")
ELASTIC_FLAGS = ("nproc_per_node", "nnodes", "max_restarts", "start_method", "master_addr", "master_port")
START_FLAGS = {*SPAWN_FLAGS, *ELASTIC_FLAGS}
LAUNCHERS_WITHOUT_MPI = ("plain.py", "spawn.py", "torchrun.py", "elastic.py", "ssh.py", "slurm.py")
MASTER_FLAGS = ("master_addr", "master_port")
OUTPUT_FILES = ("result", "plot", "save")  # checked before anything is started
OUTPUTS = (*OUTPUT_FILES, "events")
