#!/usr/bin/env bash
# Prints the path of a Python that can make the project's .venv: CPython >= 3.12 with venv, pip and ssl.
# PYTHON=… is taken or refused; otherwise 3.12 (the version tested) is preferred, then 3.13, then newer ones.
# Exit code 2 and one sentence when there is none. Builtins only, and nothing newer than bash 3.2 (macOS).
set -uo pipefail

usable='import sys, sysconfig
if sys.version_info < (3, 12) or sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(3)
import ctypes, ensurepip, ssl, venv, zlib
print(sys.version_info[1], sys.executable)'

die() {
  echo "error: $*" >&2
  exit 2
}

if [ -n "${PYTHON:-}" ]; then
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    die "PYTHON=$PYTHON does not run; give the path of a Python >= 3.12, or leave PYTHON unset to have one looked for."
  found=$("$PYTHON" -c "$usable" 2>/dev/null)
  case $? in
    0) echo "${found#* }"; exit 0 ;;
    3) die "PYTHON=$PYTHON is Python $version, but the usual (GIL) CPython >= 3.12 is needed; name another, or leave PYTHON unset." ;;
    *) die "PYTHON=$PYTHON (Python $version) lacks a standard module (venv, ensurepip, ssl, ctypes or zlib); on Debian and Ubuntu: apt install python$version-venv." ;;
  esac
fi

best_minor=999
best=""
# try FILE…: keeps the usable one with the lowest minor version. Each is run: pyenv's shims exist for versions that are
# not active and then only print an error. Ends the script at the first 3.12.
try() {
  local file found minor
  for file in "$@"; do
    [ -x "$file" ] && [ ! -d "$file" ] || continue
    found=$("$file" -c "$usable" 2>/dev/null </dev/null) || continue
    minor=${found%% *}
    if [ "$minor" -lt "$best_minor" ]; then
      best_minor=$minor
      best=${found#* }
    fi
    if [ "$best_minor" -eq 12 ]; then
      echo "$best"
      exit 0
    fi
  done
}

# every FILE of that name on PATH, not only the first: the first may be a shim that fails or an old one
on_path() { type -aP "$1" 2>/dev/null; }
try_names() {
  local name file
  for name in "$@"; do
    while IFS= read -r file; do try "$file"; done <<<"$(on_path "$name")"
  done
}

try_names python3.12 python3.13 python3.14 python3 python

# pyenv's folder: HOME may be a foreign or an empty one, so it is also taken from where its command and its shims lie.
roots=("${PYENV_ROOT:-}" "${HOME:+$HOME/.pyenv}")
for name in pyenv python3 python; do
  while IFS= read -r file; do
    case $file in
      */libexec/pyenv) roots+=("${file%/libexec/pyenv}") ;;
      */bin/pyenv) roots+=("${file%/bin/pyenv}") ;;
      */shims/*) roots+=("${file%/shims/*}") ;;
    esac
  done <<<"$(on_path "$name")"
done
for root in "${roots[@]}"; do
  [ -n "$root" ] && try "$root"/versions/3.12*/bin/python3 "$root"/versions/3.1[3-9]*/bin/python3
done

if [ -n "$(on_path uv)" ]; then
  for version in 3.12 3.13 '>=3.12'; do
    file=$(uv python find --no-project "$version" 2>/dev/null </dev/null) && try "$file"
  done
fi

[ -n "$best" ] || die "no Python >= 3.12 (with venv and pip) was found; install one, for instance with \`uv python install 3.12\`" \
  "or \`pyenv install 3.12\` or \`apt install python3.12-venv\`, or name yours: make PYTHON=/path/to/python3.12 …"
echo "$best"
