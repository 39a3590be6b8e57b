"""The first process of a container: ``docker run … launchlab [FLAGS | COMMAND …]`` starts here.

docker run launchlab                                                 python launchers/plain.py
docker run launchlab --epochs 3                                      python launchers/plain.py --epochs 3
docker run launchlab torchrun --nproc_per_node=2 launchers/torchrun.py       as it stands

It says in one line what cannot work in this container, then runs the command and does what falls to process 1: it passes signals
on, which process 1 itself would ignore (``docker stop`` would wait ten seconds and kill), takes in orphans, gives the launcher's
watcher the time for its sentence, and returns the command's status, 128 + N after signal N. With ``--health`` it looks at /dev/shm.
It is run as ``python -I -S`` and imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

TRAIN = ("python", "/launchlab/launchers/plain.py")
SHM = "/dev/shm"
MPICH_RANK_BYTES = 1_060_000  # that MPICH 5.0 lays into /dev/shm for each rank (2 to 8 ranks)
MUCH_BYTES = 1 << 30  # what NVIDIA advises for NCCL, and PyTorch "more than the default" for DataLoader workers
NEARLY_FULL_BYTES = 1 << 20
LEAVE_S = 6.0  # the watcher ends a run's last rank within 5 s
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)


def command_of(words: Sequence[str]) -> list[str]:
    """What to run: ``words``, or plain Python with them where they are flags or nothing."""
    return [*TRAIN, *words] if not words or words[0].startswith("-") else list(words)


def mpi_ranks(command: Sequence[str]) -> int:
    """How many ranks an mpirun in ``command`` starts on this machine; 0 where it is none or names hosts."""
    for at, word in enumerate(command):
        if os.path.basename(word) in ("mpirun", "mpiexec", "mpiexec.hydra"):
            rest = command[at + 1 :]
            hosts = {"-f", "-hosts", "--hosts", "--host", "-host", "-H", "--hostfile", "-hostfile", "--machinefile", "-machinefile"}
            if hosts & set(rest):
                return 0
            return next((int(n) for flag, n in zip(rest, rest[1:], strict=False) if flag in ("-n", "-np") and n.isdigit()), 0)
    return 0


def gpus() -> int:
    """NVIDIA devices in this container."""
    with contextlib.suppress(OSError):
        return sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    return 0


def too_small(command: Sequence[str], size: int, devices: int) -> tuple[str, bool]:
    """Why ``size`` bytes of /dev/shm are too few for ``command`` ("" where they are not), and whether it certainly fails.

    Args:
        command: what is run.
        size: bytes of /dev/shm.
        devices: GPUs here. More than one: their ranks talk over NCCL, which keeps its buffers in /dev/shm.
    """
    remedy = "add --shm-size=1g to docker run (shm_size: 1gb in compose.yaml, or --ipc=host)"
    has = f"/dev/shm has {size / 2**20:,.0f} MiB"
    if size < (ranks := mpi_ranks(command)) * MPICH_RANK_BYTES:
        needs = ranks * MPICH_RANK_BYTES / 2**20
        return f"{has}: too small for {ranks} ranks under mpirun, which keep {needs:,.0f} MiB there (Bus error); {remedy}", True
    if size >= MUCH_BYTES:
        return "", False
    workers = re.search(r"num[_-]workers[= ]([1-9]\d*)", " ".join(command))
    if workers:
        return f"{has}: often too small for DataLoader workers, which hand batches over there (Bus error); {remedy}", False
    if devices > 1:
        return f"{has}: often too small for NCCL between {devices} GPUs (No space left on device); {remedy}", False
    return "", False


def size_of(path: str = SHM) -> tuple[int, int]:
    """Bytes of the file system at ``path``: (all, free); more than enough of both where there is none to ask."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 1 << 62, 1 << 62
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def unwritable(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Why rank 0 could not leave its model where the image's SAVE says; "" if it can, or if this command leaves none there."""
    path = environment.get("SAVE", "")
    folder = os.path.dirname(path)
    trains = any("launchers/" in word for word in command)
    flags = {word.partition("=")[0] for word in command}
    if not trains or not folder or not os.path.isdir(folder) or flags & {"--save", "--inspect", "--help", "-h"}:
        return ""
    if os.access(folder, os.W_OK | os.X_OK):
        return ""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} is read-only, and rank 0 leaves the model there (SAVE={path}); mount a folder there, without :ro"
    owner = os.stat(folder)
    return (
        f"{folder} belongs to user {owner.st_uid}:{owner.st_gid} and cannot be written by {os.getuid()}:{os.getgid()}, and rank 0 "
        f"leaves the model there (SAVE={path}); mount a folder of your own and add --user $(id -u):$(id -g) to docker run"
    )


def alone(environment: Mapping[str, str], interfaces: Sequence[str]) -> str:
    """A note where MASTER_ADDR leads a rank of several back into its own container; "" if it does not, or cannot be known."""
    master, world = environment.get("MASTER_ADDR", ""), environment.get("WORLD_SIZE", "")
    local = master in ("localhost", "::1") or master.startswith("127.")
    own_network = all(re.fullmatch(r"lo|eth\d+|tap\d+", name) for name in interfaces)
    if not local or not own_network or not environment.get("RANK") or not world.isdigit() or int(world) < 2:
        return ""
    return (
        f"MASTER_ADDR={master} is this container itself, and ranks in other containers are not there: give rank 0's container name "
        "(on a network that both are on), or --network host to all of them"
    )


def say(text: str) -> None:
    """One line on stderr."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


def check(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Says what cannot work here; whether the command may run all the same."""
    reason, certain = too_small(command, size_of()[0], gpus())
    if not certain and (note := alone(environment, os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else ())):
        say(f"note: {note}.")
    if not certain and reason:
        say(f"warning: {reason}.")
        reason = ""
    reason = reason or unwritable(command, environment)
    if reason:
        say(f"error: {reason}")
    return not reason


def health() -> int:
    """0, or 1 after a line on stdout: whether /dev/shm is large enough for what process 1 runs, and not full."""
    with open("/proc/1/cmdline", "rb") as file:
        words = file.read().decode(errors="replace").rstrip("\0").split("\0")
    at = next((number for number, word in enumerate(words) if word.endswith("common/container.py")), None)
    size, free = size_of()
    reason, _ = too_small(command_of(words[at + 1 :]) if at is not None else words, size, gpus())
    if not reason and free < NEARLY_FULL_BYTES:
        reason = f"/dev/shm is nearly full ({free // 1024} KiB of {size // 1024} are free); add --shm-size=1g to docker run"
    print(reason or f"/dev/shm: {free / 2**20:,.0f} MiB of {size / 2**20:,.0f} are free")
    return int(bool(reason))


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and a command would inherit that
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = ": no such command in this image; give flags of launchers/plain.py, or a command such as torchrun …"
        say(f"error: {command[0]}{hint if missing else f': {error.strerror}'}")
        os._exit(127 if missing else 126)  # as shells and docker say it


def _start(command: Sequence[str], environment: Mapping[str, str], blocked: set[signal.Signals]) -> int:
    """Forks and executes ``command`` as the terminal's foreground group, if there is a terminal; returns its pid."""
    pid = os.fork()
    with contextlib.suppress(OSError):  # both do, so that it is done for either
        os.setpgid(pid, pid)
    if pid:
        return pid
    if os.isatty(0):
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # or this very call would stop us
        with contextlib.suppress(OSError):
            os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    _become(command, environment)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs ``command`` as process 1 should; returns its status when all processes of the container have ended.

    What the command leaves running has ``LEAVE_S`` seconds: usually it is the watcher that ends the ranks.
    """
    # Blocked, a signal waits for sigtimedwait; left to its default action, process 1 would never see it (pid_namespaces(7)).
    watched = {signal.SIGCHLD, *PASSED_ON}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    main = _start(command, environment, watched)
    status, until = 0, float("inf")
    while time.monotonic() < until:
        got = signal.sigtimedwait(watched, min(1.0, max(0.0, until - time.monotonic())))
        if got and got.si_signo != signal.SIGCHLD and until == float("inf"):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # its group: what Ctrl-C in a terminal reaches
                os.killpg(main, got.si_signo)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == main:
                    code = os.waitstatus_to_exitcode(ended[1])
                    status, until = code if code >= 0 else 128 - code, time.monotonic() + LEAVE_S
        except ChildProcessError:
            break
    return status


def main(words: Sequence[str]) -> int:
    """Checks, then runs; 2 where it cannot work."""
    if words[:1] == ["--health"]:
        return health()
    command, environment = command_of(words), dict(os.environ)
    if environment.get("RANK", "0") != "0":
        environment.pop("SAVE", None)  # rank 0's: the others need no folder to write to
    if not check(command, environment):
        return 2
    if os.getpid() != 1:  # docker run --init: somebody else is process 1
        _become(command, environment)
    return run(command, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
