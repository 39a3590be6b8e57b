"""Every flag once: its default, unit, check and help; read from flags, the environment, ``.env``, in that order."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UsageError
from common.values import Nodes, any_text, nodes, one_of, part, positive, seconds, switch, threads, whole

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


JOBS = {
    "digits": Job("cnn", "digits", epochs=10, global_batch_size=64, learning_rate=0.01),
    "random": Job("linear", "random", epochs=5, global_batch_size=64, learning_rate=0.01, data_size=4096),
    "regression": Job("mlp", "regression", epochs=50, global_batch_size=32, learning_rate=0.02, data_size=1024),
}
SYNCS = ("ddp", "by_hand", "by_hand_flat", "shared_memory", "mpi", "auto")
WITH_DDP = ("ddp", "shared_memory", "mpi")  # those that average within DistributedDataParallel
COMPRESSIONS = ("fp16", "bf16", "int8", "powersgd")
PRECISIONS = ("fp32", "fp64", "bf16", "fp16")
# Which flags a built-in part reads, and the job that shows it.
MODEL_FLAGS: dict[str, tuple[str, ...]] = {"cnn": (), "linear": ("input_size",), "mlp": ("hidden_size",)}
DATASET_FLAGS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "random": ("data_size", "input_size"),
    "regression": ("data_size",),
}
FLAG_JOBS = {
    "input_size": "random",
    "hidden_size": "regression",
    "data_size": "random or regression",
}


def flag(
    group: str, convert: Callable[[str], Any], help_text: str, default: Any = None, metavar: str = "N", short: str = ""
) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(
        default=default,
        metadata={"group": group, "convert": convert, "help": help_text, "metavar": metavar, "short": short},
    )


COMMON, PARTS, GRADIENTS, MACHINE, OUTPUT, RANKS = (
    "what to train (the common flags)",
    "parts of the job",
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
    learning_rate: float = flag(COMMON, positive, "step size of SGD with momentum 0.9 (default: the job's)", None, "X", "lr")
    seed: int = flag(COMMON, whole(0, 2**31 - 1), "of the initial weights, the shuffle and generated data", 0)

    model: str = flag(PARTS, part(*MODEL_FLAGS), f"{', '.join(MODEL_FLAGS)}, or your own package.module:Name", None, "NAME")
    dataset: str = flag(PARTS, part(*DATASET_FLAGS), f"{', '.join(DATASET_FLAGS)}, or your own package.module:Name", None, "NAME")
    input_size: int = flag(PARTS, whole(1), "features of a sample (job random)", 20)
    hidden_size: int = flag(PARTS, whole(1), "width of the hidden layers (job regression)", 64)
    data_size: int = flag(PARTS, whole(1), "training samples to generate (jobs random, regression); a quarter more to evaluate")
    sampler: str = flag(
        PARTS,
        one_of("exact", "distributed", "uneven"),
        "exact: every sample once, whatever the rank count; distributed: PyTorch's DistributedSampler, which pads; "
        "uneven: the last ranks have up to twice as much data as the first (Join)",
        "exact",
        "NAME",
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
    plot: str | None = flag(OUTPUT, any_text, "save the training curves as a picture (.png, .svg or .pdf)", None, "FILE")
    save: str | None = flag(OUTPUT, any_text, "save the trained model and this configuration", None, "FILE")
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
LAUNCHERS_WITHOUT_MPI = ("plain.py", "spawn.py", "torchrun.py", "elastic.py")
MASTER_FLAGS = ("master_addr", "master_port")
OUTPUT_FILES = ("result", "plot", "save")  # checked before anything is started
OUTPUTS = (*OUTPUT_FILES, "events")


def settings() -> dict[str, str]:
    """The environment, over what ``.env`` in the current folder says.

    Raises:
        UsageError: ``.env`` has a line that is no ``NAME=value``.
    """
    merged: dict[str, str] = {}
    path = Path(".env")
    if path.is_file():
        from dotenv import dotenv_values
        from dotenv.parser import parse_stream

        try:
            with path.open(encoding="utf-8") as stream:
                bad = next((b for b in parse_stream(stream) if b.error or (b.key and b.value is None)), None)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path.resolve()}: cannot be read ({error}); mend it or take it away") from None
        if bad:
            text = bad.original.string
            line = bad.original.line + text[: len(text) - len(text.lstrip())].count(
                "\n"
            )  # it begins with the empty lines before it
            raise UsageError(f"{path.resolve()}, line {line}: {text.strip()!r} is no NAME=value; mend that line")
        merged |= {name: value for name, value in dotenv_values(path).items() if value is not None}
    return merged | dict(os.environ)


class _Parser(argparse.ArgumentParser):
    """argparse that refuses in one line instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def _parser(name: str, description: str, extra: Sequence[str]) -> _Parser:
    parser = _Parser(
        prog=name,
        usage=f"{name} [flags]",
        description=textwrap.dedent(description).strip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        epilog="Each flag also works with '-' for '_'. A flag's name in capitals is its environment variable; "
        "the order is\nflag, environment, .env, default.",
        allow_abbrev=False,
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in (COMMON, PARTS, GRADIENTS, MACHINE, OUTPUT)}
    if extra:
        groups[RANKS] = parser.add_argument_group(RANKS)
    for field_name, spec in FIELDS.items():
        meta = spec.metadata
        if meta["group"] == RANKS and field_name not in extra:
            continue
        names = [f"--{field_name}"] + ([f"--{meta['short']}"] if meta["short"] else [])
        default = "" if spec.default in (None, False) else f" (default: {spec.default})"
        if meta["convert"] is switch:
            groups[meta["group"]].add_argument(*names, action="store_const", const="1", help=meta["help"])
        else:
            help_text = meta["help"] + (default if "default:" not in meta["help"] else "")
            groups[meta["group"]].add_argument(*names, metavar=meta["metavar"], help=help_text.replace("%", "%%"))
    parser.add_argument_group("help").add_argument("-h", "--help", action="help", help="this text")
    return parser


def underscored(argv: Sequence[str]) -> list[str]:
    """``--batch-size 8`` and ``--batch-size=8`` become ``--batch_size …``; values stay as they are."""
    out = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        out.append(word)
    return out


def parse_config(
    name: str,
    description: str = "",
    extra: Sequence[str] = (),
    argv: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> TrainConfig:
    """Reads a launcher's command line.

    Args:
        name: the launcher, for help and messages.
        description: its docstring, shown by ``--help``.
        extra: the flags beyond the training ones that this launcher takes (of ``RANK_FLAGS``).
        argv: the command line; by default the process's own.
        environment: variables; by default the environment over ``.env``.

    Raises:
        UsageError: a value that is not allowed, an unknown flag, or flags that contradict each other.
    """
    environment = settings() if environment is None else environment
    arguments = underscored(sys.argv[1:] if argv is None else argv)
    parsed, unknown = _parser(name, description, extra).parse_known_args(arguments)
    if unknown:
        raise UsageError(_unknown(unknown[0], extra))
    given: dict[str, str] = {}  # field → how a person would name what was given
    values: dict[str, Any] = {}
    for field_name, spec in FIELDS.items():
        text, where = getattr(parsed, field_name, None), f"--{field_name}"
        if text is None and field_name not in ("world_size", "node_rank") and environment.get(field_name.upper()):
            text, where = environment[field_name.upper()], f"{field_name.upper()} (environment or .env)"
        else:
            given |= {field_name: f"--{field_name} {text}"} if text is not None else {}
        if text is None:
            continue
        try:
            values[field_name] = spec.metadata["convert"](text)
        except ValueError as allowed:
            raise UsageError(f"{where} {text}: not allowed; give {allowed}") from None
    return _resolve(name, values, given, elastic="max_restarts" in extra)


def _unknown(word: str, extra: Sequence[str]) -> str:
    flags = [f"--{n}" for n, f in FIELDS.items() if f.metadata["group"] != RANKS or n in extra] + ["--lr"]
    name = word.partition("=")[0]
    if name.removeprefix("--") in START_FLAGS:
        return f"{name} is not this launcher's to take (it belongs to another, or to the program that starts this one); see --help"
    import difflib

    near = difflib.get_close_matches(name, flags, n=1)
    return f"{word}: no such flag; " + (f"did you mean {near[0]}?" if near else "see --help")


def _resolve(name: str, values: dict[str, Any], given: Mapping[str, str], elastic: bool) -> TrainConfig:
    """Fills in what was not given, and refuses what does not go together."""
    job = JOBS[values.get("job", "digits")]
    if "batch_size" in values and "global_batch_size" in values:
        # A flag outranks a variable; two of the same kind contradict each other.
        if ("batch_size" in given) == ("global_batch_size" in given):
            raise UsageError(
                f"batch_size {values['batch_size']} together with global_batch_size {values['global_batch_size']}: "
                "the first is per rank, the second over all; give one of them"
            )
        del values["global_batch_size" if "batch_size" in given else "batch_size"]
    elif "batch_size" not in values:
        values.setdefault("global_batch_size", job.global_batch_size)
    for part_name in ("model", "dataset", "epochs", "learning_rate"):
        values.setdefault(part_name, getattr(job, part_name))
    used = MODEL_FLAGS.get(values["model"], tuple(FLAG_JOBS)) + DATASET_FLAGS.get(values["dataset"], tuple(FLAG_JOBS))
    for flag_name, jobs in FLAG_JOBS.items():
        if flag_name in given and flag_name not in used:
            raise UsageError(
                f"{given[flag_name]}: {values['model']} on {values['dataset']} does not use it; it belongs to --job {jobs}"
            )
    values.setdefault("data_size", job.data_size or JOBS.get(values["dataset"], JOBS["random"]).data_size)
    config = TrainConfig(**values)
    if config.nnodes.least < config.nnodes and not elastic:
        raise UsageError(f"--nnodes {config.nnodes.least}:{config.nnodes}: only elastic.py takes a range; give one number of nodes")
    _check_gradients(name, config, given)
    for output in OUTPUT_FILES:
        if config.inspect and output != "result" and output in given:
            raise UsageError(
                f"{given[output]} with --inspect: nothing is trained, so there is nothing to write; leave one of them out"
            )
        if path := getattr(config, output):
            check_writable(f"--{output} {path}", Path(path))
    if config.events and Path(config.events).exists() and not Path(config.events).is_dir():
        raise UsageError(f"--events {config.events}: is a file; name a folder")
    if config.plot and Path(config.plot).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {config.plot}: not a picture; name it .png, .svg or .pdf")
    return config


def _check_gradients(name: str, config: TrainConfig, given: Mapping[str, str]) -> None:
    """Refuses ways of averaging that do not go together."""
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


def check_writable(what: str, path: Path) -> None:
    """Raises UsageError unless a file can be made beside ``path`` (which a write replaces as a whole)."""
    folder = path.absolute().parent
    probe = folder / f".{path.name}.{os.getpid()}.part"
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
