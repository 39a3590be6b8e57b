"""SLURM on a virtual cluster: the real daemons, one munged and slurmctld on the first host, a slurmd on each, files in memory.

Sources: slurm.conf(5), munged(8). Debian's build lets a slurmd be told its name (``-N``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from common.errors import RunError, UsageError
from common.namespaces import environment, last_line, program
from common.virtual_host import FOLDER

if TYPE_CHECKING:
    from common.virtual_cluster import VirtualCluster

PACKAGES = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm"}
"""Program → the Debian package that brings it."""
CPUS = 4  # of each host at the least, as SLURM counts them: enough for a few tasks, however few cores there are
_HERE = f"{FOLDER}/slurm"
_START_S = 30.0
_STOP_S = 10.0
_CONF = """\
ClusterName=virtual
SlurmctldHost={first}({address})
AuthInfo=socket={here}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool.%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The daemons. They end with the cluster at the latest."""

    def __init__(self, cluster: VirtualCluster, cpus: int | None = None) -> None:
        """Describes them; ``start`` starts them.

        Args:
            cluster: its hosts are up.
            cpus: that SLURM counts on each host; by default the host's cores, and ``CPUS`` at the least.
        """
        self.cluster, self.cpus = cluster, cpus
        self.first = cluster.names[0]
        self.environment = {"SLURM_CONF": f"{_HERE}/slurm.conf"}
        """For every command on every host."""
        self._folder = cluster.folder / "slurm"
        self._daemons: list[subprocess.Popen[Any]] = []

    def start(self) -> None:
        """Starts the daemons, and returns when all hosts take jobs.

        Raises:
            UsageError: this user has no name.
            RunError: one did not start.
        """
        import pwd  # Unix only

        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            raise UsageError(f"SLURM wants users by name: the number {os.geteuid()} has none in /etc/passwd; enter one") from None
        until = time.monotonic() + _START_S + len(self.cluster.names)
        (self._folder / "state").mkdir(parents=True)
        for name in self.cluster.names:
            (self._folder / f"spool.{name}").mkdir()
        (self._folder / "slurm.conf").write_text(self._configuration())
        key = self._folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        # --force: its socket may lie in a folder that others cannot enter.
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "seed",
        }
        munged = ["munged", "--foreground", "--force", *(f"--{name}={_HERE}/{file}" for name, file in files.items())]
        self._daemon(self.first, munged)
        self._wait((self._folder / "munge.socket").exists, until)
        self._daemon(self.first, ["slurmctld", "-D"])
        for name in self.cluster.names:
            self._daemon(name, ["slurmd", "-D", "-N", name])
        self._wait(self._all_idle, until)

    def stop(self) -> None:
        """Cancels all jobs, waits until they are gone (their steps outlive the daemons), and ends the daemons."""
        if not self._daemons:
            return
        until = time.monotonic() + _STOP_S
        with suppress(subprocess.TimeoutExpired):
            self._ask("scancel", "--partition=all")
            while (queue := self._ask("squeue", "--noheader")).stdout.strip() and not queue.returncode and time.monotonic() < until:
                time.sleep(0.05)
        for daemon in reversed(self._daemons):
            with suppress(ProcessLookupError):
                daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        self._daemons.clear()

    def _configuration(self) -> str:
        cluster = self.cluster
        rows = [
            f"NodeName={name} NodeAddr={address} CPUs={self.cpus or max(CPUS, len(cluster.cores[name]))}"
            for name, address in cluster.addresses.items()
        ]
        facts = {"first": self.first, "address": cluster.addresses[self.first], "user": os.geteuid(), "nodes": "\n".join(rows)}
        return _CONF.format(here=_HERE, **facts)

    def _daemon(self, name: str, words: Sequence[str]) -> None:
        path = program(words[0])
        assert path
        variables = self.environment | {"PATH": environment()["PATH"]}
        with (self._folder / f"{words[0]}.{name}.out").open("wb") as out:  # what it says before it has opened its log
            pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            self._daemons.append(self.cluster.popen(name, [path, *words[1:]], variables, "/", **pipes))

    def _ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.run(words, self.first, _STOP_S, self.environment)[self.first]

    def _all_idle(self) -> bool:
        return self._ask("sinfo", "--noheader", "--format=%D %t").stdout.split() == [str(len(self.cluster.names)), "idle"]

    def _wait(self, done: Callable[[], bool], until: float) -> None:
        while not done():
            dead = any(daemon.poll() is not None for daemon in self._daemons)
            if dead or time.monotonic() > until:
                said = [f"{out.stem}: {last_line(out.read_text())}" for out in sorted(self._folder.glob("*.out"))]
                raise RunError(f"SLURM did not start on the virtual cluster: {'; '.join(said)}")
            time.sleep(0.05)
