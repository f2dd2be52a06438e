#!/usr/bin/env bash
# Trainers that take log-probs from logits, against several versions of TRL: an environment for each in a temporary
# folder, with the other packages of the development environment where that version allows them.
#
#   scripts/check_trl_versions.sh 0.24.0 0.29.1 1.0.0 1.9.2 1.14.2
#
# PYTHON names the interpreter. Status 1 if a version fails.
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: $0 VERSION..." >&2
  exit 2
fi
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

pin() {
  sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt | head -n 1
}

for version in "$@"; do
  "${PYTHON:-python3}" -m venv "$folder/$version"
  python="$folder/$version/bin/python"
  # TRL before 1.0 wants transformers 4
  newest=6 && case $version in 0.*) newest=5 ;; esac
  "$python" -m pip install -q "trl==$version" "transformers<$newest" \
    "torch==$(pin torch)" "triton==$(pin triton)" peft matplotlib scipy rich jinja2 requests pytest hypothesis
  if PYTHONPATH=$PWD "$python" -m pytest -q -p no:cacheprovider tests/trainers/test_{trl_on_logits,deferred,output_layer}.py; then
    echo "TRL $version: passed"
  else
    echo "TRL $version: FAILED"
    failed=1
  fi
  rm -rf "${folder:?}/$version"
done
exit $failed
