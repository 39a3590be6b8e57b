"""rank.py, ports.py, errors.py, files.py, parts.py."""

import dataclasses
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from common import files
from common.checks import check_writable
from common.errors import RunError, UsageError, complain, exit_status, one_line
from common.parts import accepted, build, load_class
from common.ports import PortReservation
from common.rank import Rank, on_this_machine, rank_number
from tests.common.helpers import python, refusal

# -------------------------------------------------------------------------------------------------------------- rank


def test_a_rank_of_its_own():
    rank = Rank("plain")
    assert (rank.rank, rank.world_size, rank.forms_group, rank.one_node) == (0, 1, False, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rank.rank = 1


@given(st.integers(-2, 9), st.integers(-1, 9), st.integers(-2, 9), st.integers(-1, 9))
def test_only_numbers_that_belong_together_make_a_rank(rank, world, local, local_world):
    good = 0 <= rank < world and 0 <= local < local_world <= world
    try:
        made = Rank("x", rank, world, local, local_world, 0, "host", 1)
    except UsageError as error:
        assert not good and len(str(error).splitlines()) == 1
        assert f"{rank}" in str(error) or f"{local}" in str(error)
    else:
        assert good and made.forms_group and made.one_node == (local_world == world)


def test_impossible_ranks_are_named():
    assert "RANK 2 with WORLD_SIZE 2" in refusal(Rank, "x", 2, 2)
    assert "WORLD_SIZE 0" in refusal(Rank, "x", 0, 0)
    assert "LOCAL_RANK 1 with LOCAL_WORLD_SIZE 1" in refusal(Rank, "x", 1, 2, 1, 1)
    assert "WORLD_SIZE 2 without MASTER_ADDR" in refusal(Rank, "x", 0, 2, 0, 2)


def test_numbers_from_variables():
    assert rank_number({"RANK": "3"}, "RANK") == 3
    assert rank_number({}, "RANK", 7) == rank_number({"RANK": ""}, "RANK", 7) == 7
    for text in ("-1", "x", "1.5", " 1", "²", "+1", "1_0"):
        assert f"RANK={text}: not allowed" in refusal(rank_number, {"RANK": text}, "RANK")
    assert "WORLD_SIZE is not set, but RANK, LOCAL_RANK is" in refusal(rank_number, {"RANK": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE")


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        (None, False),
        ("10.0.0.1", False),
        ("n", False),
    ],
)
def test_hosts_that_mean_this_machine(host, here):
    assert on_this_machine(host) is here


# ------------------------------------------------------------------------------------------------------------- ports


def listener(port=0):
    taken = socket.socket()
    try:
        taken.bind(("", port))
        taken.listen()
    except OSError:
        taken.close()
        raise
    return taken


@pytest.mark.parametrize("wanted", [None, 0])
def test_a_reserved_port_is_handed_to_nobody_else(wanted):
    with PortReservation(wanted) as port:
        assert 0 < port < 65536
        if sys.platform == "linux":
            with pytest.raises(OSError, match="in use"):
                listener(port)
        others = [PortReservation(None) for _ in range(50)]
        for other in others:
            other.release()
        assert port not in {other.port for other in others}


def test_rank_0s_store_listens_on_the_reserved_port():
    with PortReservation(0) as port:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
        client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
        client.set("a", "b")
        assert store.port == port and store.get("a") == b"b"


def test_a_released_port_is_free_again():
    with PortReservation(0) as port:
        pass
    listener(port).close()


def test_a_taken_port_is_refused_and_names_the_flag():
    with listener() as taken:
        port = taken.getsockname()[1]
        said = refusal(PortReservation, port)
        assert f"--master_port {port}: cannot be used here" in said and "in use" in said
    with PortReservation(port) as again:
        assert again == port


# ------------------------------------------------------------------------------------------------------------ errors


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (raiser(UsageError("--a 1: no")), 2, "error: --a 1: no\n"),
        (raiser(RunError("rank 1 is missing")), 1, "rank 1 is missing\n"),
        (raiser(KeyboardInterrupt()), 130, ""),
        (raiser(SystemExit()), 0, ""),
        (raiser(SystemExit(0)), 0, ""),
        (raiser(SystemExit(5)), 5, ""),
        (raiser(SystemExit("why")), 1, "why\n"),
    ],
)
def test_exit_status(capfd, main, status, said):
    assert exit_status(main) == status
    assert capfd.readouterr().err == said


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)


def test_a_rank_that_does_not_speak_says_nothing_and_lets_the_speaker_go_first(capfd, monkeypatch):
    waited = []
    monkeypatch.setattr("common.errors.time.sleep", waited.append)
    assert exit_status(raiser(UsageError("no")), speaks=False) == 2
    assert capfd.readouterr().err == "" and waited == [2]


def test_a_refusal_is_one_line_whatever_it_quotes():
    assert str(UsageError("--job a\nb\r\nc: no")) == "--job a b c: no"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\nb"), "ValueError: a"),
        (ValueError("\n\n  b  \nc"), "ValueError: b"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "KeyError: 'k'"),
    ],
)
def test_one_line(error, text):
    assert one_line(error) == text


def test_one_line_is_not_long():
    assert one_line(ValueError("x" * 1000)) == "ValueError: " + "x" * 288


def test_complain_survives_a_closed_stderr():
    status, out, _ = python("import os; from common.errors import complain; os.close(2); complain('x'); print('on')")
    assert (status, out) == (0, "on\n")


def test_complain_writes_any_text(capfd):
    complain("é \udcff")
    assert capfd.readouterr().err == "é ?\n"


# ------------------------------------------------------------------------------------------------------------- files


def boom(stream):
    stream.write(b"half")
    raise RuntimeError("full")


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="full"):
        files.write_whole(tmp_path / "a", boom)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a"
    files.write_whole(path, lambda stream: stream.write(b"old"))
    with pytest.raises(RuntimeError):
        files.write_whole(path, boom)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    files.write_whole(str(path), lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_writers_with_one_process_id_do_not_meet(tmp_path):
    """As on two hosts that share a folder; here two threads."""
    path, text = tmp_path / "a", b"x" * 10_000

    def work(_):
        check_writable("--result a", path)
        files.write_whole(path, lambda stream: stream.write(text))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(200)))
    assert path.read_bytes() == text and list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = """
import os, signal, sys
from common.files import write_whole
def write(stream):
    stream.write(b"x" * 100000)
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(sys.argv[1], write)
"""
    status, _, _ = python(code, str(path))
    assert status == -9 and path.read_bytes() == b"old"


def test_json_has_one_key_a_line(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "d\né"}, "e": True}
    files.write_json(tmp_path / "r.json", value)
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == value and len(text.splitlines()) == 5 and text.endswith("}\n")


# ------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current folder; its name."""
    made = []

    def write(text):
        name = f"users_own_{len(made)}_{os.getpid()}"
        (tmp_path / f"{name}.py").write_text(text)
        made.append(name)
        return name

    monkeypatch.setattr(sys, "path", list(sys.path))
    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_a_class_of_the_current_folder_is_found(module):
    name = module("class Net:\n    def __init__(self, size=3): self.size = size\ndef make(): return 5\n")
    assert load_class("--model", f"{name}:Net")().size == 3
    assert load_class("--model", f"{name}:make")() == 5
    assert load_class("--model", "collections:OrderedDict") is __import__("collections").OrderedDict


def test_what_cannot_be_imported_is_refused(module):
    said = refusal(load_class, "--model", "no_such_module_here:Net")
    assert "--model no_such_module_here:Net: no_such_module_here cannot be imported (ModuleNotFoundError" in said
    for text, why in [("def", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("import no_such_thing", "ModuleNotFoundError")]:
        name = module(text)
        assert f"{name} cannot be imported ({why}" in refusal(load_class, "--dataset", f"{name}:D")


def test_what_the_module_does_not_have_is_refused(module):
    name = module("from collections import OrderedDict\nclass Net: pass\nclass Other: pass\nvalue = 3\n")
    assert "has no class Nett; it has Net, Other" in refusal(load_class, "--model", f"{name}:Nett")
    assert "has no class value" in refusal(load_class, "--model", f"{name}:value")
    assert "has no class A; it has no class" in refusal(load_class, "--model", f"{module('')}:A")


def test_only_what_it_has_parameters_for_is_passed():
    def make(size, other=2):
        return size, other

    assert accepted(make, {"size": 1, "seed": 2}) == {"size": 1}
    assert build("--model", "m:make", make, {"size": 1, "seed": 2}) == (1, 2)
    assert accepted(lambda: 0, {"size": 1}) == accepted(5, {"size": 1}) == {}


def test_what_cannot_be_made_is_refused():
    def make(must):
        return must

    said = refusal(build, "--model", "m:make", make, {"input_size": 1, "hidden_size": 2})
    assert "--model m:make: make() cannot be made (TypeError" in said and "input_size, hidden_size" in said

    def breaks(input_size):
        raise ValueError("first\nsecond")

    assert "breaks(input_size=1) cannot be made (ValueError: first)" in refusal(build, "--m", "m:b", breaks, {"input_size": 1})
