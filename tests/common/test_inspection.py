"""inspection.py, collectives.py and the console's table: what needs no ranks."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from common import console
from common.collectives import Check, Collective, check_collectives, collectives
from common.command_line import parse_config
from common.errors import RunError
from common.inspection import (
    HIDDEN,
    by_rank,
    changed,
    compact,
    inspect,
    parse_environment,
    screen,
    set_by_launcher,
    shortened,
    variables,
    without_secrets,
)
from common.ports import PortReservation
from common.process_group import announce, process_group
from common.rank import Rank
from tests.common.helpers import end_group, start, until

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------- environments


def test_an_environment_is_read_as_the_kernel_writes_it():
    block = b"A=1\0EMPTY=\0URL=x=y\0A=second\0no variable\0LINES=a\nb\0BYTE=\xff\0"
    assert parse_environment(block) == {"A": "1", "EMPTY": "", "URL": "x=y", "LINES": "a\nb", "BYTE": "\udcff"}
    assert parse_environment(b"") == {}


def test_new_and_changed_variables_are_found_by_name():
    before = {"SAME": "1", "OTHER": "1", "GONE": "1", "EMPTY": ""}
    now = {"SAME": "1", "OTHER": "2", "NEW": "", "EMPTY": ""}
    assert changed(before, now) == {"NEW": "", "OTHER": "2"}
    assert list(changed({}, {"B": "", "A": ""})) == ["A", "B"]


def test_the_language_that_python_sets_for_itself_is_not_the_launchers():
    assert changed({}, {"LC_CTYPE": "C.UTF-8"}) == {}
    assert changed({"LC_CTYPE": "C"}, {"LC_CTYPE": "C.UTF-8"}) == {"LC_CTYPE": "C.UTF-8"}
    assert changed({}, {"LC_CTYPE": "de_DE.UTF-8"}) == {"LC_CTYPE": "de_DE.UTF-8"}


def test_the_values_of_secrets_are_hidden():
    names = ["HF_TOKEN", "AWS_SECRET_ACCESS", "api_key", "MyPassword", "PGPASSWORD", "GOOGLE_CREDENTIALS"]
    hidden = without_secrets({name: "s3cret" for name in names} | {"RANK": "0"})
    assert hidden == {name: HIDDEN for name in names} | {"RANK": "0"}


@pytest.mark.only_on("linux")
def test_variables_are_measured_against_the_commands_own_environment():
    child = start([sys.executable, "-c", "import time; time.sleep(60)"], env={"MINE": "1", "CHANGED": "1"})
    try:
        assert until(lambda: b"MINE=1" in Path(f"/proc/{child.pid}/environ").read_bytes())  # not this process's own any more
        found, why = set_by_launcher((1, child.pid), {"MINE": "1", "CHANGED": "2", "NEW_TOKEN": "3"})
    finally:
        end_group(child)
    assert (found, why) == ({"CHANGED": "2", "NEW_TOKEN": HIDDEN}, None)


@pytest.mark.only_on("linux")
def test_an_environment_that_cannot_be_read_is_unknown():
    found, why = set_by_launcher((2**22 + 1,), {"A": "1"})  # beyond the largest process id
    assert found is None and why == f"/proc/{2**22 + 1}/environ: No such file or directory"
    assert set_by_launcher((), {"A": "1"}) == ({}, None)


# --------------------------------------------------------------------------------------------------- on the screen


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1), "0-1"), ((4, 1, 0), "0-1,4"), ((0, 2, 4, 5, 6, 9), "0,2,4-6,9")]
)
def test_cores_are_written_as_ranges(numbers, text):
    assert compact(numbers) == text


@given(st.sets(st.integers(0, 300)))
def test_ranges_name_exactly_the_cores(cores):
    pieces = [piece.split("-") for piece in compact(cores).split(",") if piece]
    assert {n for piece in pieces for n in range(int(piece[0]), int(piece[-1]) + 1)} == cores


@given(st.text(max_size=300), st.integers(10, 90))
def test_a_value_is_one_printable_line_of_the_width(value, width):
    text = shortened(value, width)
    assert len(text) <= width and text.isprintable()
    if value.isprintable():
        assert text == value if len(value) <= width else (value.startswith(text[:4]) and value.endswith(text[-4:]))


def ranks(*values):
    return by_rank(dict(enumerate(values)))


def test_a_variable_on_all_ranks():
    assert ranks("x", "x", "x") == "x" and ranks("0") == "0" and ranks("") == ""
    assert ranks("0", "1", "2") == "0…2, each rank its own"
    assert ranks("0", "1", "0", "1") == "ranks 0,2: 0\nranks 1,3: 1"
    assert ranks("a", None, "a") == "ranks 0,2: a\nrank 1: not set"
    many = ranks(*(f"pid {n}" for n in range(20))).splitlines()
    assert len(many) == 9 and many[-1] == "and 12 more (all of them with --result)"


def facts(rank, **others):
    return {
        "rank": rank,
        "local_rank": rank % 2,
        "world_size": 4,
        "node_rank": rank // 2,
        "host": f"node-{rank // 2}",
        "pid": 70000 + rank,
        "master": "node-0:29500",
        "device": f"cuda:{rank % 2}",
        "cores": [0, 1, 4],
        "threads_found": 8,
        "omp_num_threads": None,
        "threads_in_training": 4,
        "launched": True,
        "variables": {},
        "variables_unknown": None,
    } | others


def test_the_ranks_on_the_screen():
    rows = screen([facts(rank) for rank in range(4)]).splitlines()
    assert rows[:4] == [f"node-{r // 2}$Process {r}: {r % 2} # 4" for r in range(4)]
    assert rows[4:8] == [f"[Rank {r}] Default device is set to cuda:{r % 2}" for r in range(4)]
    cells = [row.split() for row in rows if "node-0:29500" in row]
    assert cells[3] == ["3", "1", "4", "1", "node-1", "70003", "node-0:29500", "cuda:1", "0-1,4", "8", "–", "4"]


def test_the_launchers_variables_on_the_screen():
    none = "Variables that the launcher set: none, "
    assert variables([facts(0)]) == none + "the ranks have the command's environment unchanged"
    assert variables([facts(0, launched=False)]) == none + "no launcher started this"
    unknown = [facts(rank, variables=None, variables_unknown="no /proc") for rank in (0, 1)]
    assert variables(unknown) == "Variables that the launcher set: unknown on ranks 0-1 (no /proc)"
    mixed = variables([unknown[0], *(facts(r, variables={"A": str(r % 2)}) for r in (1, 2, 3))]).splitlines()
    assert mixed[0].endswith("unknown on rank 0 (no /proc)") and mixed[2:] == ["  A  ranks 1,3: 1", "     rank 2: 0"]
    rows = variables([facts(r, variables={"RANK": str(r), "MARKUP": "[bold]:smile:"}) for r in (0, 1)]).splitlines()
    assert rows[1:] == ["  MARKUP  [bold]:smile:", "  RANK    0…1, each rank its own"]


def test_a_table_is_as_wide_as_it_needs_except_in_a_terminal(monkeypatch):
    headers, rows = ("rank", "a\nlong", "other"), [("0", "x" * 50, "y" * 60), ("1", "z", "w")]
    wide = console.table(headers, rows).splitlines()
    assert wide[2] == f"0     {'x' * 50}  {'y' * 60}" and len(wide) == 4
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = console.table(headers, rows).splitlines()
    assert f"0     {'x' * 50}" in narrow and f"0     {'y' * 60}" in narrow  # a block of columns each, beside the rank
    monkeypatch.setenv("COLUMNS", "40")
    assert "".join(console.table((), [("n", "v" * 90)]).split()) == "n" + "v" * 90


# ---------------------------------------------------------------------------------------------------- collectives

KINDS = {"all_reduce", "all_gather", "broadcast", "reduce", "scatter", "barrier"}


def carried_out(collective, ranks):
    """What each rank must get by the collective's definition; ``ranks`` says who is where (in order: 0, 1, …)."""
    world = len(ranks)
    given = [collective.gives(rank, world) for rank in ranks]
    if collective.kind in ("all_reduce", "reduce"):
        return [[sum(column) for column in zip(*given, strict=True)]] * world
    if collective.kind == "all_gather":
        return [[number for numbers in given for number in numbers]] * world
    if collective.kind == "broadcast":
        return [given[collective.root]] * world
    return [[rank + 1] for rank in ranks]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_each_rank_must_get(world):
    assert {c.kind for c in collectives(world)} == KINDS
    assert {c.root for c in collectives(world) if c.root is not None} == {0, world - 1}
    for collective in collectives(world):
        must = [collective.expected(rank, world) for rank in range(world)]
        assert sum(m is not None for m in must) == (1 if collective.kind == "reduce" else world)
        if collective.kind != "barrier":
            for got, wanted in zip(carried_out(collective, range(world)), must, strict=True):
                assert wanted in (None, got)


def told(collective, got):
    return [
        {
            "kind": collective.kind,
            "root": collective.root,
            "got": g,
            "expected": collective.expected(r, len(got)),
            "seconds": 0.001 * r,
        }
        for r, g in enumerate(got)
    ]


@pytest.mark.parametrize("collective", [c for c in collectives(4) if c.kind != "barrier"], ids=str)
def test_a_lost_a_doubled_and_a_swapped_rank_are_caught(collective):
    assert not Check.of_all(told(collective, carried_out(collective, range(4)))).wrong
    if "reduce" in collective.kind:  # a sum in another order is the same one
        complete, own = carried_out(collective, range(4))[0], collective.gives(2, 4)
        for sign in (-1, 1):
            assert Check.of_all(told(collective, [[all_ + sign * one for all_, one in zip(complete, own, strict=True)]] * 4)).wrong
    else:
        assert Check.of_all(told(collective, carried_out(collective, (3, 1, 2, 0)))).wrong


def test_what_is_said_of_a_right_and_of_a_wrong_result():
    right = Check.of_all(told(Collective("all_reduce"), [[1, 2, 3]] * 3))
    assert right.line(3) == "all_reduce: right on all 3 ranks (2.0 ms)" and right.right == (0, 1, 2)
    assert Check.of_all(told(Collective("all_reduce"), [[1]])).line(1) == "all_reduce: right on rank 0 (0.0 ms)"
    one = Check.of_all(told(Collective("reduce", 2), [None, None, [1, 2, 3]]))
    assert one.line(3) == "reduce to rank 2: right on rank 2 (2.0 ms)"
    wrong = Check.of_all(told(Collective("scatter", 1), [[1], [3], [2]]))
    assert wrong.line(3) == "scatter from rank 1: wrong, rank 1 got [3], must be [2], rank 2 got [2], must be [3]"
    assert wrong.as_json()["wrong_on"][0] == {"rank": 1, "got": [3], "expected": [2]} and wrong.as_json()["right_on"] == (0,)
    early = Check.of_all(told(Collective("barrier"), [[1, 1, 1], [1, 1, 1], [0, 0, 1]]))
    assert early.sentence() == "barrier: wrong, rank 2 left before ranks 0, 1 entered"
    assert (
        Check.of_all(told(Collective("barrier"), [[1, 1], [1, 1]])).line(2).endswith("(0.0 ms)")
    )  # the last to enter waits for none
    long = Check.of_all(told(Collective("all_gather"), [[0] * 40] * 40)).sentence()
    assert "0, …]" in long and long.endswith("and 32 more") and len(long.splitlines()) == 1


@pytest.fixture
def interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")


def group_of_one(port, line="--inspect --timeout 10"):
    return Rank("t", 0, 1, 0, 1, 0, "127.0.0.1", port), parse_config("t", argv=line.split(), environment={})


def test_a_real_group_of_one_and_a_collective_that_does_nothing(interface, monkeypatch):
    with PortReservation(0) as port:
        rank, config = group_of_one(port)
        with process_group(announce(rank, config), CPU) as group:
            began = time.monotonic()
            assert all(t["got"] == t["expected"] for t in check_collectives(group))
            assert time.monotonic() - began < 3  # nothing waits out its limit
    with PortReservation(0) as port:
        rank, config = group_of_one(port)
        with process_group(announce(rank, config), CPU) as group:
            monkeypatch.setattr(dist, "all_gather", lambda outputs, own: None)
            wrong = [Check.of_all([t]) for t in check_collectives(group)]
    assert [check.sentence() for check in wrong if check.wrong] == ["all_gather: wrong, rank 0 got [0], must be [1]"]


def test_an_inspection_of_one_rank_says_what_is_wrong(interface, monkeypatch, capfd):
    with PortReservation(0) as port:
        monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.zero_())
        with pytest.raises(RunError) as caught:
            inspect(group_of_one(port)[1], group_of_one(port)[0])
    assert str(caught.value) == "all_reduce: wrong, rank 0 got [0], must be [1]"
    out = capfd.readouterr().out
    assert "  all_reduce: wrong, rank 0 got [0], must be [1]\n" in out and "  all_gather: right on rank 0 (" in out


def test_a_process_on_its_own(capfd):
    inspect(parse_config("t", argv=["--inspect", "--device", "cpu"], environment={}), Rank("plain", launchers=()))
    rows = capfd.readouterr().out.splitlines()
    assert rows[0].endswith("$Process 0: 0 # 1") and rows[1] == "[Rank 0] Default device is set to cpu"
    assert rows[-1] == "Collectives: none were run, one process without a group has nobody to talk to"
    assert str(os.getpid()) in rows[5].split()
