"""The commands as README has them, from the repository's root, and what a person sees; ways to form a group."""

import functools
import json
import re
import socket

import pytest
from running import ALL, FORKED, HERE, MPIS, ROOT, Run, command, run

from common.warm import default_start_method

pytestmark = pytest.mark.launch

HOST = socket.gethostname()
README = {
    "plain": ("python launchers/plain.py", 1),
    "spawn": ("python launchers/spawn.py --world_size 2", 2),
    "elastic": ("python launchers/elastic.py --nproc_per_node 2", 2),
    "torchrun": ("torchrun --nproc_per_node=2 launchers/torchrun.py", 2),
    "mpi": ("mpirun -np 4 python launchers/mpi.py", 4),
}
SHORT = ("--job", "random", "--epochs", 2, "--data_size", 128)
NUMBER = r"\d+\.\d+"


def without_torchruns_notice(text):
    """Stderr less torchrun's words about OMP_NUM_THREADS."""
    return "".join(row for row in text.splitlines(True) if not re.match(r"W\d+ .*torch/distributed/run\.py:\d+\]", row))


@functools.cache
def as_in_readme(launcher):
    """Nothing added, from the repository's root."""
    ended = run(README[launcher][0].split(), limit=280, PYTHONWARNINGS="always")
    assert ended.status == 0, str(ended)
    return ended


def epochs_of(ended):
    """(epoch, epochs, accuracy) of each epoch's line."""
    pattern = rf"^Epoch \[(\d+)/(\d+)\] - Train Loss: {NUMBER}, Eval Loss: {NUMBER}, Eval Accuracy: ({NUMBER}) %$"
    return re.findall(pattern, ended.out, re.MULTILINE)


@pytest.mark.parametrize("launcher", README)
def test_the_default_job_learns_the_digits(launcher):
    epochs = epochs_of(as_in_readme(launcher))
    assert float(epochs[-1][2]) > 97.0, f"test accuracy per epoch: {[accuracy for _, _, accuracy in epochs]}"


@pytest.mark.parametrize("launcher", README)
def test_readme(launcher):
    world_size = README[launcher][1]
    ended = as_in_readme(launcher)
    assert without_torchruns_notice(ended.err) == "", str(ended)
    for rank in range(world_size):
        here = f"[Rank {rank}] Process initialized on {HOST}, local_rank: {rank}, world_size: {world_size}\n"
        assert ended.out.count(here) == 1, str(ended)
    assert ended.out.count("Process initialized") == world_size
    title = f"{launcher} ({default_start_method()})" if launcher in FORKED else launcher
    assert ended.out.count(f"Launcher {title}: {world_size} rank") == 1
    assert "Job digits: model cnn, data digits, " in ended.out
    assert re.search(r"hidden +Linear +128×3136, 128 +401,536\n", ended.out), str(ended)
    assert re.search(r"parameters +421,642\n", ended.out), str(ended)
    epochs = epochs_of(ended)
    assert [int(number) for number, _, _ in epochs] == list(range(1, int(epochs[0][1]) + 1)), str(ended)
    total = rf"^Total time: {NUMBER} s .*, average time per epoch: {NUMBER} s, [\d,]+ samples/s$"
    assert len(re.findall(total, ended.out, re.MULTILINE)) == 1, str(ended)


@pytest.mark.parametrize("mpi", MPIS)
def test_other_mpis_say_the_same(mpi):
    ended = run(command(mpi, 2, *SHORT))
    assert ended.status == 0, str(ended)
    assert ended.out.count("world_size: 2") == 2 and ended.out.count("Epoch [") == 2, str(ended)


@pytest.mark.parametrize("launcher", ALL)
def test_only_the_first_rank_prints(tmp_path, launcher):
    ended = run(command(launcher, 3, *SHORT, "--log_every", 1), cwd=tmp_path, PYTHONWARNINGS="always")
    assert ended.status == 0, str(ended)
    assert without_torchruns_notice(ended.err) == "", str(ended)
    rows = [row for row in ended.out.splitlines() if row.startswith("[Rank")]
    assert sorted(rows) == [f"[Rank {r}] Process initialized on {HOST}, local_rank: {r}, world_size: 3" for r in range(3)]
    steps = re.findall(rf"^Epoch \[(\d)/2\] Step \[(\d)/2\] - Local Loss: {NUMBER}$", ended.out, re.MULTILINE)
    assert steps == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")], str(ended)
    assert len(re.findall(r"^Epoch \[\d/2\] - Train Loss", ended.out, re.MULTILINE)) == 2, str(ended)


@pytest.mark.parametrize("launcher", ALL)
def test_all_ranks_print(tmp_path, launcher):
    ended = run(command(launcher, 2, *SHORT, "--log-all-ranks", "--log_every=2"), cwd=tmp_path)
    assert ended.status == 0, str(ended)
    assert all(re.match(r"\[Rank [01]\] ", row) for row in ended.out.splitlines()), str(ended)
    for rank in (0, 1):
        mine = [row for row in ended.out.splitlines() if row.startswith(f"[Rank {rank}] Epoch")]
        steps = [row for row in mine if "Local Loss" in row]
        assert len(mine) == 4 and len(steps) == 2 and all("Step [2/2]" in row for row in steps), str(ended)
    losses = [sorted(re.findall(rf"\[Rank {r}\] (Epoch .* - Train Loss.*)", ended.out)) for r in (0, 1)]
    assert losses[0] == losses[1], "the losses of the group are the same on every rank"
    local = [re.findall(rf"\[Rank {r}\] .*Local Loss: (.*)", ended.out) for r in (0, 1)]
    assert local[0] != local[1], "each rank has its own samples"


@pytest.mark.parametrize("launcher", ALL)
def test_help(launcher):
    ended = run(["python", f"launchers/{launcher}.py", "--help"])
    assert (ended.status, ended.err) == (0, ""), str(ended)
    titles = re.findall(r"^(\S.*):$", ended.out, re.MULTILINE)
    assert titles.index("what to train (the common flags)") < titles.index("parts of the job") < titles.index("machine")
    assert ("--world_size N" in ended.out) == (launcher in ("plain", "spawn"))
    assert ("--start_method" in ended.out) == (launcher in FORKED)
    assert ("--max_restarts" in ended.out) == (launcher == "elastic")


# ----------------------------------------------------------------------------------------------- forming a group


def by_hand(tmp_path, environment, *flags):
    """Two shells' worth of ranks."""
    words = ["python", str(ROOT / "launchers/plain.py"), *map(str, (*SHORT, *flags))]
    return [Run(words, cwd=tmp_path, **(environment | {"RANK": rank, "WORLD_SIZE": 2})) for rank in (0, 1)]


def test_a_group_started_by_hand(tmp_path, free_port):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    first, second = (each.finish() for each in by_hand(tmp_path, environment))
    assert (first.status, second.status, first.err + second.err) == (0, 0, ""), f"{first}\n{second}"
    assert second.out == f"[Rank 1] Process initialized on {HOST}, local_rank: 1, world_size: 2\n"
    assert "Epoch [2/2]" in first.out


def test_address_and_port_from_dotenv(tmp_path, free_port):
    (tmp_path / ".env").write_text(f"# where we meet\nMASTER_ADDR=127.0.0.1\nexport MASTER_PORT='{free_port}'\nEPOCHS=7\n")
    first, second = (each.finish() for each in by_hand(tmp_path, {}))
    assert (first.status, second.status) == (0, 0), f"{first}\n{second}"
    assert "Epoch [2/2]" in first.out, "a flag outranks .env"


@pytest.mark.parametrize("launcher", ALL)
def test_dotenv_is_read_by_every_launcher(tmp_path, launcher, free_port):
    """MASTER_ADDR and MASTER_PORT alone are fine: they are used where a group is formed."""
    (tmp_path / ".env").write_text(f"MASTER_ADDR=127.0.0.1\nMASTER_PORT={free_port}\nEPOCHS=3\nJOB=random\nBACKEND=gloo\n")
    ended = run(command(launcher, 2, "--data_size", 128), cwd=tmp_path)
    assert ended.status == 0, str(ended)
    assert "Epoch [3/3]" in ended.out and "2 ranks on 1 node, cpu, gloo" in ended.out, str(ended)


def test_a_process_on_its_own_ignores_an_address(tmp_path):
    ended = run(command("plain", 1, *SHORT), cwd=tmp_path, MASTER_ADDR="nowhere.invalid", MASTER_PORT=1)
    assert ended.status == 0, str(ended)
    assert "no process group" in ended.out


@pytest.mark.parametrize("launcher", ALL)
def test_two_runs_at_the_same_time(tmp_path, launcher):
    both = [Run(command(launcher, 2, *SHORT), cwd=tmp_path) for _ in range(2)]
    for each in both:
        ended = each.finish()
        assert ended.status == 0, str(ended)
        assert ended.out.count("Process initialized") == 2 and "Epoch [2/2]" in ended.out, str(ended)


@pytest.mark.parametrize("launcher", ("plain", "spawn", "mpi", "elastic"))
def test_a_port_that_is_taken(tmp_path, launcher):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run(command(launcher, 2, *SHORT, "--master_port", port), cwd=tmp_path)
    assert ended.status == 2, str(ended)
    said = f"error: --master_port {port}: cannot be used here (Address already in use); give another, or 0 for a free one"
    assert [row for row in ended.err.splitlines() if row.startswith("error")] == [said], str(ended)
    assert "Process initialized" not in ended.out


def test_a_port_that_is_taken_under_a_group_started_by_hand(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2}
        ended = run(["python", str(ROOT / "launchers/plain.py"), *map(str, SHORT)], cwd=tmp_path, **environment)
    assert ended.status == 2, str(ended)
    assert re.fullmatch(rf"error: --master_port {port}: cannot be used here .*\n", ended.err), str(ended)


@pytest.mark.parametrize("launcher", ("plain", "spawn", "mpi", "elastic"))
def test_a_port_that_is_named_is_used(tmp_path, launcher, free_port):
    from running import is_listening

    each = Run(command(launcher, 2, *SHORT, "--epochs", 100_000, "--master_port", free_port), cwd=tmp_path)
    each.until(lambda: "Epoch [1/" in each.out, "the first epoch")
    assert is_listening(free_port)
    each.interrupt()
    each.finish()


@pytest.mark.parametrize("order", ((0, 1), (1, 0)))
@pytest.mark.parametrize("launcher", ("plain", "spawn"))
def test_two_nodes(tmp_path, launcher, order, free_port):
    """Both nodes are this machine; whichever starts first waits for the other."""
    nodes = {}
    for node in order:
        flags = (
            "--nnodes",
            2,
            "--node_rank",
            node,
            "--nproc_per_node",
            2,
            "--master_addr",
            HERE,
            "--master_port",
            free_port,
        )
        result = ("--result", f"node{node}.json")
        words = ["python", str(ROOT / "launchers" / f"{launcher}.py"), *map(str, (*SHORT, *flags, *result))]
        nodes[node] = Run(words, cwd=tmp_path)
        if len(nodes) == 1:
            nodes[node].until(lambda run=nodes[node]: len(run.processes()) >= 3, "this node's processes")
    first, second = (nodes[node].finish() for node in (0, 1))
    assert (first.status, second.status, first.err, second.err) == (0, 0, "", ""), f"{first}\n{second}"
    for node, ended in enumerate((first, second)):
        for local in (0, 1):
            rank = 2 * node + local
            here = f"[Rank {rank}] Process initialized on {HOST}, local_rank: {local}, world_size: 4\n"
            assert ended.out.count(here) == 1, str(ended)
        assert "Epoch [2/2] - Train Loss" in ended.out, "each node's first rank prints the losses"
    assert "4 ranks on 2 nodes" in first.out
    assert json.loads((tmp_path / "node0.json").read_text())["world_size"] == 4
    assert not (tmp_path / "node1.json").exists(), "only rank 0 writes"
