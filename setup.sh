#!/bin/sh
# Makes LaunchLab's environment here and, with --multi-node, on every host of a hosts file; then asks the doctor.
#
#   ./setup.sh                                        .venv in this folder, with what requirements.txt names
#   ./setup.sh --multi-node                           and on the hosts of hosts.txt: copies the commit, makes .venv there, checks
#   ./setup.sh --multi-node --hosts FILE --remote_dir PATH --remote_python PATH --ssh COMMAND --limit SECONDS
#
# What is there already is left as it is: type it again after a change. TORCH_INDEX=https://download.pytorch.org/whl/cpu takes that
# build of PyTorch, PYTHON=python3.12 that Python, here and on the hosts; so do pip's own variables (PIP_…).
set -eu
cd "$(dirname "$0")"

usage() {
  sed -n '2,9s/^# \{0,1\}//p' setup.sh
}

several=
for word in "$@"; do
  case $word in
    --multi-node | --multi_node) several=yes ;;
    -h | --help) usage; exit 0 ;;
  esac
done
if [ -z "$several" ] && [ $# -gt 0 ]; then
  echo "error: $1: no such flag without --multi-node; see ./setup.sh --help" >&2
  exit 2
fi
command -v make >/dev/null || { echo "error: make is not installed; on Debian and Ubuntu: apt install make python3-venv" >&2; exit 2; }

echo "This machine: the environment in .venv"
make .venv/.ready || { echo "error: the environment was not made; what failed stands above" >&2; exit 1; }
if [ -n "$several" ]; then
  exec .venv/bin/python -m common.setup_hosts "$@"
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
exec .venv/bin/python -m common.doctor
