"""The jobs with data from files: one process's curve under every launcher, data made ready once, what they save and say."""

import functools
import json
import math
import os
import re

import pytest
import torch
from running import ALL, ROOT, Run, cluster, command, run, trained
from test_parity import difference

from common import text
from tests.common import hub_files

pytestmark = pytest.mark.launch

# Batches that no number of ranks divides; the last one of an epoch is smaller still.
JOBS = {
    "mnist": ("--epochs", 2, "--global_batch_size", 41),
    "cifar10": ("--epochs", 3, "--global_batch_size", 41, "--save", "none"),
    "text": ("--epochs", 2, "--global_batch_size", 17, "--data_size", 100, "--layers", 2, "--width", 32, "--context", 32,
             "--warmup", 3, "--clip", 0.5),
}  # fmt: skip
QUICK = ("--epochs", 1, "--threads", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Parquet files of pictures, a text, and where they are kept."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("mnist", "cifar10"):
        hub_files.write(folder / name, name, train=300, test=60)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_bytes((ROOT / "README.md").read_bytes())
    return folder


@pytest.fixture(scope="module")
def flags(files):
    """The flags of a job."""
    return lambda job: ("--job", job, "--data_dir", files / job, "--cache_dir", files / "kept")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, flags):
    """What one process computes."""

    @functools.cache
    def get(job, *more):
        file = tmp_path_factory.mktemp("alone") / "result.json"
        return trained(command("plain", 1, *flags(job), *JOBS[job], "--precision", "fp64", "--threads", 1, *more), file)

    return get


def same(one, many):
    for curve in ("loss_per_step", "train_loss_per_epoch", "eval_loss_per_epoch"):
        assert difference(many[curve], one[curve]) < 1e-9, curve
    assert many["eval_accuracy"] == one["eval_accuracy"]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("launcher", "world_size"), [(name, 2 + (k % 2)) for k, name in enumerate(ALL)])
def test_the_curve_is_one_process_s(tmp_path, flags, alone, job, launcher, world_size):
    words = command(launcher, world_size, *flags(job), *JOBS[job], "--precision", "fp64", "--threads", 1)
    same(alone(job), trained(words, tmp_path / "result.json"))


@pytest.mark.parametrize("more", [("--accumulate", 3), ("--sync", "by_hand_flat"), ("--sync", "shared_memory"), ("--clip", 0)])
def test_clipping_is_right_however_gradients_become_one(tmp_path, flags, alone, more):
    """Clipped at 0.5 most steps of this training are, so a wrong length shows at once."""
    sgd = ("--optimizer", "sgd", "--lr", 0.3)  # AdamW does as much with a gradient of any length
    words = command("spawn", 2, *flags("text"), *JOBS["text"], *sgd, "--precision", "fp64", "--threads", 1, *more)
    many = trained(words, tmp_path / "result.json")
    free = alone("text", *sgd, "--clip", 0)
    if more[0] == "--clip":
        return same(free, many)
    same(alone("text", *sgd), many)
    assert difference(many["loss_per_step"], free["loss_per_step"]) > 1e-3


def test_pictures_are_learnt(tmp_path, flags):
    result = trained(command("spawn", 2, *flags("mnist"), "--epochs", 8, "--threads", 1), tmp_path / "result.json")
    assert result["eval_accuracy"][-1] > 0.9


# ----------------------------------------------------------------------------------------------------- data made ready


@pytest.mark.parametrize("launcher", ALL)
def test_one_rank_decodes_and_says_so(tmp_path, files, launcher):
    words = ("--job", "mnist", "--data_dir", files / "mnist", "--cache_dir", tmp_path / "kept", *QUICK)
    for times in (1, 0):
        ended = run(command(launcher, 3, *words))
        assert ended.status == 0, ended
        assert ended.out.count("Decoded 300 train pictures") == times, ended


@pytest.mark.parametrize("launcher", ALL)
def test_no_network_is_told_once(tmp_path, launcher):
    words = command(launcher, 2, "--job", "mnist", "--cache_dir", tmp_path / "kept", *QUICK)
    ended = run(words, HF_HUB_OFFLINE=1, HF_HOME=tmp_path / "hf")
    assert ended.status == (1 if launcher == "torchrun" else 2), ended
    assert ended.err.count("error: --job mnist: ylecun/mnist cannot be fetched") == 1, ended
    assert "then here --data_dir DIR" in ended.err


@pytest.fixture(scope="module")
def hosts():
    with cluster(2, ssh=True, slurm=True, cores=2) as made:
        yield made


def on_both(hosts, folder, *flags):
    """What spawn.py does with two ranks on each of two hosts; ``{name}`` in ``flags`` is the host's."""
    runs = []
    for number, name in enumerate(hosts.names):
        words = ["python", ROOT / "launchers/spawn.py", "--nnodes", 2, "--nproc_per_node", 2, "--node_rank", number]
        words += ["--master_addr", hosts.names[0], "--job", "cifar10", *QUICK, "--save", "none", *flags]
        runs.append(Run(hosts.command(name, [str(word).replace("{name}", name) for word in words], cwd=folder), folder))
    return [each.finish() for each in runs]


@pytest.mark.only_on("linux")
@pytest.mark.parametrize("shared", [True, False])
def test_each_node_makes_its_own_ready_unless_they_share_a_folder(hosts, tmp_path, files, shared):
    kept = tmp_path / ("kept" if shared else "kept-{name}")
    ended = on_both(hosts, tmp_path, "--data_dir", files / "cifar10", "--cache_dir", kept)
    assert [each.status for each in ended] == [0, 0], ended
    assert sum(each.out.count("Decoded 300 train pictures") for each in ended) == (1 if shared else 2), ended


@pytest.mark.only_on("linux")
def test_nodes_with_other_data_are_told_so(hosts, tmp_path, files):
    (tmp_path / "node1").symlink_to(files / "cifar10")
    hub_files.write(tmp_path / "node2", "cifar10", train=300, test=60, seed=7)
    ended = on_both(hosts, tmp_path, "--data_dir", tmp_path / "{name}", "--cache_dir", tmp_path / "kept")
    assert [each.status for each in ended] == [2, 2], ended
    said = r"error: rank 2 has data of digest \w+ where rank 0 has \w+; give all nodes the same data$"
    assert all(len(re.findall(said, each.err, re.MULTILINE)) == 1 for each in ended), ended


@pytest.mark.only_on("linux")
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("way", ["slurm", "ssh"])
def test_over_hosts_too_the_curve_is_one_process_s(hosts, tmp_path, flags, alone, way, job):
    (tmp_path / "hosts.txt").write_text("node1 slots=2\nnode2 slots=1\n")
    start = {
        "slurm": ["srun", "-N2", "-n3", "python", ROOT / "launchers/slurm.py"],
        "ssh": ["python", ROOT / "launchers/ssh.py", "--hosts", "hosts.txt"],
    }[way]
    words = [*start, *flags(job), *JOBS[job], "--precision", "fp64", "--threads", 1]
    same(alone(job), trained(hosts.command("node1", list(map(str, words)), cwd=tmp_path), tmp_path / "result.json", cwd=tmp_path))


FLAT = """
import torch

class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classes = torch.nn.Linear(784, 10)

    def forward(self, x):
        return self.classes(x.flatten(1))
"""


@pytest.mark.only_on("linux")
def test_a_node_s_ranks_hold_the_pictures_once(tmp_path, files):
    """60,000 pictures are 47 MB; with a copy in each of eight ranks it would be 376."""
    hub_files.write(tmp_path / "many", "mnist", train=60_000, test=100)
    (tmp_path / "mine.py").write_text(FLAT)
    total = {}
    for folder in (tmp_path / "many", files / "mnist"):
        words = ("--job", "mnist", "--model", "mine:Flat", "--data_dir", folder, "--cache_dir", tmp_path / "kept", *QUICK)
        words = (*words, "--global_batch_size", 300)
        trained(command("plain", 1, *words), tmp_path / "result.json", cwd=tmp_path)  # decodes, and keeps the libraries for that
        result = trained(command("spawn", 8, *words), tmp_path / "result.json", cwd=tmp_path)
        total[folder.name] = sum(result["pss_bytes_per_rank"])
    print(total)
    assert 40e6 < total["many"] - total["mnist"] < 80e6, total


# ------------------------------------------------------------------------------------------------ saved, shown, resumed


@pytest.mark.parametrize("launcher", ALL)
def test_cifar10_saves_its_net_and_trains_on(tmp_path, flags, launcher):
    words = command(launcher, 2, *flags("cifar10"), *QUICK, "--lr", 0.02)
    first = trained(words, tmp_path / "first.json", cwd=tmp_path)
    saved = torch.load(tmp_path / "cifar_net.pth", weights_only=True)
    assert set(saved) == {"model", "config"} and saved["config"]["job"] == "cifar10"
    ended = run([*words, "--resume", "cifar_net.pth", "--save", "none", "--result", str(tmp_path / "second.json")], cwd=tmp_path)
    assert ended.status == 0 and ended.out.count("Weights from cifar_net.pth; the optimizer starts afresh\n") == 1, ended
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["train_loss_per_epoch"][0] < first["train_loss_per_epoch"][0]
    again = torch.load(tmp_path / "cifar_net.pth", weights_only=True)
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in saved["model"].items()), "--save none"
    shown = run(["python", "-m", "common.predict", str(tmp_path / "cifar_net.pth"), "--index", "3"], cwd=ROOT)
    assert shown.status == 0 and re.match(r"cifar10, evaluation sample 3: \w+ \(it is \w+\)\n", shown.out), shown


@pytest.mark.parametrize("launcher", ["spawn", "torchrun", "mpi"])
def test_a_model_that_is_not_there_is_told_once(tmp_path, launcher):
    ended = run(command(launcher, 2, "--job", "digits", "--resume", "none.pth"), cwd=tmp_path)
    assert ended.status == (1 if launcher == "torchrun" else 2), ended
    assert ended.err.count("error: --resume none.pth: cannot be read (No such file or directory)") == 1, ended


def test_cifar10_logs_every_batch_on_every_rank(tmp_path, flags):
    ended = run(command("torchrun", 2, *flags("cifar10"), *QUICK, "--log_every", 2, "--log_all_ranks", "--save", "none"))
    assert ended.status == 0, ended
    for rank in (0, 1):
        assert re.search(rf"^\[Rank {rank}\] Epoch \[1/1\] Step \[2/5\] - Local Loss: ", ended.out, re.MULTILINE), ended
        assert re.search(rf"^\[Rank {rank}\] Epoch \[1/1\] - Train Loss: ", ended.out, re.MULTILINE), ended


def test_text_is_told_in_bits_and_tokens(tmp_path, flags):
    words = command("spawn", 2, *flags("text"), *JOBS["text"], "--plot", tmp_path / "curves.png", "--save", tmp_path / "text.pth")
    ended = run([*words, "--result", str(tmp_path / "result.json")])
    assert ended.status == 0, ended
    result = json.loads((tmp_path / "result.json").read_text())
    bits = result["eval_loss_per_epoch"][-1] / torch.log(torch.tensor(2.0)).item()
    assert f"({bits:.4f} bits per byte)" in ended.out, ended
    assert re.search(r"samples/s, [\d,]+ tokens/s$", ended.out, re.MULTILINE), ended
    assert result["tokens_per_second"] == pytest.approx(32 * result["samples_per_second"])
    assert result["model_flops_utilisation"] is None and result["optimizer"] == "adamw"
    assert result["learning_rate_per_epoch"][1] == pytest.approx(0.0003)
    written = run(["python", "-m", "common.predict", str(tmp_path / "text.pth"), "--prompt", "The ", "--length", "9"], cwd=ROOT)
    assert written.status == 0 and written.out.startswith("The "), written
    assert os.path.getsize(tmp_path / "curves.png") > 10_000


def test_text_is_learnt(tmp_path):
    """From knowing nothing to more than how often each byte comes."""
    words = command("spawn", 2, "--job", "text", "--cache_dir", tmp_path, "--data_size", 2048, "--layers", 2, "--width", 64)
    result = trained(words, tmp_path / "result.json")
    often = text.windows(None, str(tmp_path), 128, 1, print)[1].text.bincount().double()
    entropy = torch.distributions.Categorical(often).entropy().item()
    assert result["loss_per_step"][0] > math.log(256) - 0.3 and result["eval_loss_per_epoch"][-1] < 0.95 * entropy
