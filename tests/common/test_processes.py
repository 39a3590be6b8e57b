"""events.py and children.py against real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from common import children, events
from tests.common.helpers import ROOT, end_group, python, run, start

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# ------------------------------------------------------------------------------------------------- who is launching


@pytest.mark.parametrize(
    "line",
    [
        "torchrun --nproc_per_node=2 launchers/torchrun.py",
        "/venv/bin/torchrun x.py",
        "python /venv/bin/torchrun --nproc_per_node=2 launchers/torchrun.py",
        "/venv/bin/python3.11 /venv/bin/torchrun x.py",
        "python -m torch.distributed.run --nproc_per_node 2 launchers/torchrun.py",
        "python -u -m torch.distributed.run x.py",
        "python -um torch.distributed.run x.py",
        "python launchers/plain.py --world_size 2",
        "python /home/me/launchlab/launchers/spawn.py",
        "python -u launchers/plain.py",
        "python -X dev -W error -u launchers/plain.py",
        "python -Xdev -Werror launchers/plain.py",
        "python -m launchers.plain --world_size 2",
        "python -m accelerate.commands.launch x.py",
        "mpirun -np 4 python launchers/mpi.py",
        "mpiexec.hydra -n 2 python launchers/mpi.py",
        "/usr/lib/mpich/hydra_pmi_proxy --control-port h:1 --rmk user",
        "prterun -np 2 python launchers/mpi.py",
        "slurmstepd: [7.0]",
        "srun -n 2 python launchers/torchrun.py",
        "python /venv/bin/accelerate launch x.py",
    ],
)
def test_what_launches(line):
    assert events.is_launching([line] if line.startswith("slurm") else line.split(" "))  # it renames itself: one word


def test_multiprocessing_children_belong_to_a_launch():
    code = "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=7, pipe_handle=9)"
    assert events.is_launching(["/usr/bin/python3", "-c", code, "--multiprocessing-fork"])
    assert events.is_launching(["python", "-B", "-s", "-c", "from multiprocessing.forkserver import main; main(3)"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [""],
        ["python"],
        ["bash"],
        ["bash", "launchers/plain.py"],
        ["sh", "-c", "torchrun x.py"],
        ["timeout", "60", "torchrun", "--nproc_per_node=2", "launchers/torchrun.py"],
        ["env", "A=1", "python", "launchers/plain.py"],
        ["make", "compare"],
        ["vim", "launchers/torchrun.py"],
        ["pytest", "tests/launchers/test_plain.py"],
        ["python", "-m", "pytest", "tests/launchers/test_plain.py"],
        ["python", "/venv/bin/pytest", "launchers/plain.py"],
        ["python", "/venv/bin/pytest", "tests/launchers/test_torchrun.py"],
        ["python", "-m", "pytest", "tests/test_multiprocessing.py"],
        ["python", "multiprocessing_demo.py"],
        ["python", "-c", "import multiprocessing"],
        ["python", "benchmarks/compare.py", "--launchers", "torchrun"],
        ["python", "benchmarks/compare.py", "launchers/plain.py"],
        ["python", "-m", "benchmarks.compare", "torchrun"],
        ["python", "-m", "ipykernel_launcher", "-f", "launchers/x.json"],
        ["python", "-W", "launchers/plain.py", "other.py"],
        ["python", "launchers/notes.txt"],
        ["sshd: me@pts/0"],
        ["/sbin/init"],
    ],
)
def test_what_does_not_launch(argv):
    assert not events.is_launching(argv)


def test_a_launcher_named_from_within_its_folder():
    assert events.is_launching(["python", "plain.py"], "/home/me/launchlab/launchers")
    assert not events.is_launching(["python", "plain.py"], "/home/me")


@linux
def test_a_process_started_when_it_started():
    before = events.now()
    child = start([sys.executable, "-I", "-S", "-c", "import time; time.sleep(30)"])
    after = events.now()
    try:
        assert before - 0.02 <= events.started_at(child.pid) <= after + 0.02
    finally:
        end_group(child)
    with pytest.raises(OSError):
        events.started_at(child.pid)


TELL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from common import events
chain = events.launching_ancestors()
print(json.dumps([chain, events.command_started(chain)]))
"""


@linux
@pytest.mark.parametrize("inside", [False, True])
def test_a_rank_counts_from_its_launcher_s_start(tmp_path, inside):
    """A process of launchers/ that starts another which starts the rank: both belong to the launch, this test does not."""
    folder = tmp_path / "launchers"
    folder.mkdir()
    (folder / "rank.py").write_text(TELL)
    for name, then in (("inner", "rank"), ("outer", "inner")):
        (folder / f"{name}.py").write_text(
            f"import os, subprocess, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(0.1)\n"
            f"sys.exit(subprocess.call([sys.executable, '-S', {str(folder / then) + '.py'!r}]))\n"
        )
    argv, where = (["outer.py"], folder) if inside else ([str(folder / "outer.py")], tmp_path)
    began = events.now()
    status, out, err = run([sys.executable, "-S", *argv], cwd=where)
    assert status == 0, err
    outer, inner, told = out.splitlines()
    chain, started = json.loads(told)
    assert chain == [int(inner), int(outer)]
    assert began - 0.02 <= started <= began + 5


@linux
def test_a_process_on_its_own_counts_from_its_own_start():
    began = events.now()
    status, out, err = run([sys.executable, "-S", "-c", TELL])
    assert status == 0, err
    chain, started = json.loads(out)
    assert chain == [] and began - 0.02 <= started <= events.now()


def test_phases():
    phases = events.Phases(events.now() - 5)
    first = phases.mark("a")
    time.sleep(0.01)
    second = phases.mark("b")
    assert phases.known and 5 <= first < second < 65 and phases.marks == {"a": first, "b": second}
    unknown = events.Phases(None)
    assert not unknown.known and 0 <= unknown.mark("a") < 60


# ------------------------------------------------------------------------------------------------ a run of children


@contextlib.contextmanager
def family(*codes):
    """Children by rank, each running a piece of Python."""
    ranks = {rank: subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) for rank, code in enumerate(codes)}
    try:
        yield ranks
    finally:
        for child in ranks.values():
            child.kill()
            child.wait(10)


SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def wait(*codes):
    """(status, seconds until all had ended); none may be left."""
    with family(*codes) as ranks:
        began = time.monotonic()
        status = children.wait_for_all(ranks, "test.py")
        took = time.monotonic() - began
        assert all(child.returncode is not None for child in ranks.values())
    return status, took


def test_all_well(capfd):
    assert wait("pass", "import time; time.sleep(0.2)")[0] == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_the_first_failure_is_named_and_the_rest_are_ended_in_time(capfd, monkeypatch, code, said):
    monkeypatch.setattr(children, "PATIENCE_S", 0.5)
    status, took = wait(SLEEP, code, DEAF)
    assert status == 1 and took < 5
    assert capfd.readouterr().err == f"test.py: rank 1 ended first, with {said}.\n"


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ((1, -15), ""),  # it told of its failure, and the watcher asked the other to leave
        ((1, -9), "rank 1 ended first, with SIGKILL."),
        ((0, -15), "the rank here ended with SIGTERM."),
        ((-15, -15), "all ranks here ended with SIGTERM."),
    ],
)
def test_who_has_told_of_its_end_is_not_blamed(statuses, said):
    assert children.to_blame(list(enumerate(statuses))) == said


def test_patience_and_the_last_second_are_within_the_promise():
    assert children.PATIENCE_S + 1 < 5


def test_a_refusal_needs_no_second_sentence(capfd):
    assert wait("import sys; sys.exit(2)", "import sys; sys.exit(2)")[0] == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([0, 0], 0),
        ([], 0),
        ([2, 2], 2),
        ([2, 0], 2),
        ([2, -15], 2),
        ([130, -2], 130),
        ([130, 130], 130),
        ([1, 2], 1),
        ([0, 5], 1),
        ([-9, 2], 1),
        ([-15, -15], 1),
        ([130, 2], 1),
    ],
)
def test_one_status_for_a_run(statuses, status):
    assert children.overall(statuses) == status


def test_statuses_in_words():
    assert [children.in_words(s) for s in (0, 3, -9, -15, -999)] == [
        "exit status 0", "exit status 3", "SIGKILL", "SIGTERM", "signal 999"
    ]  # fmt: skip


INTERRUPTED = f"""
import subprocess, sys
from common.children import wait_for_all
ranks = {{r: subprocess.Popen([sys.executable, "-I", "-S", "-c", {SLEEP!r}]) for r in range(2)}}
print(*(child.pid for child in ranks.values()), flush=True)
status = wait_for_all(ranks, "test.py")
print(status, *(child.returncode for child in ranks.values()))
"""


def test_ctrl_c_ends_all_children():
    child = start([sys.executable, "-c", INTERRUPTED])
    try:
        pids = child.stdout.readline().split()
        time.sleep(0.3)
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=10)
        assert time.monotonic() - began < 3
    finally:
        end_group(child)
    assert out.split()[0] == "130" and len(pids) == 2, err
    assert all(int(status) != 0 for status in out.split()[1:])
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_this_process_has_no_launcher():
    status, out, _ = python("from common import children, events; print(events.launching_ancestors())")
    assert (status, out) == (0, "[]\n")
