#!/usr/bin/env bash
# Makes .venv, or brings it up to date: the package (editable) and its tools, at the versions in constraints.txt.
# Ends with the stamp that the Makefile looks for, so an interrupted run is taken up again by the next `make`.
# Environment: PYTHON (see find_python.sh), PIP_ARGS (further arguments of pip install), VENV (default .venv).
set -euo pipefail
unset CDPATH # with it cd goes elsewhere, and prints where
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
stamp=$venv/installed.stamp
log=$venv/install.log

rm -f "$stamp"
if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
  python=$(scripts/find_python.sh)
  echo "Making $venv with $("$python" --version) ($python)"
  "$python" -m venv --clear "$venv"
fi

if "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then
  echo "Bringing $venv up to date (log: $log)"
else
  echo "Installing into $venv: 2 to 10 minutes, for 3 GB of downloads that unpack to 5.5 GB (log: $log)"
fi
start=$SECONDS
# Of pip's many lines, those that tell a waiting user what takes long.
show() {
  local line
  while IFS= read -r line; do
    echo "$line" >>"$log"
    case $line in
      *"Downloading "*[0-9][0-9].[0-9]" MB"* | *"Downloading "*" GB"*) echo "  ${line#"${line%%[! ]*}"}" ;;
      "Installing collected packages"*) echo "  Unpacking: a minute or two if torch is among the packages" ;;
    esac
  done
}

: >"$log"
# shellcheck disable=SC2086  # PIP_ARGS is a list of words
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
  -c constraints.txt -e '.[dev]' ${PIP_ARGS:-} 2>&1 | show; then
  tail -n 12 "$log" >&2
  echo "error: pip could not install the package (its last lines are above, all of them in $log);" \
    "check the network and the free disk space (8 GB), then run make again." >&2
  exit 1
fi
date >"$stamp"
echo "Installed in $((SECONDS - start)) s"
