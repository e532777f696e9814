#!/usr/bin/env bash
# Sourced by run.sh and test.sh: makes .venv beside this folder's parent and
# leaves its interpreter in $venv_python. Several ranks may start at once, one
# installs and the others wait; the second time nothing is to be done.
#
# REFRAG_PYTHON names the interpreter to make it with (3.11 or later).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv_python=$root/.venv/bin/python

refrag_find_python() {
  local candidate
  # 3.11 first: the pinned versions were tested with it. Each is really run,
  # since a version manager's shim may be there without its Python.
  for candidate in ${REFRAG_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        >/dev/null 2>&1; then
      command -v "$candidate"
      return 0
    fi
  done
  echo 'refrag_jax: no Python >= 3.11 with venv found: install one (on Debian' \
    'python3-venv as well), or name it in REFRAG_PYTHON' >&2
  return 2
}

refrag_setup() {
  local python hardware build stamp
  python=$venv_python
  [ -x "$python" ] || python=$(refrag_find_python) || return 2
  hardware=$(PYTHONPATH=$root "$python" -m refrag_jax.runtime.environment) || return 1
  build=jax
  [ "$hardware" = nvidia ] && build='jax[cuda12]'
  [ "$hardware" = tpu ] && build='jax[tpu]'
  stamp="$build $(cat "$root/requirements.txt")"
  if [ "$stamp" = "$(cat "$root/.venv/refrag_stamp" 2>/dev/null)" ]; then
    return 0
  fi
  (
    # The lock belongs to the open file, which this shell holds until it ends;
    # Python takes it because macOS has no flock command.
    exec 9>"$root/.venv.lock"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if [ "$stamp" = "$(cat "$root/.venv/refrag_stamp" 2>/dev/null)" ]; then
      exit 0  # another rank did it while this one waited
    fi
    echo "refrag_jax: installing into .venv (once): $build and requirements.txt" >&2
    set -e
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
      # Not there, or left half-made by an interrupted start.
      python=$(refrag_find_python)
      "$python" -m venv --clear "$root/.venv"
    fi
    "$venv_python" -m pip install --quiet --disable-pip-version-check \
      -r "$root/requirements.txt" \
      "$build==$(sed -n 's/^jax==//p' "$root/requirements.txt")"
    printf '%s\n' "$stamp" >"$root/.venv/refrag_stamp.tmp"
    mv "$root/.venv/refrag_stamp.tmp" "$root/.venv/refrag_stamp"
  )
}

refrag_setup || exit $?
# The package is found from any directory, and paths stay the caller's.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
