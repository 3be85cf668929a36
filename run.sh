#!/usr/bin/env bash
# bash run.sh [flags]   installs once, then trains the embedded tiny model; flags go to the job (try --help)
# bash run.sh test      installs once, then runs the tests; further arguments go to pytest
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
python=$venv/bin/python

if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python ""; do
    if "${candidate:-false}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then break; fi
  done
  [ -n "$candidate" ] || { echo "error: no Python 3.10 to 3.13 on the PATH; install one and start again" >&2; exit 2; }
  echo "installing requirements.txt into $venv with $candidate (once, a few minutes)"
  "$candidate" -m venv "$venv" || { echo "error: $candidate has no venv module; on Debian: apt install python3-venv" >&2; exit 2; }
  "$python" -m pip install --quiet --disable-pip-version-check --requirement "$here/requirements.txt" \
    || { echo "error: the installation failed (see above); start again to retry" >&2; exit 1; }
  cp "$here/requirements.txt" "$venv/installed.txt"
fi

if [ "${1:-}" = test ]; then
  cd "$here"
  exec "$python" -m pytest "${@:2}"
fi
exec "$python" "$here/bpgo.py" "$@"
