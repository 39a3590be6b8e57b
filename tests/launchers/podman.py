"""A real podman that leaves nothing behind: its own storage, and its own network, mount and PID namespaces.

They belong to one process that ends with the tests' (its standard input does), however these end: with it go all containers,
networks, firewall rules and mounts; the storage too, which is in memory where there is enough of it.
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlparse

import psutil
from running import BIN, ROOT, Run

BASE = "docker.io/library/python:3.11-slim"  # what the Dockerfile names: `make test` reaches no registry
IMAGE = "launchlab"
TOOLS = ("podman", "runc", "conmon", "netavark", "aardvark-dns", "iptables", "mmdebstrap", "unshare", "nsenter")
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale")
CGROUPS = Path("/sys/fs/cgroup")
STORAGE_BYTES = 8 << 30  # twice what base, image and the steps between them take
SECONDS = 60  # for a command that does no more than ask

STORAGE = """[storage]
driver = "overlay"
graphroot = "{storage}/root"
runroot = "{folder}/run"
[storage.options]
additionalimagestores = [{others}]
"""
# runc, because crun of Debian 12 fails where cgroups v1 and v2 are mixed. Not 10.88 and 10.89, which are podman's own.
CONTAINERS = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
default_subnet = "10.91.0.0/24"
default_subnet_pools = [{{"base" = "10.92.0.0/16", "size" = 24}}]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/tmp"
image_copy_tmp_dir = "{storage}"
"""


def missing() -> str:
    """What this machine lacks for it, in one line; "" if nothing."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib/podman:/usr/libexec/podman"
    if absent := [tool for tool in TOOLS if not shutil.which(tool, path=path)]:
        return f"{', '.join(absent)} missing: apt install podman runc netavark aardvark-dns iptables mmdebstrap"
    return "" if os.getuid() == 0 else "podman is tested as root: a container with a network of its own needs it here"


def settings(folder: Path, storage: Path, others: Path | None = None) -> dict[str, str]:
    """The variables for a podman that keeps everything in these folders; ``others`` is a storage whose images it has too."""
    (folder / "storage.conf").write_text(
        STORAGE.format(folder=folder, storage=storage, others=f'"{others}/root"' if others else "")
    )
    (folder / "containers.conf").write_text(CONTAINERS.format(folder=folder, storage=storage))
    return {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "TMPDIR": str(storage),
        "XDG_RUNTIME_DIR": str(folder),
    }


class Podman:
    """podman with everything of its own in ``folder``."""

    def __init__(self, folder: Path, holder: int) -> None:
        self.folder, self.holder = folder, holder
        self.env = settings(folder, folder / "storage")

    def words(self, *arguments: object, network: bool = True) -> list[str]:
        """The command line of ``podman ARGUMENTS``; without ``network`` it has the machine's own."""
        return self.inside("podman", *arguments, network=network)

    def inside(self, *words: object, network: bool = True) -> list[str]:
        """A command line that runs ``words`` in the namespaces."""
        return ["nsenter", f"--target={self.holder}", "--mount", "--pid", *["--net"] * network, f"--wd={ROOT}", "--",
                *map(str, words)]  # fmt: skip

    def start(self, *arguments: object, **env: object) -> Run:
        """Runs podman in the foreground, as a person at a terminal would."""
        return Run(self.words(*arguments), **self.env, **env)

    def ask(self, *arguments: object, limit: float = SECONDS, network: bool = True, check: bool = True) -> str:
        """Runs podman to its end and returns what it prints."""
        done = subprocess.run(
            self.words(*arguments, network=network), env=os.environ | self.env, capture_output=True, text=True, timeout=limit,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"podman {' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def inspect(self, name: str) -> dict:
        """What podman knows of a container."""
        return json.loads(self.ask("container", "inspect", name))[0]


@contextmanager
def podman(folder: Path) -> Iterator[Podman]:
    """Podman while it is needed; all of it is gone afterwards."""
    (folder / "storage").mkdir()
    in_memory = f"mount -t tmpfs tmpfs {folder}/storage;" if psutil.virtual_memory().available > STORAGE_BYTES else ""
    words = ["unshare", "--net", "--mount", "--fork", "--pid", "--mount-proc", "--kill-child=KILL",
             "sh", "-c", f"{in_memory} ip link set lo up; echo ready; exec cat"]  # fmt: skip
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == b"ready\n"
        inner = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0]
        made = Podman(folder, int(inner))
        yield made
        made.ask("rm", "--all", "--force", "--time", "0", check=False)  # its cgroups too, which outlive their processes
    finally:
        holder.stdin.close()
        holder.stdout.close()
        try:
            holder.wait(20)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait(10)
        for path, _, _ in [each for top in CGROUPS.glob("*/libpod_parent") for each in os.walk(top, topdown=False)]:
            with suppress(OSError):  # only an empty cgroup can be removed
                os.rmdir(path)
        shutil.rmtree(folder, ignore_errors=True)


def base_image(engine: Podman) -> None:
    """Makes a Debian with Python and gives it the name of Docker's image."""
    tar = engine.folder / "storage" / "base.tar"
    options = ["--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude=/{path}/*" for path in LEFT_OUT)]
    words = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", *options]
    words = engine.inside(*words, "bookworm", tar, network=False)
    done = subprocess.run(words, env=os.environ | engine.env, capture_output=True, text=True, timeout=500, start_new_session=True)
    assert done.returncode == 0, done.stderr
    engine.ask("import", tar, BASE, limit=200)


def pip_settings(folder: Path) -> tuple[list[str], bool]:
    """How this machine's pip finds packages, for pip in a build.

    Returns:
        podman build's --volume options for a pip.conf of the same settings and for the local files that it names, and whether
        local folders are among them: packages then come from there.
    """
    listed = subprocess.run([str(BIN / "python"), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # the environment outranks files
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'\"")
    volumes = {}
    for word in " ".join(settings.values()).split():
        path = Path(urlparse(word).path)
        if word.startswith(("/", "file:")) and path.exists():
            path = path.parent if path.name == "simple" else path  # an index's files are beside it
            volumes[str(path)] = str(path)
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    volumes[str(folder / "pip.conf")] = "/etc/pip.conf"
    options = [f"--volume={here}:{there}:ro" for here, there in volumes.items()]
    return options, any(stat.S_ISDIR(os.stat(here).st_mode) for here in volumes)


def build(engine: Podman, *arguments: object) -> str:
    """``podman build`` of the repository, with this machine's pip settings; returns what it printed."""
    volumes, local = pip_settings(engine.folder)
    index = ["--build-arg=TORCH_INDEX="] if local else []
    options = ["--format=docker", "--pull=never", "--network=host", *index, *volumes, *arguments]
    return engine.ask("build", *options, "--tag", IMAGE, ROOT, limit=500, network=False)
