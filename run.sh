#!/usr/bin/env bash
# bash run.sh [flags]   installs once, then trains the embedded tiny model; flags go to the job (try --help)
# bash run.sh test      installs once, then runs the tests; further arguments go to pytest
#
# PYTHON=python3.12     the interpreter to install with; default: the first of 3.10 to 3.13 that is found
# VENV=FOLDER           where to install; default: .venv beside this file
# VERSIONS=exact        the versions of the last passing tests (requirements.lock); oldest: the lower bounds of requirements.txt
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv}
python=$venv/bin/python
list=requirements.txt
[ "${1:-}" = test ] && list=requirements-test.txt

# Prints what an installation is made of. Nothing is installed if the stamp file has the same text.
wanted() { echo "${VERSIONS:-newest} ${PYTHON:-}"; cat "$here/requirements.txt" "$here/$1"; [ "${VERSIONS:-}" != exact ] || cat "$here/requirements.lock"; }
installed() { [ "$(wanted "$1")" = "$(cat "$venv/$1.installed" 2>/dev/null)" ] && "$python" -c '' 2>/dev/null; }

install() {
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.10 python; fi
  for candidate in "$@" ""; do
    if "${candidate:-false}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then break; fi
  done
  [ -n "$candidate" ] || { echo "error: no Python 3.10 to 3.13 (${PYTHON:-on the PATH}); install one and start again" >&2; exit 2; }
  exec 9>"$venv.lock"  # a second run.sh waits here; the lock ends with this process, however it ends
  "$candidate" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! installed "$list"; then
    echo "installing $list into $venv with $candidate (once, a few minutes)"
    # removes an installation that was interrupted, or that another Python made
    clear=; [ "$(cat "$venv/complete" 2>/dev/null)" = "$candidate" ] && "$python" -c '' 2>/dev/null || clear=--clear
    rm -f "$venv/complete" "$venv"/*.installed
    case ${VERSIONS:-newest} in
      newest) bounds=/dev/null ;;
      exact) bounds=$here/requirements.lock ;;
      oldest) bounds=$venv.oldest; sed -n 's/ *>=/==/p' "$here/requirements.txt" >"$bounds" ;;
      *) echo "error: VERSIONS=$VERSIONS: newest, exact or oldest" >&2; exit 2 ;;
    esac
    "$candidate" -m venv $clear "$venv" || { echo "error: $candidate has no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
    "$python" -m pip install --quiet --disable-pip-version-check --requirement "$here/$list" --constraint "$bounds" \
      || { echo "error: the installation failed (see above); start again to retry" >&2; exit 1; }
    wanted "$list" >"$venv/$list.installed"
    [ $list = requirements.txt ] || wanted requirements.txt >"$venv/requirements.txt.installed"  # it holds this one
    echo "$candidate" >"$venv/complete"
  fi
  exec 9>&-
}

installed "$list" || install
if [ "${1:-}" = test ]; then
  cd "$here"
  exec "$python" -m pytest "${@:2}"
fi
exec "$python" "$here/bpgo.py" "$@"
