#!/usr/bin/env bash
# Starts one host's part of a training by hand, without ssh: type it on every host of hosts.txt, the flags the same everywhere.
#
#   ./start_multi_node.sh master [training flags]        on the first host of the file
#   ./start_multi_node.sh worker [N] [training flags]    on every other one; N, its number (1, 2, …), where its name is not found
#
# HOSTS=FILE names another file. python launchers/ssh.py --hosts hosts.txt does all of it from one place.
set -euo pipefail
usage="usage: ./start_multi_node.sh master|worker [N] [training flags]     (hosts.txt names the hosts; see hosts.example.txt)"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
role=${1:-}
case $role in
  -h | --help)
    echo "$usage"
    exit 0
    ;;
  master | worker) shift ;;
  *)
    echo "error: ${role:-nothing} given; $usage" >&2
    exit 2
    ;;
esac
if [ "$role" = worker ] && [[ ${1:-} =~ ^[0-9]+$ ]]; then
  role=$1
  shift
fi
hosts=${HOSTS:-hosts.txt}
[ -e "$hosts" ] || [ -n "${HOSTS:-}" ] || hosts=$root/hosts.txt
exec "$python" "$root/launchers/ssh.py" --hosts "$hosts" --here "$role" "$@"
