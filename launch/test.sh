#!/usr/bin/env bash
# launch/test.sh ARGS: pytest ARGS, in .venv, which is made first if need be.
# Without ARGS the quick suite, in two processes, each with half of the tests,
# in order, until one has nothing left: few fixtures are made twice.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root" || exit 1
[ $# -gt 0 ] || set -- -n 2 --dist worksteal
exec "$venv_python" -m pytest "$@"
