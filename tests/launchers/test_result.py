"""What a run leaves behind on purpose: --result, --save, --plot."""

import json
import os
import re

import psutil
import pytest
import torch
from running import ALL, FORKED, SPAWNS, Run, command, run, trained

from common.events import PHASES, is_launching
from common.warm import default_start_method

pytestmark = pytest.mark.launch

FLAGS = ("--job", "random", "--epochs", 3, "--data_size", 512, "--global_batch_size", 64)
REAL = (int, float)
FIELDS = {
    "launcher": str,
    "world_size": int,
    "threads_per_rank": int,
    "device": str,
    "backend": str,
    "parameters": int,
    "parameter_sha256": str,
    "loss_per_step": list,
    "train_loss_per_epoch": list,
    "eval_loss_per_epoch": list,
    "eval_accuracy": list,
    "train_seconds": float,
    "samples_per_second": float,
    "launch_seconds": float,
    "phases": dict,
    "peak_memory_bytes": int,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run a launcher, with its wall time and all three files."""
    done = {}

    def get(launcher, world_size=2, *more):
        key = (launcher, world_size, more)
        if key not in done:
            folder = tmp_path_factory.mktemp("result")
            files = ("--result", "result.json", "--save", "model.pt", "--plot", "curves.png")
            ended = run(command(launcher, world_size, *FLAGS, *files, *more), cwd=folder)
            assert ended.status == 0, str(ended)
            done[key] = json.loads((folder / "result.json").read_text()), ended, folder
        return done[key]

    return get


@pytest.mark.parametrize("launcher", (*ALL, "openmpi", "systemmpi"))
def test_fields(measured, launcher):
    result, _, _ = measured(launcher)
    for name, kind in FIELDS.items():
        assert isinstance(result[name], kind), (name, result[name])
    assert result["launcher"] == launcher.replace("openmpi", "mpi").replace("systemmpi", "mpi")
    assert result["start_method"] == (default_start_method() if launcher in FORKED else None) and result["restart"] == 0
    assert (result["world_size"], result["device"], result["backend"]) == (2, "cpu", "gloo")
    assert result["parameters"] == 20 * 2 + 2
    assert re.fullmatch("[0-9a-f]{64}", result["parameter_sha256"])
    assert len(result["loss_per_step"]) == 3 * 8
    for name in ("train_loss_per_epoch", "eval_loss_per_epoch", "eval_accuracy"):
        assert len(result[name]) == 3
    assert all(0.2 < loss < 2 for loss in result["loss_per_step"])
    assert all(0 <= accuracy <= 1 for accuracy in result["eval_accuracy"])


@pytest.mark.parametrize("launcher", SPAWNS)
def test_the_start_method_that_was_asked_for(measured, launcher):
    result, ended, _ = measured(launcher)
    assert f"{result['launcher']} ({result['start_method']})" == launcher
    assert f"Launcher {launcher}: 2 ranks" in ended.out, str(ended)


@pytest.mark.parametrize("launcher", ALL)
def test_launch_time_starts_with_the_command(measured, launcher):
    """It holds the launcher's own time too, and no more than the whole command."""
    result, ended, _ = measured(launcher)
    assert set(result["phases"]) == set(PHASES) - {"command_started", "group_left", "process_ended"}
    # Which comes first of torch and the rank's numbers depends on the launcher.
    marks = [mark for name, mark in result["phases"].items() if name not in ("torch_imported", "ranks_known")]
    assert marks == sorted(marks) and marks[0] > 0
    for name in ("torch_imported", "ranks_known"):
        assert result["phases"]["interpreter_up"] <= result["phases"][name] <= result["phases"]["group_joined"]
    assert result["launch_seconds"] == result["phases"]["first_step_done"]
    assert 0 < result["train_seconds"] < ended.seconds
    assert result["launch_seconds"] + result["train_seconds"] < ended.seconds + 0.1
    assert result["train_seconds"] == pytest.approx(result["phases"]["training_done"] - result["launch_seconds"], abs=1e-3)
    # After training come only the result, a picture and the way out.
    assert result["launch_seconds"] > 0.3 * (ended.seconds - result["train_seconds"])


@pytest.mark.parametrize("launcher", ALL)
def test_launch_time_is_longer_than_from_the_ranks_own_start(tmp_path, launcher):
    (tmp_path / "slow.py").write_text(
        "import time, torch, os, pathlib\n"
        "class Slow(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(20, 2)\n"
        "        self.first = True\n"
        "    def forward(self, x):\n"
        "        if self.training and self.first:\n"
        "            self.first = False\n"
        "            pathlib.Path(f'rank-{os.getpid()}').touch()\n"
        "            while not pathlib.Path('go').exists():\n"
        "                time.sleep(0.01)\n"
        "        return self.layer(x)\n"
    )
    each = Run(command(launcher, 2, *FLAGS, "--model", "slow:Slow", "--result", "result.json"), cwd=tmp_path)
    each.until(lambda: len(list(tmp_path.glob("rank-*"))) == 2, "both ranks' first step")
    command_began = each.process and psutil.Process(each.process.pid).create_time()
    ranks_began = max(psutil.Process(int(file.name.partition("-")[2])).create_time() for file in tmp_path.glob("rank-*"))
    assert ranks_began >= command_began  # MPICH starts ranks within the clock's 10 ms
    (tmp_path / "go").touch()
    ended = each.finish()
    assert ended.status == 0, str(ended)
    result = json.loads((tmp_path / "result.json").read_text())
    before_ranks = ranks_began - command_began
    assert result["phases"]["ranks_known"] > before_ranks - 0.05
    assert result["launch_seconds"] > before_ranks


@pytest.mark.parametrize(
    "line, launching",
    [
        ("python launchers/spawn.py --world_size 2", True),
        ("/venv/bin/python -X dev -u /some/where/launchers/plain.py", True),
        ("python3 /venv/bin/torchrun --nproc_per_node=2 launchers/torchrun.py", True),
        ("python -m torch.distributed.run launchers/torchrun.py", True),
        ("/usr/bin/mpirun -np 2 python launchers/mpi.py", True),
        ("python -m pytest tests/launchers/test_result.py", False),
        ("python /venv/bin/pytest -q tests/launchers/test_result.py", False),
        ("python train.py launchers/plain.py", False),
        ("bash launchers/plain.py", False),
    ],
)
def test_what_counts_as_launching(line, launching):
    """A test runner that is given files of tests/launchers once counted, and launches seemed to take minutes."""
    assert is_launching(line.split()) == launching


@pytest.mark.parametrize("launcher", (*ALL, "openmpi"))
def test_threads_are_set_alike(measured, launcher):
    """By default the usable cores shared evenly over the ranks, whatever the launcher set; else as told."""
    result, ended, _ = measured(launcher)
    if launcher == "openmpi":  # it binds each rank to cores of its own
        assert result["threads_per_rank"] == max(1, len(result["cores_per_rank"][0]) // result_sharing(result))
    else:
        assert result["threads_per_rank"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"{result['threads_per_rank']} thread" in ended.out


def result_sharing(result):
    """How many ranks may use the first rank's cores."""
    first = set(result["cores_per_rank"][0])
    return sum(1 for cores in result["cores_per_rank"] if set(cores) & first)


@pytest.mark.parametrize("launcher", ALL)
@pytest.mark.parametrize("threads", (1, 3))
def test_threads_as_told(tmp_path, launcher, threads):
    (tmp_path / "counting.py").write_text(
        "import torch\n"
        "class Counting(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(20, 2)\n"
        "    def forward(self, x):\n"
        f"        assert torch.get_num_threads() == {threads} or not self.training, torch.get_num_threads()\n"
        "        return self.layer(x)\n"
    )
    flags = (*FLAGS, "--model", "counting:Counting", "--threads", threads)
    result = trained(command(launcher, 2, *flags), tmp_path / "result.json", cwd=tmp_path)
    assert result["threads_per_rank"] == threads


@pytest.mark.parametrize("launcher", ALL)
def test_peak_memory(measured, launcher):
    """A rank with torch in it: more than 100 MB, less than 4 GB; the largest of all ranks."""
    result, _, _ = measured(launcher)
    assert len(result["peak_memory_bytes_per_rank"]) == 2
    assert all(1e8 < memory < 4e9 for memory in result["peak_memory_bytes_per_rank"])
    assert result["peak_memory_bytes"] == max(result["peak_memory_bytes_per_rank"])


@pytest.mark.parametrize("launcher", ALL)
def test_files(measured, launcher):
    result, _, folder = measured(launcher)
    assert sorted(file.name for file in folder.iterdir()) == ["curves.png", "model.pt", "result.json"]
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in saved["model"].items()} == {
        "classes.weight": (2, 20),
        "classes.bias": (2,),
    }
    assert saved["config"]["job"] == "random" and saved["config"]["epochs"] == 3
    from PIL import Image

    with Image.open(folder / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10, "something is drawn"
    assert result["eval_accuracy"]


@pytest.mark.parametrize("launcher", ALL)
def test_a_failed_run_writes_nothing_and_keeps_the_last_result(tmp_path, launcher):
    (tmp_path / "broken.py").write_text(
        "import torch\n"
        "class Fails(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(20, 2)\n"
        "    def forward(self, x):\n"
        "        if self.training:\n"
        "            raise ArithmeticError('never trains')\n"
        "        return self.layer(x)\n"
    )
    (tmp_path / "result.json").write_text("the last run's")
    files = ("--result", "result.json", "--save", "model.pt", "--plot", "curves.png")
    ended = run(command(launcher, 2, *FLAGS, "--model", "broken:Fails", *files), cwd=tmp_path)
    assert ended.status not in (0, 2), str(ended)
    assert (tmp_path / "result.json").read_text() == "the last run's"
    left = {path.name for path in tmp_path.iterdir()} - {"broken.py", "result.json", "__pycache__"}
    assert not left
