"""What runs inside a virtual cluster (``common.virtual_cluster``): what holds it, each host's first process, the way in.

    python -I -S virtual_host.py hold                    in new namespaces: everything ends with it, it ends with its standard input
    python -I -S virtual_host.py host NAME               in new namespaces: NAME's process 1
    python -I -S virtual_host.py enter PID KINDS -- …    runs a command in the namespaces of process PID

Standard library only. Namespaces: namespaces(7), setns(2), pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

FOLDER = "/run/launchlab"  # as the hosts see it; memory, so that nothing is left of it
FD = "LAUNCHLAB_BORN"  # number of the socket on which a process says that it is up, and by that, which it is
KINDS = {"user": 0x10000000, "ipc": 0x08000000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000}
_MS_BIND, _PR_SET_PDEATHSIG = 0x1000, 1
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _call(what: str, *arguments: object) -> None:
    """A C function that returns -1 and sets errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, what)(*(a.encode() if isinstance(a, str) else a for a in arguments)) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}{arguments}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    _call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def _say_born() -> None:
    """The socket's other end learns this process's id as it is there (SCM_CREDENTIALS, unix(7))."""
    with socket.socket(fileno=int(os.environ.pop(FD))) as line:
        line.send(b"up")


def _bury(until: Callable[[], bool]) -> None:
    """Takes the statuses of orphans, as process 1 must, until ``until()``, which may wait a second."""
    while not until():
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def hold() -> None:
    """Memory for files of all hosts; then waits. The kernel ends all processes of a PID namespace with its first."""
    _mount("run", "/run", "tmpfs", 0, "mode=755")
    for folder in (FOLDER, "/run/sshd", "/run/lock"):
        os.makedirs(folder, 0o755)
    _say_born()
    _bury(lambda: bool(select.select([0], [], [], 1)[0]) and not os.read(0, 1))


def host(name: str) -> None:
    """Its name, its hosts file, its shared memory; then waits."""
    _call("sethostname", name, len(name))
    _mount("shm", "/dev/shm", "tmpfs", 0, "mode=1777")
    for known in ("hosts", "nsswitch.conf", "ssh/ssh_config"):
        ours = f"{FOLDER}/{name}.{os.path.basename(known)}"
        if os.path.exists(ours) and os.path.exists(f"/etc/{known}"):
            _mount(ours, f"/etc/{known}", flags=_MS_BIND)
    # An ordinary user may ping, and listen on port 22: it is nobody else's network (ip-sysctl, kernel.org).
    for setting, value in (("ping_group_range", "0 0"), ("ip_unprivileged_port_start", "0")):
        with contextlib.suppress(OSError), open(f"/proc/sys/net/ipv4/{setting}", "w") as file:
            file.write(value)
    _say_born()
    _bury(lambda: bool(select.select([], [], [], 1)[0]))


def enter(pid: int, kinds: list[str], words: list[str], folder: str, own: str | None) -> NoReturn:
    """Runs ``words`` in namespaces of process ``pid``; ends as they end, and they end when this process is killed.

    A Ctrl-C reaches both, as the terminal's foreground group; SIGTERM and the like are passed on.

    Args:
        pid: a process in them.
        kinds: of ``KINDS``.
        words: the command.
        folder: where it starts.
        own: UID:GID to have in there instead of those of a user namespace's root.
    """
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(pid))
    except OSError:
        sys.exit("this host has been killed")
    doors = [(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), KINDS[kind]) for kind in KINDS if kind in kinds]
    for door, kind in doors:
        _call("setns", door, kind)
    os.chdir(folder)
    parent = os.getpid()
    child = os.fork()  # a PID namespace is entered by children only
    if not child:
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        if "pid" not in kinds and os.getppid() != parent:
            os._exit(1)
        try:
            if own:
                _become(*map(int, own.split(":")))
            os.execvp(words[0], words)
        except OSError as error:
            os.write(2, f"{words[0]}: {error.strerror}\n".encode())
            os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have heard too, and be gone
            os.kill(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        if ended_by != signal.SIGKILL:
            signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    os._exit(os.waitstatus_to_exitcode(status))


def _become(uid: int, gid: int) -> None:
    """In a user namespace where this process is root: a further one where it is who it is outside (user_namespaces(7))."""
    _call("unshare", KINDS["user"])
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} 0 1"), ("gid_map", f"{gid} 0 1")):
        with open(f"/proc/self/{file}", "w") as map_file:
            map_file.write(text)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "enter":
        cut = rest.index("--")
        enter(int(rest[0]), rest[1].split(","), rest[cut + 1 :], rest[2], rest[3] if cut > 3 else None)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    hold() if role == "hold" else host(*rest)
