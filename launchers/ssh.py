"""SSH: one torchrun on each host of a file, started from here.

python launchers/ssh.py --hosts hosts.txt                 (hosts.example.txt shows what is in it)
python launchers/ssh.py --mode multi-node --master-node lab1 --worker-nodes lab2 --gpus-per-node 2 --port 29500
python launchers/ssh.py --mode single-node --gpus 2       (this machine, without ssh)
python launchers/ssh.py --hosts hosts.txt --print         (shows what to type on each host)

python ssh.py (looks at all hosts first; prints what comes from each behind its name)
  |-- ssh lab1 -- remote_guard.py -- torchrun --node_rank=0 --.-- python torchrun.py    RANK=0 LOCAL_RANK=0 --.
  |                                                           `-- python torchrun.py    RANK=1 LOCAL_RANK=1 --+
  `-- ssh lab2 -- remote_guard.py -- torchrun --node_rank=1 --.-- python torchrun.py    RANK=2 LOCAL_RANK=0 --+
                                                              `-- python torchrun.py    RANK=3 LOCAL_RANK=1 --+-- one process group
The guard ends all of its host's processes when its ssh ends, however that comes.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checks import check_world
from common.children import in_words, overall
from common.command_line import parse_config, settings
from common.config import TrainConfig
from common.errors import complain, exit_status
from common.host_checks import Findings, check_hosts
from common.host_probe import DEFAULT_PORT, gpus
from common.hosts import shell_line
from common.ports import PortReservation
from common.prefixed import run_prefixed
from common.ssh_flags import SshFlags, help_text, parse_ssh_flags, variables


def arguments(flags: SshFlags, node: int, ranks: Sequence[int], master: str, port: int, training: Sequence[str]) -> list[str]:
    """The torchrun of one node, after the words that start it; ``ranks`` are those of each node."""
    where = [f"--nnodes={len(ranks)}", f"--node_rank={node}", f"--nproc_per_node={ranks[node]}"]
    where += [f"--master_addr={master}", f"--master_port={port}"]
    return [*where, f"{flags.place.root}/launchers/torchrun.py", *training]


def look(flags: SshFlags) -> Findings:
    """What the hosts are like; without looking, what is hoped for."""
    if flags.single:
        return Findings(master_addr="127.0.0.1", gpus=[gpus()])
    if flags.print_only or flags.no_checks or flags.here is not None:
        return Findings(master_addr=flags.hosts[0].name, master_port=flags.port or DEFAULT_PORT, gpus=[0] * len(flags.hosts))
    return check_hosts(flags.hosts, flags.place, flags.port, flags.ssh_timeout)


def run(flags: SshFlags, commands: dict[str, list[str]]) -> int:
    """Runs the nodes' commands to their end, and says which failed first."""
    order = list(commands)
    failed: list[str] = []

    def ended(name: str, status: int) -> None:
        if status and not failed:
            failed.append(name)
            how = "ended first, with " + in_words(128 - status if 128 < status < 160 else status)
            how = "gave no status: the connection is lost, or its guard was killed" if status == 255 else how  # ssh(1)
            rest = f"; ending the other {len(order) - 1 if len(order) > 2 else 'node'}" if len(order) > 1 else ""
            complain(f"ssh.py: node {order.index(name)}{f' ({name})' if name else ''} {how}{rest}.")

    return overall(list(run_prefixed(commands, lifeline=True, hush=True, patience=2, ended=ended).values()))


def start(flags: SshFlags, config: TrainConfig, training: Sequence[str], settled: dict[str, str]) -> int:
    """Looks, then starts every node, or shows how."""
    found = look(flags)
    for note in found.notes:
        complain(f"note: {note}")
    for problem in found.problems:
        complain(f"error: {problem}")
    if found.problems:
        return 2
    ranks = [slots or found.gpus[node] or 1 for node, slots in enumerate(flags.slots)]
    check_world(config, sum(ranks))
    with PortReservation(flags.port if flags.single else None) as free_port:
        port = free_port if flags.single else found.master_port
        words = [arguments(flags, node, ranks, found.master_addr, port, training) for node in range(len(ranks))]
        if flags.print_only:
            for node, each in enumerate(words):
                name = flags.hosts[node].label if flags.hosts else "this machine"
                line = shell_line([flags.place.python, "-m", "torch.distributed.run", *each], flags.place.folder, settled)
                print(f"# node {node}, on {name}:\n({line})")
            return 0
        tell = {"LOGLEVEL": os.environ.get("LOGLEVEL", "ERROR")}  # torchrun's: or it explains OMP_NUM_THREADS on every host
        torchrun = [flags.place.python, f"{flags.place.root}/common/quiet_torchrun.py"]
        guard = [flags.place.python, "-I", "-S", f"{flags.place.root}/common/remote_guard.py", "--silence", f"{flags.lost_after:g}"]
        lines = [shell_line([*guard, *torchrun, *each], flags.place.folder, settled | tell) for each in words]
        if flags.single or flags.here is not None:
            return run(flags, {"": ["sh", "-c", lines[flags.here or 0]]})
        return run(flags, {host.label: host.ssh(line, flags.place.ssh) for host, line in zip(flags.hosts, lines, strict=True)})


def main() -> int:
    """This machine's part, which need not be one of the hosts."""
    flags, training = parse_ssh_flags()
    settled = settings()
    config = parse_config("ssh.py", f"{__doc__}\n{help_text()}", argv=training, environment=settled)
    return start(flags, config, training, variables(flags, settled))


if __name__ == "__main__":
    sys.exit(exit_status(main))
