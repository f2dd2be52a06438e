#!/usr/bin/env bash
# Tests and short timings on a GPU machine, from a checkout: nothing is installed but PyTorch, Triton and pytest.
#
#   bench/gpu_check.sh OUTDIR
#
# Writes logs and JSON to OUTDIR, ends in under nine minutes with a summary, and with status 1 if a stage failed.
# PYTHON names the interpreter, COMMIT the commit where git can't tell. DEVICE=cpu takes the same stages with small cases
# on a CPU (where tests for a GPU are skipped), to check this script.
set -u

if [ $# -ne 1 ]; then
  echo "usage: $0 OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
: >"$out/summary.txt"

# stage NAME SECONDS COMMAND...: its output goes to NAME.log; one that fails doesn't stop the next
stage() {
  local name=$1 limit=$2 start=$SECONDS status verdict=passed
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) ;;
    124 | 137) verdict="FAILED, over its $limit s" ;;
    *) verdict="FAILED, status $status" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  tail -n 60 "$out/$name.log"
  echo "$name: $verdict after $((SECONDS - start)) s" >>"$out/summary.txt"
}

stage machine 30 "$python" - "$device" <<'PYTHON'
import platform, sys, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
assert torch.ones(8, device=sys.argv[1]).sum().item() == 8
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_properties(0))
PYTHON

# only the files with such tests: what others import need not be there
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
stage tests 230 "$python" -m pytest -m gpu "${workers[@]+"${workers[@]}"}" --continue-on-collection-errors \
  --durations=10 "${files[@]}"

cases=()
[ "$device" = cpu ] && cases=(--quick --seconds 0.5)
stage ops 230 "$python" -m bench.bench_ops --device "$device" --commit "${COMMIT:-}" --stop-after 180 \
  --output "$out/ops.json" "${cases[@]+"${cases[@]}"}"

echo "== summary"
cat "$out/summary.txt"
exit $failed
