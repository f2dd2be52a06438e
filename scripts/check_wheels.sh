#!/usr/bin/env bash
# Install each distribution of a folder into an empty environment, where there is neither nvcc nor a GPU, and use it.
#
#   scripts/check_wheels.sh DIST PYTHON...
#
# DIST holds what `python -m build` or cibuildwheel made. A wheel for another Python is passed over in words. The
# versions of constraints.txt are installed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
dist=$(cd "$1" && pwd)
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checked=0
for python in "$@"; do
  python=$(command -v "$python")
  tag=$("$python" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
  "$python" -m venv --clear "$work/env"
  for file in "$dist"/*.whl "$dist"/*.tar.gz; do
    [ -e "$file" ] || continue
    case $file in
      *-py3-none-any.whl | *.tar.gz) wanted=sources ;;
      *-"$tag-$tag"-*.whl) wanted=compiled ;;
      *) echo "$tag: $(basename "$file") is not for it"; continue ;;
    esac
    echo "$tag: $(basename "$file")"
    # no nvcc on PATH nor in CUDA_HOME, and sources compile nothing with one that lies elsewhere
    (
      cd "$work"
      export PATH="$work/env/bin:/usr/bin:/bin" CUDA_HOME="$work/none" FUSED_PO_JIT=0 FUSED_PO_BUILD_CUDA=0 PIP_DISABLE_PIP_VERSION_CHECK=1
      # what it needs stays in the environment for the next; the package itself does not
      pip uninstall -q -y fused-po 2> "$work/none-yet"
      pip install -q -c "$root/constraints.txt" "$file"
      pip check
      python -I "$root/scripts/smoke.py" "$wanted"
      fused-po --help > "$work/help"
      fused-po doctor > "$work/doctor" || { cat "$work/doctor"; exit 1; }
    )
    checked=$((checked + 1))
  done
done
[ $checked -gt 0 ] || { echo "nothing in $dist is for these" >&2; exit 1; }
echo "$checked distributions installed and used"
