"""--inspect under every launcher: who is who, what the launcher set, and collectives that are checked."""

import json
import os
import re
import socket

import pytest
from running import ALL, MARKER, MPIS, ROOT, Run, command, run, tracebacks_of_ours

pytestmark = pytest.mark.launch

HOST = socket.gethostname()
PLAIN = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE"}
# Some of what each launcher is known to set, and what it does not.
SETS = {
    "plain": (PLAIN, {"OMP_NUM_THREADS"}),
    "spawn": (set(), {"RANK"}),
    "torchrun": ({"RANK", "GROUP_RANK", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"}, set()),
    "elastic": ({"RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID"}, set()),
    "mpi": ({"PMI_RANK", "PMI_SIZE"}, {"RANK", "MASTER_ADDR"}),
    "openmpi": ({"OMPI_COMM_WORLD_RANK", "PMIX_RANK"}, {"RANK", "MASTER_ADDR"}),
    "systemmpi": ({"OMPI_COMM_WORLD_RANK", "PMIX_RANK"}, {"RANK", "MASTER_ADDR"}),
}
NUMBER_OF_RANK = {
    "plain": "RANK",
    "torchrun": "RANK",
    "elastic": "RANK",
    "mpi": "PMI_RANK",
    "openmpi": "PMIX_RANK",
    "systemmpi": "PMIX_RANK",
}


@pytest.mark.parametrize("launcher", (*ALL, *MPIS))
def test_every_launcher(tmp_path, launcher):
    world = 3 if launcher in ("spawn", "mpi") else 2
    ended = run(
        command(launcher, world, "--inspect", "--result", "found.json"), cwd=tmp_path, USERS_OWN="1", PYTHONWARNINGS="always"
    )
    assert ended.status == 0 and tracebacks_of_ours(ended) == 0, str(ended)
    assert "Epoch" not in ended.out and "Warning" not in ended.err, str(ended)
    rows = ended.out.splitlines()
    assert rows[:world] == [f"{HOST}$Process {rank}: {rank} # {world}" for rank in range(world)], str(ended)
    assert rows[world : 2 * world] == [f"[Rank {rank}] Default device is set to cpu" for rank in range(world)], str(ended)

    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["world_size"], found["backend"], len(found["ranks"])) == (world, "gloo", world)
    for number, rank in enumerate(found["ranks"]):
        assert (rank["rank"], rank["local_rank"], rank["world_size"], rank["node_rank"]) == (number, number, world, 0)
        assert rank["host"] == HOST and re.fullmatch(r"(127\.0\.0\.1|localhost):\d+", rank["master"])
        assert set(rank["cores"]) <= os.sched_getaffinity(0) and rank["threads_found"] >= 1 <= rank["threads_in_training"]
        set_here, not_set = SETS[launcher]
        assert set_here <= set(rank["variables"]) and not (not_set | {"USERS_OWN", MARKER, "HOME"}) & set(rank["variables"])
        assert rank["omp_num_threads"] == ("1" if launcher == "torchrun" else None)
        if name := NUMBER_OF_RANK.get(launcher):
            assert rank["variables"][name] == str(number)
    assert len({rank["pid"] for rank in found["ranks"]}) == world
    if launcher in ("plain", "spawn"):  # these set nothing else
        assert set(found["ranks"][0]["variables"]) == SETS[launcher][0]
        assert ("Variables that the launcher set: none, " in ended.out) == (launcher == "spawn")
    if launcher != "openmpi" and launcher in NUMBER_OF_RANK:
        assert re.search(rf"^  {NUMBER_OF_RANK[launcher]} +0…{world - 1}, each rank its own$", ended.out, re.MULTILINE), str(ended)

    names = [
        "all_reduce",
        "all_gather",
        *(f"{kind} from rank {root}" for kind in ("broadcast", "scatter") for root in (0, world - 1)),
    ]
    for name in (*names, "barrier"):
        assert re.search(rf"^  {name}: right on all {world} ranks \(\d+\.\d ms\)$", ended.out, re.MULTILINE), str(ended)
    for root in (0, world - 1):
        assert re.search(rf"^  reduce to rank {root}: right on rank {root} \(\d+\.\d ms\)$", ended.out, re.MULTILINE), str(ended)
    assert len(found["collectives"]) == 9 and not any(one["wrong_on"] for one in found["collectives"])


def test_one_process_and_a_launchers_single_rank(tmp_path):
    alone = run(["python", str(ROOT / "launchers/plain.py"), "--inspect"], cwd=tmp_path)
    assert (alone.status, alone.err) == (0, ""), str(alone)
    assert alone.out.startswith(f"{HOST}$Process 0: 0 # 1\n") and "no launcher started this" in alone.out
    assert "nobody to talk to" in alone.out and "right on" not in alone.out
    single = run(command("torchrun", 1, "--inspect"), cwd=tmp_path)
    assert single.status == 0 and single.out.count(": right on rank 0 (") == 6, str(single)


def test_what_the_user_has_the_launcher_set(tmp_path):
    """A value that the command gives is the launcher's doing; a secret one is shown nowhere."""
    words = command("mpi", 2, "--inspect", "--result", "found.json")
    words[1:1] = ["-genv", "MY_TOKEN", "s3cret", "-genv", "MINE", "from the command"]
    ended = run(words, cwd=tmp_path, MINE="from the shell")
    assert ended.status == 0, str(ended)
    assert re.search("^  MINE +from the command$", ended.out, re.MULTILINE), str(ended)
    assert re.search(r"^  MY_TOKEN +\(hidden: ", ended.out, re.MULTILINE), str(ended)
    assert "s3cret" not in ended.out + ended.err + (tmp_path / "found.json").read_text()


# ------------------------------------------------------------------------------------------ by hand: what goes wrong

BROKEN = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
real = dist.all_reduce
def wrong(tensor):
    real(tensor)
    tensor[0] = 7
def stuck(tensor):
    real(tensor)
    os.kill(os.getpid(), signal.SIGSTOP)
dist.all_reduce = {{"wrong": wrong, "stuck": stuck}}[os.environ["TEST_BROKEN"]] if os.environ["RANK"] == "1" else real
sys.argv[0] = {str(ROOT / "launchers/plain.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def by_hand(tmp_path, port, rank, *flags, file=ROOT / "launchers/plain.py", **env):
    group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return Run(["python", str(file), *map(str, flags)], cwd=tmp_path, **(group | env))


def test_a_rank_that_does_not_arrive_is_named(tmp_path, free_port):
    ended = by_hand(tmp_path, free_port, 0, "--inspect", "--timeout", 3).finish(20)
    assert ended.status == 1 and ended.out == "" and tracebacks_of_ours(ended) == 0, str(ended)
    assert f"Rank 0 on {HOST}" in ended.err and "rank 1 of 2 did not arrive within 3 s (--timeout)" in ended.err, str(ended)
    assert len(ended.err.splitlines()) == 1, str(ended)


def test_ranks_of_which_one_would_train_are_refused(tmp_path, free_port):
    both = [by_hand(tmp_path, free_port, rank, *flags) for rank, flags in enumerate((["--inspect"], []))]
    ended = [each.finish() for each in both]
    said = "rank 1 was given inspect False where rank 0 has True"
    assert sum(each.err.count(said) for each in ended) == 1 and 2 in {each.status for each in ended}, "\n".join(map(str, ended))


def test_a_wrong_result_names_the_rank(tmp_path, free_port):
    (tmp_path / "broken.py").write_text(BROKEN)
    flags = ("--inspect", "--result", "found.json")
    both = [by_hand(tmp_path, free_port, rank, *flags, file="broken.py", TEST_BROKEN="wrong") for rank in (0, 1)]
    ended = [each.finish() for each in both]
    shown = "\n".join(map(str, ended))
    said = "all_reduce: wrong, rank 1 got [7, 2], must be [1, 2]"
    assert f"  {said}\n  all_gather: right on all 2 ranks" in ended[0].out and ended[1].out == "", shown
    assert sum(each.err.count(f"failed: {said}") for each in ended) == 1 and "Traceback" not in shown, shown
    assert 1 in {each.status for each in ended} and 0 not in {each.status for each in ended}, shown
    found = json.loads((tmp_path / "found.json").read_text())["collectives"][0]
    assert found["wrong_on"] == [{"rank": 1, "got": [7, 2], "expected": [1, 2]}] and found["right_on"] == [0]


def test_a_rank_that_hangs_between_collectives_is_named(tmp_path, free_port):
    """It has arrived and joined; the others' backend would only say that an operation timed out."""
    (tmp_path / "broken.py").write_text(BROKEN)
    flags = ("--inspect", "--timeout", 5)  # on a busy machine one arrives seconds after the other
    both = [by_hand(tmp_path, free_port, rank, *flags, file="broken.py", TEST_BROKEN="stuck") for rank in (0, 1)]
    ended = [each.finish(30) for each in both]
    said = f"Rank 0 on {HOST} (pid {both[0].process.pid}) failed: rank 1 of 2 did not come to all_reduce within 5 s (--timeout)"
    # The node's watcher speaks, on the stderr of the rank that was there first and started it.
    assert sum(each.err.count(said) for each in ended) == 1, "\n".join(map(str, ended))
    assert ended[0].status == 1 and ended[1].status < 0, "the watcher has ended the one that hangs"


def test_an_interface_that_is_not_there_is_refused(tmp_path):
    ended = run(command("plain", 2, "--inspect"), cwd=tmp_path, GLOO_SOCKET_IFNAME="nosuch0")
    assert ended.status == 2 and len(ended.err.splitlines()) == 1, str(ended)
    assert ended.err.startswith("error: GLOO_SOCKET_IFNAME=nosuch0: no such interface; this machine has "), str(ended)
