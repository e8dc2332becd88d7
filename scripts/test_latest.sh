#!/usr/bin/env bash
# Tests the Hugging Face side with the newest transformers of the package registry, in an environment of its own.
# Runs this project's tests of exports and imports, then transformers' own common tests of models on ours.
# Environment: PYTHON and PIP_ARGS (see make_venv.sh), VENV_LATEST (default .venv-latest), TRANSFORMERS_TESTS (the
# folder tests of a git checkout of transformers; default: that of the source distribution).
set -euo pipefail
unset CDPATH # with it cd goes elsewhere, and prints where
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV_LATEST:-.venv-latest}
stamp=$venv/installed.stamp

if [ ! -f "$stamp" ] || [ constraints.txt -nt "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  rm -rf "$venv"
  VENV=$venv scripts/make_venv.sh
  echo '*' >"$venv/.gitignore"
fi
# Beyond the versions in constraints.txt, and beyond setup.py's upper bound, which moves once these tests pass.
read -ra pip_args <<<"${PIP_ARGS:-}"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "${pip_args[@]}" transformers parameterized
version=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("transformers"))')
echo "transformers $version"
source=$venv/transformers-$version
if [ -z "${TRANSFORMERS_TESTS:-}" ]; then
  if [ ! -d "$source/tests" ]; then
    "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
      --no-binary :all: --dest "$venv" "${pip_args[@]}" "transformers==$version"
    tar -xzf "$source.tar.gz" -C "$venv"
  fi
  export TRANSFORMERS_TESTS=$source/tests
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
# Without the 16 trainings that test_logits.py compares logits of: those of test_convert_to_hf.py suffice here.
"$venv/bin/python" -m pytest -m "not full" -W ignore \
  tests/hf/test_model.py tests/hf/test_exported_code.py tests/hf/test_graphs.py tests/hf/test_feed_forward.py \
  tests/hf/test_use.py tests/hf/test_folder.py tests/hf/test_version1.py tests/hf/test_families.py \
  tests/hf/test_convert_to_hf.py tests/hf/test_convert_from_hf.py tests/trained/test_text_model.py
# Transformers' markers are none of ours, so that strict markers would refuse them.
"$venv/bin/python" -m pytest -o addopts= -q -W ignore tests/latest
