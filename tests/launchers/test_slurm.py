"""srun and sbatch on a virtual cluster's own SLURM: the same loss, the same endings, whoever runs where."""

import contextlib
import functools
import json
import os
import re
import time

import psutil
import pytest
from running import ROOT, Run, cluster, run, trained
from test_endings import MODEL
from test_parity import difference
from test_virtual_cluster import as_learner

from common.ports import step_port

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

JOB = ("--job", "random", "--epochs", "2", "--global_batch_size", "17", "--data_size", "128")
SLURM_PY = ("python", str(ROOT / "launchers" / "slurm.py"))
PROMISED_S = 5.0


@pytest.fixture(scope="module")
def hosts():
    """Two hosts, of four CPUs each as SLURM counts them. They share all cores of this machine."""
    with cluster(2, slurm=True, cores=min(2, len(os.sched_getaffinity(0)))) as made:
        yield made


@functools.cache
def alone(folder):
    """The result of one process on its own."""
    return trained(["python", "launchers/plain.py", *JOB, "--precision", "fp64", "--threads", "1"], folder / "alone.json")


@pytest.fixture(autouse=True)
def empty_queue(request):
    """No test waits for another's jobs, and none leaves one."""
    yield
    if "hosts" in request.fixturenames:
        hosts = request.getfixturevalue("hosts")
        until = time.monotonic() + 20
        while (left := asked(hosts, "squeue", "--noheader").stdout.strip()) and time.monotonic() < until:
            time.sleep(0.1)
        asked(hosts, "scancel", "--partition=all")
        assert not left


def asked(hosts, *words, limit=30):
    """What a short command on the first host answers."""
    return hosts.run(list(words), on="node1", timeout=limit)["node1"]


def on(hosts, *words, cwd=ROOT, limit=120, **env):
    """Runs a command on the first host to its end."""
    return run(hosts.command("node1", [str(word) for word in words], cwd=cwd), limit=limit, **env)


def who(ended):
    """{rank: (host, local rank)} as the ranks say it."""
    found = re.findall(r"^\[Rank (\d+)\] Process initialized on (\S+), local_rank: (\d+), world_size: (\d+)$", ended.out, re.M)
    assert len({size for *_, size in found}) == 1, ended
    return {int(rank): (host, int(local)) for rank, host, local, _ in found}


LAYOUTS = {
    "more on the first": (("-N2", "-n4"), [("node1", 0), ("node1", 1), ("node1", 2), ("node2", 0)]),
    "even": (("-N2", "--ntasks-per-node=2"), [("node1", 0), ("node1", 1), ("node2", 0), ("node2", 1)]),
    "2,1": (("-N2", "-n3"), [("node1", 0), ("node1", 1), ("node2", 0)]),
    "cyclic": (("-N2", "-n4", "--distribution=cyclic"), [("node1", 0), ("node2", 0), ("node1", 1), ("node1", 2)]),
    "plane": (("-N2", "-n4", "--distribution=plane=1"), [("node1", 0), ("node2", 0), ("node1", 1), ("node2", 1)]),
    "rank 0 on the second": (
        ("-n3", "--distribution=arbitrary", "-w", "node2,node1,node1"),
        [("node2", 0), ("node1", 0), ("node1", 1)],
    ),
    "heterogeneous": (("-w", "node2", "-n1", ":", "-w", "node1", "-n2"), [("node2", 0), ("node1", 0), ("node1", 1)]),
    "one node, not the first": (("-n2", "-w", "node2"), [("node2", 0), ("node2", 1)]),
    "one task": (("-n1",), [("node1", 0)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_of_one_process_wherever_the_tasks_are(hosts, tmp_path_factory, tmp_path, layout):
    flags, where = LAYOUTS[layout]
    ended = on(hosts, "srun", *flags, *SLURM_PY, *JOB, "--precision", "fp64", "--result", tmp_path / "r.json")
    assert ended.status == 0, ended
    assert who(ended) == dict(enumerate(where)), ended
    many = json.loads((tmp_path / "r.json").read_text())
    assert (many["launcher"], many["world_size"]) == ("slurm", len(where))
    one = alone(tmp_path_factory.getbasetemp())
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], one[curve]) < 1e-9, curve
    assert re.search(rf"^Launcher slurm: {len(where)} ranks? on {len(dict(where))} node", ended.out, re.M), ended
    assert ended.out.count("Epoch [2/2]") == 1, ended  # one terminal, one voice


# ------------------------------------------------------------------------------------------------------- sbatch


def batch(hosts, *words):
    """Submits a job, and waits until it is gone (sbatch --wait looks rarely); its number and exit status, "0:0" if all is well."""
    submitted = on(hosts, "sbatch", "--parsable", *words)
    assert submitted.status == 0 and submitted.out.strip().isdigit(), submitted
    number = submitted.out.strip()
    until = time.monotonic() + 120
    while asked(hosts, "squeue", "--noheader", f"--jobs={number}").stdout.strip() and time.monotonic() < until:
        time.sleep(0.2)
    told = asked(hosts, "scontrol", "show", "job", number).stdout
    return number, set(re.findall(r"ExitCode=(\S+)", told))


def test_the_job_as_shipped(hosts, tmp_path):
    """As its first lines say, from the repository's root; only the output goes elsewhere."""
    number, status = batch(hosts, f"--output={tmp_path}/slurm-%j.out", "launchers/slurm_job.sh", *JOB)
    said = (tmp_path / f"slurm-{number}.out").read_text()
    assert status == {"0:0"}, said
    assert said.startswith(f"Job {number}: 4 ranks on node[1-2]\n"), said
    assert re.search(r"^Launcher slurm: 4 ranks on 2 nodes, cpu, gloo, 1 thread per rank$", said, re.M), said
    assert "Epoch [2/2] - Train Loss: " in said and "error" not in said, said


def test_the_jobs_lines_for_torchrun(hosts, tmp_path):
    """What the file has as a comment, taken in instead of slurm.py's line."""
    text = (ROOT / "launchers" / "slurm_job.sh").read_text()
    before, _, comment = text.partition("\n# With torchrun")
    lines = [row.removeprefix("#   ") for row in comment.splitlines() if row.startswith("#   ")]
    assert before.count("srun -K python launchers/slurm.py") == 1 and len(lines) == 4
    (tmp_path / "job.sh").write_text(before.replace("srun -K python launchers/slurm.py", "# ") + "\n" + "\n".join(lines) + "\n")
    _, status = batch(hosts, f"--output={tmp_path}/out", tmp_path / "job.sh", *JOB)
    said = (tmp_path / "out").read_text()
    assert status == {"0:0"}, said
    assert re.search(r"^Launcher torchrun: 4 ranks on 2 nodes", said, re.M), said


def test_two_jobs_on_one_node_at_once(hosts, tmp_path):
    """An array: each of its tasks is a job of its own, with a port of its own."""
    words = f"srun {' '.join(SLURM_PY)} {' '.join(JOB)} --inspect --result {tmp_path}/$SLURM_ARRAY_TASK_ID.json"
    flags = ("--array=0-1", "--ntasks=2", "--nodelist=node2", f"--output={tmp_path}/%a.out")
    _, status = batch(hosts, *flags, "--wrap", words)
    assert status == {"0:0"}, [(tmp_path / f"{n}.out").read_text() for n in (0, 1)]
    ranks = [json.loads((tmp_path / f"{n}.json").read_text())["ranks"] for n in (0, 1)]
    masters = [{r["master"] for r in each} for each in ranks]
    jobs = [int(each[0]["variables"]["SLURM_JOB_ID"]) for each in ranks]
    assert masters == [{f"127.0.0.1:{step_port(job, 0)}"} for job in jobs] and jobs[0] != jobs[1]


# ------------------------------------------------------------------------------------------------------- endings


class Started:
    """srun with three ranks, two of them on node1, whose model is test_endings' (in ``folder``)."""

    def __init__(self, hosts, folder, *flags, fault="kill", peers="quiet", who=2):
        (folder / "broken.py").write_text(MODEL)
        words = ["srun", *flags, "-N2", "-n3", *SLURM_PY, "--job", "random", "--model", "broken:Fails", "--timeout", "60"]
        self.folder = folder
        self.run = Run(hosts.command("node1", words, cwd=folder), cwd=folder, FAULT=fault, PEERS=peers, WHO=who)

    def until(self, pattern, number=1):
        """Waits for files that the ranks make."""
        return self.run.until(lambda: len(found := list(self.folder.glob(pattern))) == number and found, pattern)

    def ranks(self):
        """How many of them live."""
        count = 0
        for process in self.run.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                count += words[1:2] == [SLURM_PY[1]]
        return count

    def gone_after(self, since):
        """Seconds from ``since`` (time.monotonic) until no rank lives."""
        while self.ranks() and time.monotonic() < since + 60:
            time.sleep(0.05)
        return time.monotonic() - since


@pytest.mark.parametrize("kill_on_bad_exit", [("-K",), ()], ids=["-K", "without -K"])
@pytest.mark.parametrize("fault, peers", [("kill", "quiet"), ("raise", "quiet"), ("exit", "talking")])
def test_a_rank_that_fails_ends_all_on_all_hosts(hosts, tmp_path, kill_on_bad_exit, fault, peers):
    started = Started(hosts, tmp_path, *kill_on_bad_exit, fault=fault, peers=peers)
    started.until("failed")
    at = float((tmp_path / "failed").read_text().split()[1])
    seconds = started.gone_after(at)
    ended = started.run.finish()
    print(fault, peers, kill_on_bad_exit, f"{seconds:.2f} s", f"status {ended.status}")
    assert ended.status not in (0, 2), ended
    assert seconds < PROMISED_S, ended
    cause = {"kill": "was killed by SIGKILL", "raise": "failed: ValueError: no such luck", "exit": "ended with exit status 3"}[
        fault
    ]
    assert len(re.findall(rf"^Rank 2 on node2 \(pid \d+\) {cause}", ended.err, re.M)) == 1, ended
    assert "Epoch [5/5]" not in ended.out


def test_ctrl_c_twice_within_a_second(hosts, tmp_path):
    """As srun wants it; the first one alone shows what runs."""
    started = Started(hosts, tmp_path, who=9)
    started.until("quiet-*", 3)
    started.run.interrupt()
    started.run.until(lambda: "one more within 1 sec to abort" in started.run.err, "srun's question")
    assert started.ranks() == 3
    started.run.interrupt()
    seconds = started.gone_after(time.monotonic())
    ended = started.run.finish()
    assert ended.status in (130, 137) and seconds < PROMISED_S, ended  # srun's SIGKILL follows at once
    assert "Traceback" not in ended.err, ended


@pytest.mark.parametrize("what, status", [(("--partition=all",), 143), (("--signal=INT", "--partition=all"), 130)], ids=["", "INT"])
def test_scancel(hosts, tmp_path, what, status):
    """With SIGINT it is what --signal=INT@60 in slurm_job.sh sends before the time limit."""
    started = Started(hosts, tmp_path, who=9)
    started.until("quiet-*", 3)
    asked(hosts, "scancel", *what)
    seconds = started.gone_after(time.monotonic())
    ended = started.run.finish()
    assert ended.status == status and seconds < PROMISED_S, ended
    assert "Traceback" not in ended.err, ended


def test_a_port_that_is_taken(hosts, tmp_path):
    """Another job's, on the node where the ranks would meet."""
    listen = "import socket, time; s = socket.create_server(('', 23456)); open('up', 'w').close(); time.sleep(100)"
    holder = Run(hosts.command("node1", ["python", "-c", listen], cwd=tmp_path), cwd=tmp_path)
    holder.until((tmp_path / "up").exists, "the port")
    ended = on(hosts, "srun", "-K", "-N2", "-n3", *SLURM_PY, *JOB, "--master_port", 23456, "--timeout", 30)
    holder.kill()
    assert ended.status != 0, ended
    assert (
        ended.err.count("error: --master_port 23456: cannot be used here (address already in use); give all ranks another\n") == 1
    )


# ------------------------------------------------------------------------------------------- what does not go, and leftovers


def test_not_under_srun(hosts, tmp_path):
    alone = on(hosts, *SLURM_PY)
    assert alone.status == 2 and alone.out == "", alone
    assert alone.err == "error: SLURM_JOB_ID is not set: srun sets it; type srun -N2 -n4 python launchers/slurm.py\n"
    shell = on(hosts, "salloc", "--quiet", "-N2", "-n2", *SLURM_PY)
    assert shell.status == 2 and re.search(r"^error: not started by srun, though within job \d+: type srun python", shell.err), (
        shell
    )
    assert batch(hosts, f"--output={tmp_path}/out", "--wrap", " ".join(SLURM_PY))[1] == {"2:0"}
    assert re.match(r"error: not started by srun, though within job \d+: type srun python", (tmp_path / "out").read_text())


def test_bad_input_is_told_once(hosts):
    ended = on(hosts, "srun", "-N2", "-n3", *SLURM_PY, "--epochs", "x")
    assert ended.status == 2 and ended.out == "", ended
    assert [row for row in ended.err.splitlines() if not row.startswith("srun: ")] == [
        "error: --epochs x: not allowed; give a whole number, 1 or more"
    ], ended


def test_a_master_that_nobody_knows(hosts):
    """SLURM's names need not be the network's; without this the ranks would look for it for ten minutes."""
    ended = on(hosts, "srun", "-N2", "-n2", *SLURM_PY, *JOB, "--master_addr", "elsewhere")
    assert ended.status == 2 and ended.seconds < 60, ended
    assert ended.err.startswith("error: elsewhere (MASTER_ADDR): no address known on node1 ("), ended


@pytest.mark.parametrize("launcher", ("mpirun -np 2 python launchers/mpi.py", "python launchers/spawn.py --world_size 2"))
def test_other_launchers_in_sallocs_shell(hosts, launcher):
    ended = on(hosts, "salloc", "--quiet", "-N2", "-n2", *launcher.split(), *JOB)
    assert ended.status == 0, ended
    assert set(who(ended)) == {0, 1} and "Epoch [2/2]" in ended.out, ended


def test_a_launcher_that_each_task_starts(hosts):
    """slurm.py within a torchrun within srun; the others' cases are in tests/common/test_nesting_srun.py."""
    ended = on(hosts, "srun", "-N2", "-n2", "torchrun", "--nproc_per_node=2", *SLURM_PY[1:], *JOB)
    assert ended.status == 1 and ended.out == "", ended
    assert "error: slurm.py under torchrun, which srun started: all of its ranks would take the number" in ended.err, ended


NESTED = {
    "spawn": ("python", f"{ROOT}/launchers/spawn.py", "--nproc_per_node", "2"),
    "elastic": ("python", f"{ROOT}/launchers/elastic.py", "--nproc_per_node", "2"),
    "plain": ("python", f"{ROOT}/launchers/plain.py"),
    "torchrun": ("torchrun", "--standalone", "--nproc_per_node=1", f"{ROOT}/launchers/torchrun.py"),
}


@pytest.mark.parametrize("launcher", NESTED)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-N2", "-n4"), "error: srun started {} 4 times, several of them on one node"),
        (("-N2", "-n2"), "error: srun started {} on 2 nodes, and each was told of one node only"),
    ],
    ids=("on one node", "one a node"),
)
def test_launchers_that_each_task_starts_are_noticed(hosts, launcher, flags, said):
    ended = on(hosts, "srun", *flags, *NESTED[launcher], *JOB)
    assert ended.status != 0, ended
    assert ended.err.count(said.format("torchrun" if launcher == "torchrun" else f"{launcher}.py")) == 1, ended
    assert "Epoch" not in ended.out


@pytest.mark.parametrize("launcher", NESTED)
def test_a_launcher_that_srun_starts_once_trains(hosts, launcher):
    ended = on(hosts, "srun", "-n1", *NESTED[launcher], *JOB)
    assert ended.status == 0 and "Epoch" in ended.out, ended


# ------------------------------------------------------------------------------------------------- what a person sees


def test_inspect(hosts, tmp_path):
    ended = on(hosts, "srun", "-N2", "-n3", *SLURM_PY, "--inspect", "--result", tmp_path / "r.json", MY_OWN="mine")
    assert ended.status == 0 and ended.err == "", ended
    ranks = json.loads((tmp_path / "r.json").read_text())["ranks"]
    assert [(r["host"], r["node_rank"], r["local_rank"]) for r in ranks] == [("node1", 0, 0), ("node1", 0, 1), ("node2", 1, 0)]
    assert len({r["master"] for r in ranks}) == 1 and ranks[0]["master"].startswith("node1:")
    for r in ranks:
        assert r["variables"]["SLURM_PROCID"] == str(r["rank"]) and "MY_OWN" not in r["variables"]
    heading = "Variables that the launcher set (new or changed since the command was started; srun's by their names)"
    assert heading in ended.out and re.search(r"^  SLURM_PROCID +0…2, each rank its own$", ended.out, re.M), ended
    assert "all_reduce: right on all 3 ranks" in ended.out


@pytest.mark.parametrize("flags, threads", [(("--cpus-per-task=2",), 2), ((), 1)], ids=str)
def test_threads_as_granted(hosts, tmp_path, flags, threads):
    """SLURM binds no task to its cores here: all cores of the host are to be seen, and only some are for us."""
    ended = on(hosts, "srun", "-N1", "-n1", *flags, *SLURM_PY, "--inspect", "--result", tmp_path / "r.json")
    assert ended.status == 0, ended
    ranks = json.loads((tmp_path / "r.json").read_text())["ranks"]
    assert [r["threads_in_training"] for r in ranks] == [min(threads, len(r["cores"])) for r in ranks]
    assert all(len(r["cores"]) == len(hosts.cores["node1"]) for r in ranks)


def test_ways_that_need_one_machine(hosts):
    flags = ("srun", "-N2", "-n2", *SLURM_PY, *JOB, "--sync")
    auto = on(hosts, *flags, "auto")
    assert auto.status == 0 and "Gradients: ddp (--sync auto: the 2 ranks are on several machines" in auto.out, auto
    refused = on(hosts, *flags, "shared_memory")
    assert refused.status == 2 and "error: --sync shared_memory: the 2 ranks are on several machines" in refused.err, refused
    mpi = on(hosts, *flags, "mpi")
    assert mpi.status == 2 and "error: --sync mpi under slurm.py: its ranks are in no MPI world" in mpi.err, mpi
    here = on(hosts, "srun", "-n2", *SLURM_PY, *JOB, "--sync", "auto")
    assert here.status == 0 and "Gradients: shared_memory (--sync auto: all ranks are on this machine)" in here.out, here


# --------------------------------------------------------------------------------------------------- the cluster's own


def test_the_command_and_what_it_leaves(tmp_path):
    """A job that is still running when the cluster ends is ended with it."""
    submit = "sbatch --quiet --output=/dev/null -N2 -n2 --wrap 'srun sleep 600'"
    script = f"{submit} && srun -n1 hostname && sleep 1 && squeue --noheader --format=%t"
    words = ["python", "-m", "common.virtual_cluster", "--nodes", "2", "--slurm", "--", f"test {{rank}} = 1 || {{ {script}; }}"]
    ended = run(words, cwd=ROOT)  # which looks for processes left
    assert ended.status == 0, ended
    assert "node1" in ended.out and re.search(r"R$", ended.out.strip()), ended


ROOTLESS = """
from common.virtual_cluster import VirtualCluster
with VirtualCluster(2, slurm=True) as cluster:
    ended = cluster.run(["srun", "-N2", "-n2", "sh", "-c", "id -u; hostname"], on="node1")["node1"]
    print(sorted(ended.stdout.split()), ended.returncode, ended.stderr)
"""


def test_an_ordinary_user_has_slurm_too(tmp_path):
    ended = run(as_learner(tmp_path, ROOTLESS))
    assert ended.status == 0 and ended.out == "['12345', '12345', 'node1', 'node2'] 0 \n", ended


def test_what_lacks_is_named(monkeypatch):
    from common import namespaces, virtual_cluster

    found = namespaces.program
    monkeypatch.setattr(virtual_cluster, "program", lambda name: None if name in ("munged", "srun") else found(name))
    assert virtual_cluster.missing(slurm=True) == "a virtual cluster needs munge, slurm-wlm: apt install munge slurm-wlm"
