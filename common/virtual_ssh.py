"""An sshd on each host of a virtual cluster: real ones, with keys of the cluster's own, in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from common.errors import RunError
from common.virtual_host import FOLDER

if TYPE_CHECKING:
    from common.virtual_cluster import VirtualCluster

_START_S = 10.0
_SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 200
ClientAliveInterval 2
ClientAliveCountMax 3
Subsystem sftp internal-sftp
"""
_SSH = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 10
  LogLevel ERROR
"""


def write_files(cluster: VirtualCluster) -> None:
    """Keys, and both sides' configuration, for the hosts to be made."""
    folder = cluster.folder
    for name in ("host_key", "key"):
        path = folder / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"virtual cluster {name}", "-f", str(path)],
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=_START_S,
        )
        path.chmod(0o600)
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    known = [f"{name},{name}-ip6,{address},localhost,127.0.0.1 {public}\n" for name, address in cluster.addresses.items()]
    (folder / "known_hosts").write_text("".join(known))
    (folder / "ssh_config").write_text(_SSH.format(folder=FOLDER))
    (folder / "sshd_config").write_text(_SSHD.format(folder=FOLDER))


def start_daemons(cluster: VirtualCluster) -> None:
    """Starts them, and returns when they let this user in.

    Raises:
        RunError: one does not.
    """
    sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert sshd
    words = [sshd, "-f", f"{FOLDER}/sshd_config", "-E", f"{FOLDER}/{{name}}.sshd.log"]
    ended = cluster.run(words, timeout=_START_S * len(cluster.names))
    first = cluster.names[0]
    failed = [name for name in cluster.names if ended[name].returncode]
    if not failed:  # it listens by then; what one lets in, all let in
        ended[first] = cluster.run(["ssh", first, "true"], on=first, timeout=_START_S)[first]
        failed = [first] if ended[first].returncode else []
    for name in failed:
        log = cluster.folder / f"{name}.sshd.log"
        said = " ".join((ended[name].stderr + (log.read_text() if log.exists() else "")).split())
        raise RunError(f"sshd on {name} did not start: {said or ended[name].returncode}")
