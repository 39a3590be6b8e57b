"""The image, built and run by a real podman on a Debian made here: containers that train together, stop, complain."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import podman as engines
import pytest
from running import ROOT, Run, command

from common import cache, hub
from common.container import MPICH_RANK_BYTES
from common.pictures import KINDS
from tests.common import hub_files

pytestmark = [pytest.mark.launch, pytest.mark.only_on("linux")]

SMALL = ("--job", "random", "--data_size", "128", "--epochs", "2", "--precision", "fp64")
LONG = ("--job", "random", "--data_size", "4096", "--epochs", "5000")
USER = "4321:4321"  # nobody that the image knows


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    if lacking := engines.missing():
        pytest.skip(lacking)
    with engines.podman(tmp_path_factory.mktemp("podman")) as engine:
        engines.base_image(engine)
        engines.build(engine, "--layers=false")
        engine.ask("network", "create", "lab")
        yield engine


@pytest.fixture(autouse=True)
def no_container_is_left(engine):
    yield
    left = engine.ask("ps", "--all", "--quiet")
    engine.ask("rm", "--all", "--force", "--time", "0")
    assert not left


@pytest.fixture
def out(tmp_path):
    """A folder to be mounted, of the user whom a test runs containers as."""
    folder = tmp_path / "out"
    folder.mkdir()
    os.chown(folder, *map(int, USER.split(":")))
    return folder


def run(engine, *words, options=()):
    """A container in the foreground, removed when it ends."""
    return engine.start("run", "--rm", "--no-healthcheck", *options, engines.IMAGE, *words)


def rank(engine, number, *words, options=(), **variables):
    """Rank ``number`` of two, each in a container of its own on one network, which gives names."""
    group = {"MASTER_ADDR": "rank0", "MASTER_PORT": 29500, "WORLD_SIZE": 2, "RANK": number} | variables
    given = [word for name, value in group.items() for word in ("-e", f"{name}={value}")]
    network = [] if any("--network" in str(option) for option in options) else ["--network", "lab"]
    return run(engine, *words, options=["--name", f"rank{number}", *network, *given, *options])


def of_one_process(tmp_path):
    """The loss of each step, without any container."""
    result = tmp_path / "one.json"
    ended = Run(command("plain", 1, *SMALL, "--result", result)).finish()
    assert ended.status == 0, ended
    return json.loads(result.read_text())["loss_per_step"]


def test_two_containers_train_together_and_rank_0_leaves_the_model(engine, out, tmp_path):
    second = rank(engine, 1, *SMALL)  # it waits for the first, whose name means nothing yet
    first = rank(engine, 0, *SMALL, "--result=/out/result.json", options=["--user", USER, "--volume", f"{out}:/out"])
    ended = [first.finish(), second.finish()]
    assert [e.status for e in ended] == [0, 0], "\n".join(map(str, ended))
    assert "Launcher plain: 2 ranks on 2 nodes" in ended[0].out and "[Rank 1]" in ended[1].out
    result = json.loads((out / "result.json").read_text())
    assert result["loss_per_step"] == pytest.approx(of_one_process(tmp_path), rel=1e-9)
    assert len(set(result["hosts"])) == 2 and result["threads_per_rank"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(p.name for p in out.iterdir()) == ["model.pt", "result.json"]
    assert (out / "model.pt").stat().st_uid == int(USER.partition(":")[0])
    code = f"import torch; print(sorted(torch.load({str(out / 'model.pt')!r})))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "['config', 'model']\n"
    )


def test_the_image_holds_what_it_needs_and_runs_as_nobody_special(engine):
    about = json.loads(engine.ask("image", "inspect", engines.IMAGE))[0]
    base = json.loads(engine.ask("image", "inspect", engines.BASE))[0]
    assert about["User"] == "1000:1000" and about["Healthcheck"]["Test"][-1] == "--health"
    assert about["Size"] - base["Size"] < 1000e6, about["Size"]
    looks = (
        "id -u; ls -A; python -c 'import matplotlib, mpi4py, psutil, rich, torch'; "
        "find . -name '*.py' | wc -l; find . -name '*.pyc' | wc -l; touch x; python -c 'import pytest'; which pip"
    )
    ended = run(engine, "sh", "-c", looks).finish()
    uid, *names, sources, compiled = ended.out.split()
    assert uid == "1000" and sorted(names) == ["LICENSE", "benchmarks", "common", "launchers", "out"]
    assert int(compiled) >= int(sources) > 50
    assert "cannot touch 'x'" in ended.err and "No module named 'pytest'" in ended.err


def test_other_launchers_run_in_one_container_and_its_cpu_limit_counts(engine):
    flags = " ".join(SMALL)
    script = f"torchrun --nproc_per_node=2 launchers/torchrun.py {flags} && mpirun -np 2 python launchers/mpi.py {flags}"
    ended = run(engine, "sh", "-c", script, options=["--user", USER, "--read-only", "--tmpfs", "/out:mode=1777"]).finish()
    assert ended.status == 0, ended
    assert ended.out.count("2 ranks on 1 node") == 2 and "Launcher torchrun" in ended.out and "Launcher mpi" in ended.out
    ended = run(engine, "--inspect", options=["--cpus=1"]).finish()
    assert ended.status == 0 and re.search(r"cpu\s+[\d,-]+\s+\d+\s+–\s+1$", ended.out, re.MULTILINE), ended


def test_jobs_whose_data_are_made_ready(engine, tmp_path):
    """Text is in the image; pictures that were decoded outside are mounted, so that the image needs no library to read them."""
    hub_files.write(tmp_path / "data", "mnist", train=300, test=60)
    hub.arrays("mnist", KINDS["mnist"], str(tmp_path / "data"), str(tmp_path / "kept"), print)
    (made,) = (tmp_path / "kept").glob("mnist-*[!k]")
    made.rename(tmp_path / "kept" / cache.key("mnist", []))  # as if they had come from the hub
    small = "--epochs 1 --save none"
    script = f"CACHE_DIR=/tmp/text python launchers/plain.py --job text --data_size 32 --layers 1 --width 32 {small} && "
    script += f"python launchers/spawn.py --world_size 2 --job mnist {small}"
    options = ["--volume", f"{tmp_path / 'kept'}:/cache:ro", "-e", "CACHE_DIR=/cache"]
    ended = run(engine, "sh", "-c", script, options=options).finish()
    assert ended.status == 0, ended
    assert "bits per byte" in ended.out and "data mnist, 1 epoch" in ended.out, ended


def test_containers_on_the_machine_s_own_network_are_one_node(engine, free_port):
    options = ["--network", "host"]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    ranks = [rank(engine, number, *SMALL, options=options, **group) for number in (1, 0)]
    ended = [each.finish() for each in ranks]
    assert [e.status for e in ended] == [0, 0], "\n".join(map(str, ended))
    assert "2 ranks on 1 node" in ended[1].out


def test_containers_on_two_machines_use_the_machines_network(engine):
    """Hosts of a virtual cluster, each with a podman of its own: gloo's ports are the kernel's choice, so --network host."""
    script = ["#!/bin/sh", 'case "$1" in']
    for number in (0, 1):
        (engine.folder / f"host{number}").mkdir()
        folders = engine.folder / f"host{number}", engine.folder / "storage" / f"host{number}"
        variables = engines.settings(*folders, others=engine.folder / "storage")
        script.append(f"{number}) mkdir {folders[1]}; export {' '.join(f'{n}={v}' for n, v in variables.items())};;")
    group = "-e RANK=$1 -e MASTER_ADDR=$2 -e WORLD_SIZE=2 -e MASTER_PORT=29500"
    script += ["esac", f"exec podman run --rm --no-healthcheck --network host {group} {engines.IMAGE} {' '.join(SMALL)}"]
    (engine.folder / "train.sh").write_text("\n".join(script))
    cluster = [
        "python",
        "-m",
        "common.virtual_cluster",
        "--nodes",
        "2",
        "--",
        "sh",
        engine.folder / "train.sh",
        "{rank}",
        "{master}",
    ]
    ended = Run(engine.inside(*cluster)).finish()
    assert ended.status == 0, ended
    assert "Launcher plain: 2 ranks on 2 nodes" in ended.out and "Epoch [2/2]" in ended.out, ended


def test_stop_ends_a_container_at_once_and_its_peer_says_so(engine):
    ranks = [rank(engine, number, *LONG) for number in (0, 1)]
    ranks[0].until(lambda: "Epoch [1/" in ranks[0].out, "the first epoch")
    began = time.monotonic()
    engine.ask("stop", "rank1")
    assert time.monotonic() - began < 8  # after 10 s podman kills
    ended = [each.finish(30) for each in ranks]
    assert [e.status for e in ended] == [1, 143], "\n".join(map(str, ended))  # 128 + SIGTERM
    for each in ended:  # rank 0 hears it from the watcher of rank 1's container, or sees its connection end
        assert re.search(r"Rank 1 on \w+ \(pid \d+\) was killed by SIGTERM|Rank 0 .* lost another rank", each.err), each


def test_stop_ends_all_ranks_of_a_container(engine):
    training = run(engine, "--world_size", "2", *LONG, options=["--name", "both"])
    training.until(lambda: "Epoch [1/" in training.out, "the first epoch")
    began = time.monotonic()
    engine.ask("stop", "both")
    assert time.monotonic() - began < 8
    ended = training.finish(30)
    assert ended.status == 143, ended  # which the watcher sees first, is chance
    assert "was killed by SIGTERM" in ended.err or "the launcher that started this node's ranks is gone" in ended.err, ended


def test_ctrl_c_reaches_the_ranks(engine):
    training = run(engine, "--world_size", "2", *LONG, options=["--name", "both"])
    training.until(lambda: "Epoch [1/" in training.out, "the first epoch")
    engine.ask("kill", "--signal=INT", "both")  # as podman and docker do in the foreground without a terminal
    assert training.finish(30).status == 130


def test_a_folder_that_rank_0_cannot_write_to_is_named(engine, tmp_path):
    mounted = ["--volume", f"{tmp_path}:/out"]
    ended = rank(engine, 0, *SMALL, options=mounted).finish()
    assert ended.status == 2 and not ended.out, ended
    assert "error: /out belongs to user 0:0 and cannot be written by 1000:1000" in ended.err
    assert "--user $(id -u):$(id -g)" in ended.err and "Traceback" not in ended.err
    ended = run(engine, *SMALL, options=["--volume", f"{tmp_path}:/out:ro"]).finish()
    assert ended.status == 2 and "/out is read-only" in ended.err, ended


def test_a_small_dev_shm_is_named(engine):
    ended = run(engine, "mpirun", "-np", "2", "python", "launchers/mpi.py", *SMALL, options=["--shm-size=1m"]).finish()
    assert ended.status == 2 and not ended.out, ended
    assert "/dev/shm has 1 MiB: too small for 2 ranks under mpirun" in ended.err and "--shm-size=1g" in ended.err
    # What would have come: the entry is right to refuse.
    bare = ["--shm-size=1m", "--entrypoint", "mpirun"]
    ended = run(engine, "-np", "2", "python", "launchers/mpi.py", *SMALL, options=bare).finish()
    assert ended.status != 0 and "Bus error" in ended.out + ended.err, ended
    assert 2 * MPICH_RANK_BYTES > 1 << 20


def test_health_tells_of_dev_shm(engine):
    """``podman run -d`` warns where there is no systemd to ask for the health; the question itself is put here."""
    sleeps = ("sh", "-c", "sleep 60")
    engine.ask("run", "--detach", "--name", "well", engines.IMAGE, *sleeps)
    engine.ask("run", "--detach", "--name", "ill", "--shm-size=2m", engines.IMAGE, *sleeps, "--num_workers=2")
    assert engine.ask("healthcheck", "run", "well") == ""
    engine.ask("healthcheck", "run", "ill", check=False)
    health = engine.inspect("ill")["State"]["Health"]
    assert health["Log"][-1]["ExitCode"] == 1 and "too small for DataLoader workers" in health["Log"][-1]["Output"], health
    assert engine.inspect("well")["State"]["Health"]["Status"] == "healthy"
    engine.ask("exec", "well", "sh", "-c", "head -c 80m /dev/zero > /dev/shm/full || true")
    engine.ask("healthcheck", "run", "well", check=False)
    assert "/dev/shm is nearly full" in engine.inspect("well")["State"]["Health"]["Log"][-1]["Output"]
    engine.ask("rm", "--all", "--force", "--time", "0")


def test_a_command_that_is_not_there_and_a_wrong_flag_are_named(engine):
    ended = run(engine, "no-such-command").finish()
    assert ended.status == 127 and ended.err.strip().splitlines()[-1].startswith("error: no-such-command: no such command in this")
    ended = run(engine, "--epochs", "0").finish()
    assert ended.status == 2 and "error: --epochs 0: not allowed" in ended.err, ended


def test_rank_0_on_a_network_without_names_is_told(engine):
    ended = rank(engine, 0, *SMALL, options=["--network=podman"], MASTER_ADDR="rank-zero").finish()
    assert ended.status == 1 and "rank 0 does not reach itself at rank-zero:29500" in ended.err, ended
    assert "docker run --network NAME --name" in ended.err and "Traceback" not in ended.err


def test_compose_trains_with_two_services(engine, out, tmp_path):
    shutil.copy(ROOT / "compose.yaml", tmp_path)
    wrapper = tmp_path / "podman"  # podman in this test's namespaces
    words = engine.words()
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(words[: words.index("--")])} -- podman "$@"\n')
    wrapper.chmod(0o755)
    compose = ["podman-compose", "--podman-path", str(wrapper)]
    settings = {"LAUNCHLAB_USER": USER, "JOB": "random", "EPOCHS": "2", **engine.env}
    ended = Run([*compose, "up", "--no-build", "--pull=never"], cwd=tmp_path, **settings).finish()
    assert ended.status == 0 and "Launcher plain: 2 ranks on 2 nodes" in ended.out + ended.err, ended
    assert [p.name for p in out.iterdir()] == ["model.pt"]
    statuses = [engine.inspect(name)["State"]["ExitCode"] for name in engine.ask("ps", "-a", "--format={{.Names}}").split()]
    assert statuses == [0, 0]
    ended = Run([*compose, "down"], cwd=tmp_path, **settings).finish()
    assert ended.status == 0, ended


def test_a_foreign_podman_is_untouched(engine):
    """Everything of these tests is in namespaces that end with them."""
    assert str(engine.folder) not in Path("/proc/mounts").read_text()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, timeout=30).stdout
    assert "podman" in engine.ask("network", "ls") and "podman" not in links
