"""The command line: what flags, the environment and ``.env`` give, in that order, becomes one configuration."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.checks import check_gradients, check_model, check_writable
from common.config import (
    COMMON,
    DATASET_FLAGS,
    FIELDS,
    FLAG_JOBS,
    GRADIENTS,
    JOBS,
    MACHINE,
    MODEL_FLAGS,
    OUTPUT,
    OUTPUT_FILES,
    PARTS,
    RANKS,
    START_FLAGS,
    UPDATE,
    TrainConfig,
)
from common.debugging import switch_on
from common.errors import UsageError
from common.values import switch

_OF_THE_JOB = ("model", "dataset", "epochs", "learning_rate", "optimizer", "schedule", "warmup", "weight_decay", "clip", "save")
_FLAGS_ONLY = ("world_size", "node_rank", "debug")  # variables of these names are others': launchers', and DEBUG anybody's


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


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; see --help")


def _parser(name: str, description: str, extra: Sequence[str]) -> Parser:
    parser = Parser(
        prog=name,
        usage=f"{name} [flags]",
        description=textwrap.dedent(description).strip(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        epilog="Each flag also works with '-' for '_'. A flag's name in capitals is its environment variable; "
        "the order is\nflag, environment, .env, default.",
        allow_abbrev=False,
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in (COMMON, PARTS, UPDATE, GRADIENTS, MACHINE, OUTPUT)}
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


def without_local_rank(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """``arguments`` without the ``--local_rank`` that torch.distributed.launch hands to each rank, besides LOCAL_RANK.

    Raises:
        UsageError: it is not LOCAL_RANK, or the launcher's ranks are told otherwise.
    """
    out, found, words = [], None, iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--local_rank":
            found = value if equals else next(words, "")
        else:
            out.append(word)
    if found is None:
        return out
    if name != "torchrun.py":
        raise UsageError(
            f"--local_rank {found}: {name} takes none, its ranks know theirs; torch.distributed.launch and torchrun start "
            "launchers/torchrun.py"
        )
    if found != environment.get("LOCAL_RANK", ""):
        raise UsageError(
            f"--local_rank {found} with LOCAL_RANK={environment.get('LOCAL_RANK') or '(not set)'}: the variable decides; type "
            "torchrun --nproc_per_node=N launchers/torchrun.py, which sets it"
        )
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
    arguments = without_local_rank(name, underscored(sys.argv[1:] if argv is None else argv), environment)
    parsed, unknown = _parser(name, description, extra).parse_known_args(arguments)
    if unknown:
        raise UsageError(_unknown(unknown[0], extra))
    given: dict[str, str] = {}  # field → how a person would name what was given
    values: dict[str, Any] = {}
    for field_name, spec in FIELDS.items():
        text, where = getattr(parsed, field_name, None), f"--{field_name}"
        if text is None and field_name not in _FLAGS_ONLY and environment.get(field_name.upper()):
            text, where = environment[field_name.upper()], f"{field_name.upper()} (environment or .env)"
        else:
            given |= {field_name: f"--{field_name} {text}"} if text is not None else {}
        if text is None:
            continue
        try:
            values[field_name] = spec.metadata["convert"](text)
        except ValueError as allowed:
            raise UsageError(f"{where} {text}: not allowed; give {allowed}") from None
    caches = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    values.setdefault("cache_dir", os.path.join(caches, "launchlab"))
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
    for part_name in _OF_THE_JOB:
        values.setdefault(part_name, getattr(job, part_name))
    used = MODEL_FLAGS.get(values["model"], tuple(FLAG_JOBS)) + DATASET_FLAGS.get(values["dataset"], tuple(FLAG_JOBS))
    for flag_name, jobs in FLAG_JOBS.items():
        if flag_name in given and flag_name not in used:
            raise UsageError(
                f"{given[flag_name]}: {values['model']} on {values['dataset']} does not use it; it belongs to --job {jobs}"
            )
    values.setdefault("data_size", job.data_size or JOBS.get(values["dataset"], JOBS["random"]).data_size)
    if values["save"] == "none":
        values["save"] = None
    config = TrainConfig(**values)
    if config.debug:
        switch_on()
    if config.nnodes.least < config.nnodes and not elastic:
        raise UsageError(f"--nnodes {config.nnodes.least}:{config.nnodes}: only elastic.py takes a range; give one number of nodes")
    check_gradients(name, config, given)
    check_model(config)
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
