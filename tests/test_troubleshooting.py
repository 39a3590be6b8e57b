"""README's table "When something goes wrong": each thing is really broken, and LaunchLab says what stands there.

What LaunchLab's design prevents is shown by the test that is named for it.
"""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "launchers")]

import running  # noqa: E402

from common.ports import PortReservation  # noqa: E402


@dataclass(frozen=True)
class Symptom:
    """A row of the table."""

    sees: str
    """How its first column begins."""
    says: tuple[str, ...]
    """Parts of its last column: what LaunchLab says, or why there is nothing to do."""
    shown_by: tuple[str, ...] = ()
    """The tests that break it, or that show that it cannot happen; none: ``test_<id>`` below."""


SYMPTOMS = {
    "port_taken": Symptom(
        "address already in use, port 29500",
        ("cannot be used here (Address already in use); give another, or 0 for a free one", "is taken by"),
    ),
    "loopback_name": Symptom(
        "gloo: connection refused 127.0.0.1",
        ("bare torchrun with gloo hangs over several machines (connection refused 127.0.0.1)", "export GLOO_SOCKET_IFNAME=eth0"),
        ("common/test_doctor.py::test_the_own_name",
         "launchers/test_doctor_hosts.py::test_a_name_that_is_loopback_and_a_slow_link"),
    ),
    "missing_rank": Symptom(
        "it waits and then times out",
        ("did not arrive within", "started at all, and with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?"),
    ),
    "nested": Symptom(
        "the same, with a launcher inside another one",
        ("spawn.py under torchrun, which started 2 processes: each would start ranks of its own",),
    ),
    "wrong_endpoint": Symptom("the store times out", ("is rank 0 started, and is this its address and port?",)),
    "firewall": Symptom(
        "ssh works, and the run never starts",
        ("a firewall may be in between: python -m common.doctor --hosts hosts.txt",),
    ),
    "firewall_between_hosts": Symptom(
        "ssh works, and the run never starts",
        ("gets through: a firewall is in between",),
        ("launchers/test_doctor_hosts.py::test_a_firewall_on_one_host",),
    ),
    "more_ports": Symptom(
        "port 29500 is open, and ranks still do not meet",
        ("gloo and NCCL need more ports than 29500",),
        ("launchers/test_doctor_hosts.py::test_one_direction_one_port_and_a_name", "common/test_doctor.py::test_a_real_firewall"),
    ),
    "loopback_master": Symptom(
        "each node is a world of its own",
        ("--master_addr 127.0.0.1 (or MASTER_ADDR) with --nnodes 2: to each node that is the node itself",),
    ),
    "local_rank_flag": Symptom("unrecognized arguments: --local-rank", ("takes it, in both spellings",)),
    "duplicate_gpu": Symptom(
        "Duplicate GPU detected",
        ("NCCL needs a GPU for each rank",),
        ("common/test_doctor.py::test_gpus", "common/test_data_and_models.py::test_too_few_gpus_are_refused"),
    ),
    "barrier_devices": Symptom("barrier: devices used by this process", ("it is told as the group is joined (`device_id`)",)),
    "same_order": Symptom(
        "the same order of samples in every epoch",
        ("each epoch has an order of its own",),
        ("common/test_sampling.py::test_epochs_and_seeds_have_orders_of_their_own_and_the_same_ones_repeat",),
    ),
    "uneven_inputs": Symptom(
        "a hang at the end of an epoch",
        ("all make equal steps; with `--sampler uneven` PyTorch's `Join`",),
        ("launchers/test_computing_runs.py::test_uneven_ranks_see_every_sample_once_and_end_equal",
         "common/test_sampling.py::test_all_ranks_take_the_same_steps_of_the_same_passes"),
    ),
    "padded_evaluation": Symptom(
        "the evaluation depends on the number of ranks",
        ("each sample is evaluated once",),
        ("common/test_data_and_models.py::test_ranks_together_evaluate_each_sample_once",),
    ),
    "printed_loss": Symptom(
        "the printed loss is not the batch's",
        ("sums and counts are reduced together",),
        ("launchers/test_parity.py::test_whole_curve_in_fp64",),
    ),
    "accumulation": Symptom(
        "accumulation gives slightly other gradients",
        ("`--accumulate` has it inside",),
        ("launchers/test_parity.py::test_accumulation_is_one_pass",),
    ),
    "unused_parameters": Symptom(
        "Expected to have finished reduction",
        ("the model has parameters that this step did not use, and DDP waits for their gradients; give --find_unused_parameters",),
    ),
    "validation_on_rank_0": Symptom("validation on rank 0 alone hangs", ("every rank evaluates its part on the bare module",)),
    "download_race": Symptom(
        "the data set is corrupt",
        ("one rank of a node fetches and decodes it under a lock, the others wait",),
        ("launchers/test_jobs.py::test_one_rank_decodes_and_says_so", "common/test_hub.py::test_of_several_processes_one_decodes"),
    ),
    "not_fetched": Symptom(
        "MNIST or CIFAR-10 cannot be fetched",
        ("cannot be fetched", "--local-dir DIR, then here --data_dir DIR"),
        ("launchers/test_jobs.py::test_no_network_is_told_once",),
    ),
    "accelerate_alone": Symptom(
        "accelerate launch trains on one process",
        ("accelerate launch --num_processes 2 has started one process, which is all it does on CPU",),
        ("launchers/test_hf_trainer.py::test_an_accelerate_that_starts_one_process_is_noticed",),
    ),
    "one_core": Symptom("mpirun is slow", ("the others stay idle; mpirun --bind-to none leaves all",)),
    "foreign_mpirun": Symptom(
        "mpirun starts N ranks 0 of 1",
        ("does not fit mpi4py, which loads",),
        ("common/test_doctor.py::test_an_mpirun_that_does_not_fit_mpi4py",),
    ),
    "mpi_exception": Symptom(
        "an exception under mpirun hangs",
        ("the rank is named, and all are gone within five seconds",),
        ("launchers/test_endings.py::test_a_failing_rank_ends_all",),
    ),
    "main_guard": Symptom(
        "An attempt has been made to start a new process",
        ("starts ranks as soon as it is imported, and each rank imports it: put the call of spawn.py under "
         'if __name__ == "__main__":',),
    ),
    "notebook_class": Symptom(
        "Can't pickle",
        ("ranks cannot import what a notebook's cell or a script has defined; write the class into a file (in a notebook: "
         "%%writefile my_module.py)",),
    ),
    "fork_after_backward": Symptom(
        "ranks that were forked hang",
        ("they do not survive a fork, and after a backward pass the ranks would wait for them for ever; give --start_method "
         "forkserver or spawn",),
    ),
    "workers_restarted": Symptom("seconds are lost at every epoch's start", ("data are indexed by the batch, without workers",)),
    "orphans": Symptom(
        "processes train on after the launcher was killed",
        ("of a run whose launcher is gone",),
        ("common/test_doctor.py::test_a_rank_whose_launcher_is_gone",
         "launchers/test_endings.py::test_a_killed_launcher_takes_its_ranks_along"),
    ),
    "small_shm": Symptom(
        "Bus error, no space left on /dev/shm",
        ("too small for NCCL and for DataLoader workers (Bus error)", "docker run --shm-size=1g"),
        ("common/test_doctor.py::test_a_shared_memory_that_is_too_small",),
    ),
    "module_prefix": Symptom(
        "`module.` before every name",
        ("the bare module is saved",),
        ("common/test_data_and_models.py::test_a_saved_model_loads_with_weights_only",),
    ),
    "batchnorm": Symptom(
        "BatchNorm: N ranks",
        ("normalises each rank's part of a batch by itself", "give --sync_batchnorm (CUDA), or take GroupNorm or LayerNorm"),
    ),
    "slower_than_one": Symptom(
        "DDP is slower than one process",
        ("Communication takes longer than computing, so more ranks may be slower than one process",),
    ),
    "unequal_hosts": Symptom(
        "ranks crash, or differ, on one host only",
        ("differs:", "./setup.sh --multi-node"),
        ("launchers/test_doctor_hosts.py::test_another_python_and_another_clock",),
    ),
    "clocks": Symptom(
        "torchrun drops a node",
        ("clocks differ",),
        ("launchers/test_doctor_hosts.py::test_another_python_and_another_clock",),
    ),
    "waiting": Symptom(
        "it stands still after the first lines",
        ("waits for rank 1 (up to 600 s, --timeout)",),
        ("launchers/test_nodes.py::test_a_node_that_comes_first_waits_and_says_for_whom",),
    ),
    "cut_cable": Symptom(
        "a host crashed, or a cable was pulled",
        ("has not answered for 20 s (the host is down, or the network between is cut)",),
        ("launchers/test_nodes.py::test_a_cut_cable_is_noticed_on_both_sides",
         "launchers/test_nodes.py::test_a_host_that_dies_is_named_and_the_other_node_ends"),
    ),
    "same_node_twice": Symptom(
        "two nodes think that they are the same",
        ("is there twice",),
        ("launchers/test_interface_hosts.py::test_the_same_node_twice",),
    ),
    "ssh_key": Symptom(
        "ssh.py: Permission denied",
        ("it lets in none of the keys offered",),
        ("launchers/test_ssh.py::test_all_problems_of_all_hosts_are_told_at_once",
         "common/test_hosts.py::test_what_ssh_says_and_what_to_do"),
    ),
    "ssh_lost": Symptom(
        "ssh.py ends though nothing failed",
        ("the connection is lost, or its guard was killed",),
        ("launchers/test_ssh.py::test_a_link_that_is_cut", "launchers/test_ssh.py::test_an_agent_or_a_guard_that_is_killed"),
    ),
    "srun_of_others": Symptom(
        "srun started every task as a run of its own",
        ("srun started spawn.py 4 times, several of them on one node",),
        ("launchers/test_slurm.py::test_launchers_that_each_task_starts_are_noticed",),
    ),
    "no_srun": Symptom(
        "slurm.py in an sbatch script",
        ("not started by srun, though within job 7: type srun python launchers/slurm.py",),
        ("launchers/test_slurm.py::test_not_under_srun",),
    ),
    "mounted_folder": Symptom(
        "the model is not in the mounted folder",
        ("/out belongs to user 0:0 and cannot be written",),
        ("launchers/test_containers.py::test_a_folder_that_rank_0_cannot_write_to_is_named",),
    ),
    "container_names": Symptom(
        "a container does not find rank 0",
        ("rank 0 does not reach itself at",),
        ("launchers/test_containers.py::test_rank_0_on_a_network_without_names_is_told",),
    ),
}  # fmt: skip

launch = pytest.mark.launch
nothing_left_behind = running.nothing_left_behind  # after every test here, too


# ------------------------------------------------------------------------------------------------------ the table


def rows():
    """README's rows: (what you see, why, what to do), as they are read."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## When something goes wrong")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("| ")]
    return [[cell.replace("\\_", "_") for cell in row] for row in cells[1:]]


@pytest.mark.parametrize("name", SYMPTOMS)
def test_the_row_says_what_launchlab_says(name):
    symptom = SYMPTOMS[name]
    found = [row for row in rows() if row[0].startswith(symptom.sees)]
    assert len(found) == 1 and len(found[0]) == 3, (symptom.sees, found)
    text = found[0][2].replace("*", "")
    for words in symptom.says:
        assert words in text, (words, text)


def test_no_row_is_without_a_test():
    assert [row[0] for row in rows() if not any(row[0].startswith(s.sees) for s in SYMPTOMS.values())] == []


@pytest.mark.parametrize("name", SYMPTOMS)
def test_the_tests_are_there(name):
    here = Path(__file__)
    for place in SYMPTOMS[name].shown_by or (f"{here.name}::test_{name}",):
        file, _, test = place.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


def test_what_other_tests_show_they_show_with_these_words():
    """The program's texts are in its source, where a test elsewhere looks for them; whoever changes one changes the other."""
    source = " ".join((ROOT / "common" / file.name).read_text(encoding="utf-8") for file in (ROOT / "common").glob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    for name in ("loopback_name", "firewall_between_hosts", "duplicate_gpu", "foreign_mpirun", "orphans", "clocks"):
        words = SYMPTOMS[name].says[0]
        assert words in source, words


# ------------------------------------------------------------------------------------------------- breaking things


SMALL = ("--job", "random", "--data_size", "128", "--epochs", "2")


def launcher(name, *flags):
    return ["python", str(ROOT / "launchers" / f"{name}.py"), *map(str, flags)]


def says(name, ended, status=None):
    """What was run said what the table promises."""
    text = ended.out + ended.err
    for words in SYMPTOMS[name].says:
        assert words in text, f"{words}\nnot in\n{ended}"
    assert status is None or ended.status == status, ended
    assert not running.tracebacks_of_ours(ended), ended
    return text


@launch
def test_port_taken(tmp_path):
    import socket

    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ended = running.run(launcher("spawn", "--world_size", 2, "--master_port", port, *SMALL), tmp_path)
        assert ended.status == 2 and SYMPTOMS["port_taken"].says[0] in ended.err, ended
        words = ["python", "-m", "common.doctor", "--only", "port"]
        told = running.run(words, ROOT, MASTER_PORT=port)
        assert told.status == 1 and f"{port} is taken by" in told.out and "export MASTER_PORT=" in told.out, told


@launch
def test_missing_rank(tmp_path):
    with PortReservation(0) as port:
        told = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        says("missing_rank", running.run(launcher("plain", "--timeout", 2, *SMALL), tmp_path, **told), 1)


@launch
def test_nested(tmp_path):
    words = ["torchrun", "--nproc_per_node=2", str(ROOT / "launchers" / "spawn.py"), "--world_size", "2", *SMALL]
    ended = running.run(words, tmp_path)
    assert ended.status and SYMPTOMS["nested"].says[0] in ended.err, ended


@launch
def test_wrong_endpoint(tmp_path):
    with PortReservation(0) as port:
        told = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = running.run(launcher("plain", "--timeout", 2, *SMALL), tmp_path, **told)
    says("wrong_endpoint", ended, 1)
    assert "firewall" not in ended.err  # whose port is closed has answered


@launch
@pytest.mark.only_on("linux")
def test_firewall(tmp_path):
    """Between two hosts, where packets to the port vanish."""
    with running.cluster(2) as hosts:
        drop = hosts.run(["sh", "-c", "PATH=$PATH:/usr/sbin:/sbin iptables -A INPUT -p tcp --dport 29500 -j DROP"], on="node1")
        assert drop["node1"].returncode == 0, drop
        flags = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "node1", "--timeout", 3, *SMALL)
        ended = running.run(hosts.command("node2", launcher("plain", "--node_rank", 1, *flags), cwd=tmp_path))
    says("firewall", ended, 1)


@launch
def test_loopback_master(tmp_path):
    flags = ("--nnodes", 2, "--node_rank", 1, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", *SMALL)
    for name in ("plain", "spawn"):
        says("loopback_master", running.run(launcher(name, *flags), tmp_path), 2)


@launch
@pytest.mark.parametrize("spelling", ("--local-rank", "--local_rank"))
def test_local_rank_flag(tmp_path, spelling):
    """``torch.distributed.launch`` says --local-rank; until torch 1.13 it said --local_rank."""
    ranks = "2 ranks"
    words = ["python", "-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node=2"]
    if spelling == "--local_rank":
        words, ranks = ["torchrun", "--nproc_per_node=1"], "1 rank"
    path = str(ROOT / "launchers" / "torchrun.py")
    ended = running.run([*words, path, *SMALL, *(["--local_rank=0"] if spelling == "--local_rank" else [])], tmp_path)
    assert ended.status == 0 and f"Launcher torchrun: {ranks} " in ended.out, ended


def test_barrier_devices():
    """On a machine without a GPU its source has to do; ``test_a_barrier_under_nccl`` runs it."""
    calls = [n for n in ast.walk(ast.parse((ROOT / "common" / "process_group.py").read_text())) if isinstance(n, ast.Call)]
    joins = [call for call in calls if ast.unparse(call.func).endswith("init_process_group")]
    assert joins and all("device_id" in {k.arg for k in call.keywords} for call in joins)
    set_device = (ROOT / "common" / "device.py").read_text()
    assert "torch.cuda.set_device(device)" in set_device


@launch
@pytest.mark.gpu
def test_a_barrier_under_nccl(tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    ended = running.run(["torchrun", "--nproc_per_node=1", str(ROOT / "launchers" / "torchrun.py"), "--inspect"], tmp_path)
    assert ended.status == 0 and "nccl" in ended.out and "currently unknown" not in ended.out + ended.err, ended


MODULE = """
import torch

class Unused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(20, 2), torch.nn.Linear(20, 2)

    def forward(self, x):
        return self.a(x)

class Normal(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)

class OneToEvaluate(torch.utils.data.Dataset):
    def __init__(self, train=True):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(128 if train else 1, 20, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        return self.x[number], self.y[number]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(MODULE)
    return tmp_path


@launch
def test_unused_parameters(own):
    flags = ("--world_size", 2, "--model", "own:Unused", "--dataset", "random", "--data_size", 128, "--epochs", 2)
    says("unused_parameters", running.run(launcher("spawn", *flags), own), 1)
    mended = running.run(launcher("spawn", *flags, "--find_unused_parameters"), own)
    assert mended.status == 0, mended


@launch
def test_validation_on_rank_0(own):
    """One sample to evaluate: rank 0 has it, rank 1 nothing, and nobody waits for anybody."""
    flags = ("--world_size", 2, "--model", "linear", "--dataset", "own:OneToEvaluate", "--epochs", 2, "--timeout", 20)
    ended = running.run(launcher("spawn", *flags), own)
    assert ended.status == 0 and ended.out.count("Eval Loss") == 2, ended


@launch
@pytest.mark.only_on("linux")
def test_one_core(tmp_path):
    import os

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot be bound to fewer")
    words = ["mpirun", "-np", "1", "python", str(ROOT / "launchers" / "mpi.py"), *SMALL]
    bound = running.run(words, tmp_path, HYDRA_BINDING="core")
    assert "Cores: the launcher has bound this rank to 1 of" in says("one_core", bound, 0)
    free = running.run(words, tmp_path)
    assert free.status == 0 and "stay idle" not in free.out, free


@launch
@pytest.mark.only_on("linux")
@pytest.mark.parametrize("method", ("spawn", "forkserver"))
def test_main_guard(tmp_path, method):
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom launchers import spawn\n"
    script += f"sys.argv = ['spawn.py', '--world_size', '2', '--start_method', '{method}', *{SMALL!r}]\n"
    (tmp_path / "mine.py").write_text(script + "sys.exit(spawn.main())\n")
    ended = running.run(["python", "mine.py"], tmp_path)
    assert "mine.py starts ranks as soon as" in says("main_guard", ended) and ended.status, ended
    assert ended.err.count("starts ranks as soon as") == 1 and "Traceback" not in ended.err, ended
    (tmp_path / "mine.py").write_text(script + "if __name__ == '__main__':\n    sys.exit(spawn.main())\n")
    assert running.run(["python", "mine.py"], tmp_path).status == 0


@launch
def test_notebook_class(tmp_path):
    for flag in ("--model", "--dataset"):
        says("notebook_class", running.run(launcher("spawn", "--world_size", 2, flag, "__main__:Net"), tmp_path), 2)


@launch
@pytest.mark.only_on("linux")
def test_fork_after_backward(tmp_path):
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\ntorch.set_num_threads(2)\n"
    script += "layer = torch.nn.Linear(1000, 1000)\nlayer(torch.randn(512, 1000)).sum().backward()\n"
    script += "from common.errors import exit_status\nfrom launchers import spawn\n"
    script += f"sys.argv = ['spawn.py', '--world_size', '2', '--start_method', sys.argv[1], *{SMALL!r}]\n"
    (tmp_path / "mine.py").write_text(script + "if __name__ == '__main__':\n    sys.exit(exit_status(spawn.main))\n")
    says("fork_after_backward", running.run(["python", "mine.py", "fork"], tmp_path), 2)
    assert running.run(["python", "mine.py", "forkserver"], tmp_path).status == 0


def test_workers_restarted():
    for path in [*(ROOT / "common").glob("*.py"), *(ROOT / "launchers").glob("*.py")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if ast.unparse(c.func).split(".")[-1] == "DataLoader"], path.name


@launch
def test_batchnorm(own):
    flags = ("--world_size", 2, "--model", "own:Normal", "--dataset", "random", "--data_size", 128, "--epochs", 1)
    says("batchnorm", running.run(launcher("spawn", *flags), own), 0)
    alone = running.run(launcher("plain", *flags[2:]), own)
    assert alone.status == 0 and "BatchNorm1d normalises" not in alone.out, alone


@launch
def test_slower_than_one(tmp_path):
    flags = ("--world_size", 2, "--job", "random", "--data_size", 4096, "--epochs", 4, "--sync", "by_hand", "--step_times")
    says("slower_than_one", running.run(launcher("spawn", *flags), tmp_path), 0)
