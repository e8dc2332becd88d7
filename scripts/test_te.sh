#!/usr/bin/env bash
# Tests the layers of Transformer Engine on a CPU: its own Python, with plain torch in place of its compiled kernels.
# Its Python, and what that imports, go into the folder .te, so that no other test finds them.
# Arguments are passed on to pytest.
# Environment: PIP_ARGS (see make_venv.sh), VENV (default .venv), TEST_WORKERS (default 2).
set -euo pipefail
unset CDPATH # with it cd goes elsewhere, and prints where
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${VENV:-.venv}/bin/python
folder=$PWD/.te
packages=(transformer_engine==2.20.2 einops==0.8.2 onnxscript==0.7.2 onnx==1.23.2 onnx_ir==1.1.0 ml_dtypes==0.6.0)
wanted="$("$python" --version) ${packages[*]}"

if [ "$(cat "$folder/installed.stamp" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$folder"
  # Without dependencies: torch, numpy and the like are the virtual environment's.
  # shellcheck disable=SC2086  # PIP_ARGS is a list of words
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" ${PIP_ARGS:-} "${packages[@]}"
  echo '*' >"$folder/.gitignore"
  echo "$wanted" >"$folder/installed.stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" MEGATRON_MOA_TE_ON_CPU=1
"$python" -m pytest -n "${TEST_WORKERS:-2}" -W ignore tests/te "$@"
