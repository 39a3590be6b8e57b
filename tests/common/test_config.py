"""Flags, variables, .env: what is taken, what wins, and what is refused in one line."""

import contextlib
import dataclasses
import os
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import config as c
from common.checks import check_world, ranks_to_start, train_size
from common.command_line import parse_config
from common.config import ELASTIC_FLAGS, FIELDS, RANK_FLAGS, SPAWN_FLAGS
from common.errors import UsageError
from tests.common.helpers import ROOT, refusal


def parse(*argv, env=None, extra=(*SPAWN_FLAGS, "max_restarts")):
    return parse_config("test.py", "", extra, argv, {} if env is None else env)


# Each flag: values that are taken with what they become, and values that are refused. A test holds that none is missing.
WHOLE = ["0", "-1", "2.5", "many", "", "1e3"]
TAKEN_AND_REFUSED = {
    "job": ([("digits", "digits"), ("regression", "regression")], ["digit", "", "DIGITS"]),
    "epochs": ([("1", 1), ("50", 50)], WHOLE),
    "batch_size": ([("1", 1), ("16", 16)], WHOLE),
    "global_batch_size": ([("1", 1), ("64", 64)], WHOLE),
    "learning_rate": ([("0.1", 0.1), ("1e-3", 1e-3)], ["0", "-0.1", "nan", "inf", "1e999", "fast", ""]),
    "seed": ([("0", 0), ("2147483647", 2**31 - 1)], ["-1", "2147483648", "1.5", "x"]),
    "model": ([("cnn", "cnn"), ("my.module:Net", "my.module:Net")], ["cnnn", "my.module", ":Net", "a-b:Net", "m:", "m:a.b", ""]),
    "dataset": ([("digits", "digits"), ("m:D", "m:D")], ["mnst", "m-1.py:D", "1m:D", "m:1D", "m:D:E", ""]),
    "input_size": ([("7", 7)], WHOLE),
    "hidden_size": ([("7", 7)], WHOLE),
    "data_size": ([("700", 700)], WHOLE),
    **{name: ([("8", 8)], WHOLE) for name in ("layers", "width", "context")},
    "heads": ([("2", 2)], [*WHOLE, "3"]),
    "data_dir": ([("books", "books")], ["", " "]),
    "cache_dir": ([("kept", "kept")], ["", " "]),
    "resume": ([("a.pth", "a.pth")], ["", " "]),
    "optimizer": ([("sgd", "sgd"), ("adamw", "adamw")], ["adam", "SGD", ""]),
    "schedule": ([("constant", "constant"), ("cosine", "cosine")], ["linear", ""]),
    "warmup": ([("0", 0), ("7", 7)], ["-1", "x", "0.5", ""]),
    "weight_decay": ([("0", 0.0), ("0.1", 0.1)], ["-0.1", "nan", "inf", "x", ""]),
    "clip": ([("0", 0.0), ("1.5", 1.5)], ["-1", "nan", "inf", "x", ""]),
    "sampler": ([("exact", "exact"), ("distributed", "distributed"), ("uneven", "uneven")], ["exactly", "", "none"]),
    "accumulate": ([("2", 2)], WHOLE),
    "backend": ([("auto", "auto"), ("gloo", "gloo"), ("nccl", "nccl")], ["glo", "mpi", ""]),
    "device": ([("auto", "auto"), ("cpu", "cpu"), ("cuda", "cuda"), ("mps", "mps")], ["gpu", "cuda:0", ""]),
    "threads": ([("3", 3), ("as_shipped", 0)], [*WHOLE, "shipped"]),
    "sync": ([(n, n) for n in ("ddp", "by_hand", "by_hand_flat", "shared_memory", "auto")], ["nccl", "flat", ""]),
    "compress": ([("fp16", "fp16"), ("int8", "int8"), ("powersgd", "powersgd")], ["fp32", "zip", ""]),
    "bucket_mb": ([("25", 25.0), ("0.1", 0.1)], ["0", "-1", "nan", "x", ""]),
    "find_unused_parameters": ([], []),  # switches: their own tests below, and where they are used
    "channels_last": ([], []),
    "keep_memory": ([], []),
    "compile": ([], []),
    "sync_batchnorm": ([], []),
    "step_times": ([], []),
    "precision": ([(n, n) for n in ("fp32", "fp64", "bf16", "fp16")], ["half", "64", ""]),
    "timeout": ([("0.5", 0.5), ("600", 600.0)], ["0", "-1", "nan", "inf", "1e300", "soon", ""]),
    "log_every": ([("0", 0), ("10", 10)], ["-1", "x", "0.5", ""]),
    "log_all_ranks": ([], []),  # a switch: its own tests below
    "inspect": ([], []),  # and another
    "debug": ([], []),  # and another, which no variable sets
    "plot": ([("a.png", "a.png"), ("b.SVG", "b.SVG"), ("c.pdf", "c.pdf")], ["a.gif", "a", "", " ", "missing/a.png"]),
    "save": ([("a.pt", "a.pt"), ("none", None)], ["", "  ", "missing/a.pt", "."]),
    "result": ([("a.json", "a.json")], ["", "  ", "missing/a.json", ".."]),
    "events": ([("traces", "traces")], ["", "  ", __file__]),
    "world_size": ([("4", 4)], WHOLE),
    "nproc_per_node": ([("4", 4)], WHOLE),
    "nnodes": ([("2", 2)], [*WHOLE, "2:1", "1:", ":2", "1:x", "0:2"]),
    "max_restarts": ([("0", 0), ("5", 5)], ["-1", "x", "0.5", ""]),
    "start_method": ([("spawn", "spawn"), ("forkserver", "forkserver"), ("fork", "fork")], ["forkserv", "thread", ""]),
    "node_rank": ([("0", 0), ("3", 3)], ["-1", "x", "0.5"]),
    "master_addr": ([("node-1.example", "node-1.example")], ["", "   "]),
    "master_port": ([("0", 0), ("65535", 65535)], ["-1", "65536", "http", ""]),
}
NEEDS = {
    "input_size": ["--job", "random"],
    "hidden_size": ["--job", "regression"],
    "data_size": ["--job", "random"],
    **{name: ["--job", "text"] for name in ("layers", "heads", "width", "context", "data_dir")},
}


def test_the_table_holds_every_flag():
    assert set(TAKEN_AND_REFUSED) == set(FIELDS)


@pytest.mark.parametrize(("name", "text", "value"), [(n, t, v) for n, (taken, _) in TAKEN_AND_REFUSED.items() for t, v in taken])
@pytest.mark.parametrize("spelling", ["--{} {}", "--{}={}", "dash", "environment"])
def test_a_good_value_is_taken_however_it_is_given(name, text, value, spelling):
    argv, env = list(NEEDS.get(name, [])), {}
    if spelling == "environment":
        if name in ("world_size", "node_rank"):  # WORLD_SIZE and NODE_RANK describe a rank: the launcher files read them
            env, value = {name.upper(): text}, FIELDS[name].default
        else:
            env = {name.upper(): text}
    elif spelling == "dash":
        argv += ["--" + name.replace("_", "-"), text]
    else:
        argv += spelling.format(name, text).split(" ")
    assert getattr(parse(*argv, env=env), name) == value


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, (_, refused) in TAKEN_AND_REFUSED.items() for t in refused])
def test_a_bad_value_is_refused_with_what_was_given(name, text):
    said = refusal(parse, *NEEDS.get(name, []), f"--{name}", text)
    assert f"--{name} {text}" in said


@pytest.mark.parametrize(
    ("name", "text"), [("epochs", "-3"), ("backend", "mpi"), ("master_port", "x"), ("timeout", "0"), ("log_all_ranks", "maybe")]
)
def test_a_bad_variable_is_refused_by_its_own_name(name, text):
    said = refusal(parse, env={name.upper(): text})
    assert f"{name.upper()} (environment or .env) {text}" in said and "allowed" in said


@given(
    st.sampled_from(sorted(set(FIELDS) - {"plot", "save", "result", "events", "log_all_ranks", "inspect", "debug"})),
    st.text(max_size=12),
)
def test_any_text_is_taken_or_refused_in_one_line(name, text):
    try:
        parse(f"--{name}={text}", *NEEDS.get(name, []))
    except UsageError as error:
        assert len(str(error).splitlines()) == 1 and f"--{name}" in str(error)


def test_allowed_values_and_the_nearest_one_are_told():
    assert "one of auto, gloo, nccl (did you mean nccl?)" in refusal(parse, "--backend", "ncll")
    assert "a whole number, 1 or more" in refusal(parse, "--epochs", "-1")
    assert "a whole number from 0 to 65535" in refusal(parse, "--master_port", "70000")
    assert "package.module:Name" in refusal(parse, "--model", "resnet")


def test_short_name_of_the_learning_rate():
    assert parse("--lr", "0.5").learning_rate == parse("--learning-rate=0.5").learning_rate == 0.5


def test_dashes_in_values_stay():
    got = parse("--save", "my-model_1.pt", "--result=a-b_c.json", "--master-addr=node-1")
    assert (got.save, got.result, got.master_addr) == ("my-model_1.pt", "a-b_c.json", "node-1")


@pytest.mark.parametrize(
    ("env", "argv", "value"),
    [
        ({}, [], False),
        ({}, ["--log_all_ranks"], True),
        ({}, ["--log-all-ranks"], True),
        ({"LOG_ALL_RANKS": "1"}, [], True),
        ({"LOG_ALL_RANKS": "Yes"}, [], True),
        ({"LOG_ALL_RANKS": "0"}, [], False),
        ({"LOG_ALL_RANKS": "off"}, [], False),
        ({"LOG_ALL_RANKS": ""}, [], False),
        ({"LOG_ALL_RANKS": "0"}, ["--log_all_ranks"], True),
    ],
)
def test_the_switch(env, argv, value):
    assert parse(*argv, env=env).log_all_ranks is value


def test_the_switch_takes_no_value():
    assert "log_all_ranks" in refusal(parse, "--log_all_ranks=1")


def test_a_flag_without_its_value_is_refused():
    assert "--epochs" in refusal(parse, "--epochs") and "--epochs" in refusal(parse, "--epochs", "--seed", "1")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--epoch=3", "--epoch=3: no such flag; did you mean --epochs?"),
        ("--bach-size", "did you mean --batch_size?"),
        ("--learning_rat", "did you mean --learning_rate?"),
        ("--xyzzy", "--xyzzy: no such flag; see --help"),
        ("digits", "digits: no such flag"),
        ("-e", "-e: no such flag"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(word, said):
    assert said in refusal(parse, word)


@pytest.mark.parametrize("name", RANK_FLAGS)
def test_a_launcher_that_is_told_its_ranks_refuses_flags_about_them(name):
    said = refusal(parse, f"--{name}=1", extra=())
    assert said.startswith(f"--{name}") and "is not this launcher's to take" in said


def test_a_range_of_nodes_is_for_elastic():
    taken = parse("--nnodes", "1:3", extra=ELASTIC_FLAGS).nnodes
    assert (taken, taken.least) == (3, 1) and pickle.loads(pickle.dumps(taken)).least == 1
    assert parse("--nnodes", "2", extra=ELASTIC_FLAGS).nnodes.least == 2
    assert "only elastic.py takes a range" in refusal(parse, "--nnodes", "1:3", extra=SPAWN_FLAGS)


def test_abbreviations_are_not_guessed():
    assert "--epo" in refusal(parse, "--epo", "3")


# -------------------------------------------------------------------------------------------- which source wins


def write_env(text):
    with open(".env", "w", encoding="utf-8") as file:
        file.write(text)


def from_all(*argv):
    return parse_config("test.py", "", RANK_FLAGS, argv)


def test_flag_over_environment_over_dotenv_over_default(monkeypatch):
    assert from_all().seed == 0
    write_env("SEED=1\n")
    assert from_all().seed == 1
    monkeypatch.setenv("SEED", "2")
    assert from_all().seed == 2
    assert from_all("--seed", "3").seed == 3


def test_an_empty_variable_counts_as_none(monkeypatch):
    monkeypatch.setenv("EPOCHS", "")
    assert from_all().epochs == c.JOBS["digits"].epochs


def test_dotenv_comments_quotes_and_export():
    write_env("# a comment\n\nexport SEED=4   # four\nMASTER_ADDR='node-0'\nBACKEND=\"gloo\"\nTHREADS=\n")
    got = from_all()
    assert (got.seed, got.master_addr, got.backend, got.threads) == (4, "node-0", "gloo", None)


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("SEED=1\nthis is not a setting\n", 2, "this is not a setting"),
        ("SEED\n", 1, "SEED"),
        ("\n\nA='never closed\n", 3, "A="),
        ("SEED=1\n=5\n", 2, "=5"),
    ],
)
def test_a_malformed_dotenv_names_file_and_line(tmp_path, text, line, shown):
    write_env(text)
    said = refusal(from_all)
    assert f"{tmp_path / '.env'}, line {line}:" in said and shown in said


def test_a_dotenv_that_is_no_text_is_refused(tmp_path):
    (tmp_path / ".env").write_bytes(b"SEED=\xff\xfe\n")
    said = refusal(from_all)
    assert str(tmp_path / ".env") in said and "cannot be read" in said


def test_a_bad_value_in_dotenv_is_refused():
    write_env("EPOCHS=none\n")
    assert "EPOCHS (environment or .env) none" in refusal(from_all)


def test_the_example_dotenv_names_only_real_flags_and_is_taken(monkeypatch, tmp_path):
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    names = re.findall(r"^#?([A-Z][A-Z_]*)=", text, flags=re.MULTILINE)
    assert len(names) >= 5 and {name.lower() for name in names} <= set(FIELDS)
    write_env(re.sub(r"^#([A-Z_]+=)", r"\1", text, flags=re.MULTILINE))  # with all that is commented out
    got = from_all()
    assert (got.master_addr, got.master_port, got.backend, got.job) == ("127.0.0.1", 0, "auto", "digits")


# ------------------------------------------------------------------------------------ jobs, and what they do not use


@pytest.mark.parametrize("name", c.JOBS)
def test_a_job_brings_its_parts(name):
    job, got = c.JOBS[name], parse("--job", name)
    assert (got.model, got.dataset, got.epochs) == (job.model, job.dataset, job.epochs)
    assert (got.global_batch_size, got.batch_size, got.learning_rate) == (job.global_batch_size, None, job.learning_rate)
    assert job.data_size in (None, got.data_size)


def test_each_part_of_a_job_can_be_overridden():
    argv = "--job random --model m:Net --dataset m:Data --epochs 2 --lr 0.5 --global_batch_size 9 --data_size 50 --input_size 3"
    got = parse(*argv.split())
    assert (got.model, got.dataset, got.epochs, got.learning_rate) == ("m:Net", "m:Data", 2, 0.5)
    assert (got.global_batch_size, got.data_size, got.input_size) == (9, 50, 3)


def test_another_data_set_brings_its_own_size():
    assert parse("--job", "digits", "--dataset", "regression").data_size == c.JOBS["regression"].data_size


@pytest.mark.parametrize(
    ("argv", "given_text", "job"),
    [
        ("--input_size 100", "--input_size 100", "--job random"),
        ("--job regression --input-size 100", "--input_size 100", "--job random"),
        ("--hidden_size 8", "--hidden_size 8", "--job regression"),
        ("--job random --hidden_size 8", "--hidden_size 8", "--job regression"),
        ("--data_size 500", "--data_size 500", "--job random, regression or text"),
        ("--job mnist --layers 3", "--layers 3", "--job text"),
        ("--data_dir books", "--data_dir books", "--job mnist, cifar10 or text"),
    ],
)
def test_a_flag_that_the_job_does_not_use_is_refused_and_names_the_job(argv, given_text, job):
    said = refusal(parse, *argv.split())
    assert given_text in said and job in said and "does not use it" in said


@pytest.mark.parametrize("argv", ["--model m:N --hidden_size 8", "--dataset m:D --data_size 9 --input_size 3"])
def test_a_class_of_ones_own_may_use_any_of_them(argv):
    assert parse(*argv.split()).job == "digits"


def test_a_variable_that_the_job_does_not_use_does_no_harm():
    assert parse(env={"INPUT_SIZE": "100"}).model == "cnn"


def test_both_batch_sizes_are_refused():
    said = refusal(parse, "--batch_size", "8", "--global_batch_size", "64")
    assert "batch_size 8" in said and "global_batch_size 64" in said
    assert "batch_size 8" in refusal(parse, env={"BATCH_SIZE": "8", "GLOBAL_BATCH_SIZE": "64"})


def test_one_batch_size_as_a_flag_outranks_the_other_as_a_variable():
    got = parse("--batch_size", "8", env={"GLOBAL_BATCH_SIZE": "64"})
    assert (got.batch_size, got.global_batch_size) == (8, None)
    got = parse("--global_batch_size", "64", env={"BATCH_SIZE": "8"})
    assert (got.batch_size, got.global_batch_size) == (None, 64)


@pytest.mark.parametrize(
    ("argv", "world", "batch"),
    [("", 3, 64), ("--global_batch_size 10", 4, 10), ("--batch_size 8", 3, 24), ("--batch_size 8 --accumulate 2", 3, 48)],
)
def test_samples_a_step(argv, world, batch):
    assert parse(*argv.split()).global_batch(world) == batch


# -------------------------------------------------------------------------------------------------- ranks and worlds


@pytest.mark.parametrize(
    ("argv", "default", "expected"),
    [
        ("", 4, (4, 4)),
        ("", 1, (1, 1)),
        ("--world_size 3", 4, (3, 3)),
        ("--nproc_per_node 3", 4, (3, 3)),
        ("--world_size 3 --nproc_per_node 3", 4, (3, 3)),
        ("--nnodes 2 --master_addr a", 4, (4, 8)),
        ("--nnodes 2 --nproc_per_node 3 --master_addr a", 4, (3, 6)),
        ("--nnodes 2 --world_size 6 --node_rank 1 --master_addr a", 4, (3, 6)),
        ("--nnodes 2 --world_size 6 --nproc_per_node 3 --master_addr a", 4, (3, 6)),
    ],
)
def test_ranks_here_and_in_all(argv, default, expected):
    assert ranks_to_start(parse(*argv.split()), default) == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--world_size 4 --nproc_per_node 3", "--world_size 4 with --nnodes 1 and --nproc_per_node 3"),
        ("--world_size 5 --nnodes 2 --master_addr a", "--world_size 5 with --nnodes 2"),
        ("--world_size 1 --nnodes 2 --master_addr a", "--world_size 1 with --nnodes 2"),
        ("--world_size 4 --nnodes 2 --nproc_per_node 4 --master_addr a", "--nproc_per_node 4"),
        ("--node_rank 1", "--node_rank 1 with --nnodes 1: give 0 to 0"),
        ("--nnodes 3 --node_rank 3 --master_addr a", "--node_rank 3 with --nnodes 3: give 0 to 2"),
        ("--nnodes 2", "--nnodes 2 without --master_addr"),
    ],
)
def test_ranks_that_contradict_each_other_are_refused(argv, said):
    assert said in refusal(ranks_to_start, parse(*argv.split()), 4)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12))
def test_either_way_of_counting_gives_the_same_world(per_node, nnodes, default):
    nodes = ["--nnodes", str(nnodes), "--master_addr", "a"]
    by_node = ranks_to_start(parse(*nodes, "--nproc_per_node", str(per_node)), default)
    in_all = ranks_to_start(parse(*nodes, "--world_size", str(per_node * nnodes)), default)
    assert by_node == in_all == (per_node, per_node * nnodes)


@pytest.mark.parametrize(
    ("argv", "world", "samples", "said"),
    [
        ("--global_batch_size 1438", 1, None, "--global_batch_size 1438: larger than the data (1437 training samples)"),
        ("--batch_size 719", 2, None, "--batch_size 719 on 2 ranks, 1438 samples a step"),
        ("--batch_size 400 --accumulate 2", 2, None, "1600 samples a step"),
        ("--job random --data_size 10 --global_batch_size 11", 1, None, "(10 training samples)"),
        ("--dataset m:D --global_batch_size 11", 1, 10, "(10 training samples)"),
        ("--sampler distributed --global_batch_size 64", 3, None, "--global_batch_size 64: 3 parts do not divide it"),
        ("--sampler distributed --global_batch_size 64 --accumulate 3", 2, None, "6 parts do not divide it"),
    ],
)
def test_what_cannot_be_trained_on_so_many_ranks_is_refused(argv, world, samples, said):
    assert said in refusal(check_world, parse(*argv.split()), world, samples)


@pytest.mark.parametrize(
    ("argv", "world", "samples"),
    [
        ("--global_batch_size 1437", 1, None),
        ("--global_batch_size 3", 5, None),
        ("--dataset m:D --global_batch_size 9999", 1, None),  # known only once it is made
        ("--dataset m:D --global_batch_size 10", 1, 10),
        ("--sampler distributed --global_batch_size 66", 3, None),
        ("--sampler distributed --batch_size 7 --accumulate 2", 3, None),
    ],
)
def test_what_can_be_trained_is_not_refused(argv, world, samples):
    assert check_world(parse(*argv.split()), world, samples) is None


def test_the_size_of_the_digits_is_the_real_one():
    from common.datasets import digits

    assert train_size(parse()) == c.DIGITS_TRAIN_SIZE == len(digits()[0])


@pytest.mark.parametrize(("argv", "one_node", "seconds"), [("", True, 60.0), ("", False, 600.0), ("--timeout 5", False, 5.0)])
def test_the_default_time_limit_depends_on_the_nodes(argv, one_node, seconds):
    assert parse(*argv.split()).patience(one_node) == seconds


# ------------------------------------------------------------------------------------------------------ output files


@pytest.mark.parametrize(("name", "suffix"), [("result", ".json"), ("save", ".pt"), ("plot", ".png")])
def test_output_paths(tmp_path, name, suffix):
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert "is a folder" in refusal(parse, f"--{name}", str(folder))
    assert f"there is no folder {tmp_path / 'no'}" in refusal(parse, f"--{name}", str(tmp_path / "no" / f"a{suffix}"))
    good = folder / f"a{suffix}"
    assert getattr(parse(f"--{name}", str(good)), name) == str(good)
    assert list(folder.iterdir()) == []  # looking leaves nothing
    good.write_text("old")
    parse(f"--{name}", str(good))
    assert good.read_text() == "old"


@pytest.mark.parametrize("file", [("--save", "a.pt"), ("--plot", "a.png")])
def test_an_inspection_has_nothing_to_save_or_to_plot(file):
    said = refusal(parse, "--inspect", *file)
    assert said.startswith(" ".join(file)) and "nothing is trained" in said
    assert parse("--inspect", "--result", "a.json", env={file[0][2:].upper(): file[1]}).inspect  # a default does no harm


def test_a_name_that_is_too_long_is_refused():
    assert "cannot be" in refusal(parse, "--result", "x" * 300 + ".json")


@contextlib.contextmanager
def nobody():
    """Without root's rights (root may write anywhere)."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_may_not_be_written_is_refused(tmp_path, mode):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(mode)
    try:
        with nobody():
            said = refusal(parse, "--result", str(folder / "a.json"))
    finally:
        folder.chmod(0o755)
    assert "--result" in said and "a.json" in said


# -------------------------------------------------------------------------------------------------------------- help


def help_text(capsys, extra):
    with pytest.raises(SystemExit) as left:
        parse_config("test.py", "What it does.\n\npython test.py", extra, ["--help"], {})
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("extra", [(), c.MASTER_FLAGS, RANK_FLAGS, SPAWN_FLAGS, ELASTIC_FLAGS])
def test_help_is_grouped_with_the_common_flags_first_and_lists_every_flag(capsys, extra):
    text = help_text(capsys, extra)
    groups = [c.COMMON, c.PARTS, c.UPDATE, c.GRADIENTS, c.MACHINE, c.OUTPUT] + ([c.RANKS] if extra else [])
    places = [text.index(f"\n{title}:") for title in groups]
    assert places == sorted(places) and "What it does." in text
    for name, field in FIELDS.items():
        expected = field.metadata["group"] != c.RANKS or name in extra
        listed = [m.start() for m in re.finditer(rf"^  --{name}\b", text, flags=re.MULTILINE)]
        assert len(listed) == expected, name
        if expected:
            place = groups.index(field.metadata["group"])
            assert places[place] < listed[0] < [*places, len(text)][place + 1]
    assert "--lr" in text and max(map(len, text.splitlines())) <= 132


def test_every_flag_says_what_it_is_and_its_default(capsys):
    text = " ".join(help_text(capsys, (*SPAWN_FLAGS, "max_restarts")).split())
    for name, field in FIELDS.items():
        assert field.metadata["help"].split("(")[0].strip()[:40] in text, name
        if field.default not in (None, False):
            assert f"(default: {field.default})" in text, name


def test_a_configuration_is_frozen_and_plain():
    got = parse()
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.seed = 5
    assert all(isinstance(v, (int, float, str, bool, type(None))) for v in dataclasses.asdict(got).values())


def test_powersgd_is_not_for_scaled_gradients():
    """They overflow now and then, by design, and its error feedback keeps that."""
    assert "--precision bf16" in refusal(parse, "--compress", "powersgd", "--precision", "fp16")
    assert parse("--compress", "int8", "--precision", "fp16").compress == "int8"
