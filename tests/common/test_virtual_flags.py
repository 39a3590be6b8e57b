"""What a virtual cluster is told, before anything is made."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UsageError
from common.namespaces import last_line
from common.virtual_cluster import VirtualCluster, shares
from common.virtual_network import bits_per_second, seconds

ROOT = Path(__file__).resolve().parents[2]


def test_hosts_have_names_addresses_and_placeholders():
    cluster = VirtualCluster(3)
    assert cluster.names == ["node1", "node2", "node3"]
    assert cluster.addresses == {"node1": "10.97.0.1", "node2": "10.97.0.2", "node3": "10.97.0.3"}
    words = ["--node_rank", "{rank}", "--master_addr={master}", "{name}/{addr}", "{x}", "{}", "{rank"]
    assert cluster.filled_in("node2", words) == ["--node_rank", "1", "--master_addr=node1", "node2/10.97.0.2", "{x}", "{}", "{rank"]
    assert VirtualCluster(2, ["a", "lab-7"]).names == ["a", "lab-7"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"nodes": 0}, "--nodes 0: not allowed; give 1 to 200"),
        ({"nodes": 201}, "--nodes 201"),
        ({"nodes": 2, "names": ["a"]}, "--names a with --nodes 2"),
        ({"nodes": 2, "names": ["a", "a"]}, "--names a: not allowed"),
        ({"nodes": 1, "names": ["-a"]}, "--names -a: not allowed"),
        ({"nodes": 1, "names": ["a b"]}, "--names a b: not allowed"),
        ({"nodes": 1, "names": ["localhost"]}, "--names localhost: not allowed"),
        ({"rate": "fast"}, "--rate fast: not allowed; give a number with kbit, mbit or gbit"),
        ({"rate": "0mbit"}, "--rate 0mbit: not allowed"),
        ({"delay": "2"}, "--delay 2: not allowed; give a number with us, ms or s"),
        ({"cores": 10_000}, "--cores 10000: not allowed; this machine has "),
    ],
)
def test_nonsense_is_refused(wrong, words):
    with pytest.raises(UsageError) as refused:
        VirtualCluster(**wrong)
    assert words in str(refused.value)


def test_units():
    assert bits_per_second("100mbit") == 1e8 and bits_per_second("2.5Gbit") == 2.5e9 and bits_per_second("64kbit") == 64e3
    assert seconds("2ms") == 0.002 and seconds("500us") == 0.0005 and seconds("1s") == 1.0


def test_hosts_get_their_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 6, 7}, raising=False)
    assert shares(["a", "b"]) == {"a": {3, 5}, "b": {6, 7}}
    assert shares(["a", "b", "c"]) == {"a": {3}, "b": {5}, "c": {6}}
    assert shares(["a", "b", "c", "d", "e"])["e"] == {3}
    assert shares(["a", "b"], 3) == {"a": {3, 5, 6}, "b": {7, 3, 5}}


def test_where_a_program_says_why():
    assert last_line("warning\n\nreason\n\n") == "reason" and last_line("") == "no reason given"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "many"], "--nodes many: not allowed; give a whole number, 1 or more"),
        (["--nodes", "2", "--names", "a,b,c"], "--names a b c with --nodes 2"),
        (["--speed", "3"], "unrecognized arguments: --speed 3; see --help"),
        (["--rate", "1mph", "--", "true"], "--rate 1mph"),
    ],
)
def test_the_command_refuses_in_one_line(flags, words):
    command = [sys.executable, "-m", "common.virtual_cluster", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert ended.returncode == 2 and words in ended.stderr and ended.stderr.count("\n") == 1, ended
