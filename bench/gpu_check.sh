#!/usr/bin/env bash
# Tests and short timings on a GPU machine, from a checkout: nothing is installed but PyTorch, Triton and pytest, for the
# CUDA extension nvcc, ninja and pybind11. Peers may be on PYTHONPATH.
#
#   bench/gpu_check.sh OUTDIR
#   STAGES="build sanitize" bench/gpu_check.sh OUTDIR
#
# Each writes summary.txt, log.txt and JSON files to OUTDIR and ends in under nine minutes with a summary, and with status
# 1 if a stage failed or a target of bench/targets.py is missed. The second puts the kernels under compute-sanitizer,
# where importing torch alone takes most of a minute. Cases that the time doesn't reach are left out, and their targets
# "not run". STAGES takes only those that it names; ROWS_SECONDS, TARGETS_SECONDS, PAIRS_SECONDS and SANITIZE_SECONDS give
# another limit: for all targets take STAGES="targets pairs checks" TARGETS_SECONDS=420 PAIRS_SECONDS=100. STAGES=tune,
# which is not among those taken unasked, measures block sizes twice for bench/tune.py --write.
# PYTHON names the interpreter. COMMIT names what is measured where git can't tell; without either it is a hash of the
# sources, which summary.txt of STAGES=none gives for any checkout.
# DEVICE=cpu takes the same stages with small cases on a CPU (where tests for a GPU are skipped), to check this script; of
# them only tune needs Triton's interpreter, which in Triton 3.6 does not run under NumPy 2.4.
set -u

if [ $# -ne 1 ]; then
  echo "usage: $0 OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
stages=" ${STAGES:-machine build tests rows targets pairs checks} "
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# a build of these sources, whatever this machine built before
export FUSED_PO_CACHE="$work/cache"
failed=0
: >"$out/summary.txt"
: >"$out/log.txt"

commit=${COMMIT:-$(git describe --always --dirty --match= 2>/dev/null)}
if [ -z "$commit" ]; then
  commit=sources-$(find fused_po csrc bench tests -type f \( -name '*.py' -o -name '*.cu*' -o -name '*.h' -o -name '*.cpp' -o -name '*.sh' \) -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-12)
fi

note() {
  echo "$1" | tee -a "$out/summary.txt"
}

# stage NAME SECONDS COMMAND...: its output goes to the log; one that fails doesn't stop the next
stage() {
  local name=$1 limit=$2 start=$SECONDS status verdict=passed
  shift 2
  echo "== $name" | tee -a "$out/log.txt"
  timeout --kill-after=5 "$limit" "$@" >"$work/log" 2>&1
  status=$?
  case $status in
    0) ;;
    124 | 137) verdict="FAILED, over its $limit s" ;;
    *) verdict="FAILED, status $status" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  cat "$work/log" >>"$out/log.txt"
  tail -n 50 "$work/log"
  note "$name: $verdict after $((SECONDS - start)) s"
}

note "commit: $commit"

wanted() {
  [[ $stages == *" $1 "* ]]
}

# compiles the extension at its first use, and holds every backend to the accuracy rule
doctor() {
  "$python" -c 'import sys; from fused_po.cli import main; sys.exit(main(["doctor", "--json"]))' >"$out/doctor.json"
  local status=$?
  cat "$out/doctor.json"
  [ "$device" = cpu ] || grep -q '"loaded_from": "' "$out/doctor.json" || { echo "no CUDA extension"; return 1; }
  return $status
}
# for timeout, which runs programs
export -f doctor
export python device out

wanted machine && stage machine 60 "$python" - "$device" <<'PYTHON'
import platform, sys, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
assert torch.ones(8, device=sys.argv[1]).sum().item() == 8
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_properties(0))
PYTHON

wanted build && stage build 80 bash -c doctor

if wanted tests; then
  # only the files with such tests: what others import need not be there
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
  # these take their backends from another file
  files+=(tests/kernels/test_shards.py)
  workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
  stage tests 100 "$python" -m pytest -m gpu "${workers[@]+"${workers[@]}"}" \
    --continue-on-collection-errors --durations=10 "${files[@]}"
  # the operations once more on the backend that did not come first
  stage tests-triton 35 env FUSED_PO_BACKEND=triton "$python" -m pytest -m gpu "${workers[@]+"${workers[@]}"}" \
    tests/gpu/test_ops.py
fi

if wanted sanitize; then
  if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
      stage "$tool" "${SANITIZE_SECONDS:-140}" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m tests.gpu.sanitize
    done
  else
    note "sanitize: not run, $([ "$device" = cuda ] && echo "compute-sanitizer is not installed" || echo "needs a GPU")"
  fi
fi

cases=()
[ "$device" = cpu ] && cases=(--seconds 0.3)
limit=${ROWS_SECONDS:-45}
wanted rows && stage rows "$limit" "$python" -m bench.bench_rows --quick --seconds 1.5 --device "$device" \
  --commit "$commit" --stop-after $((limit * 2 / 3)) --output "$out/rows.json" "${cases[@]+"${cases[@]}"}"

limit=${TARGETS_SECONDS:-155}
# what a target compares: the other routes and backends have no promise
wanted targets && stage targets "$limit" "$python" -m fused_po bench --cases targets --methods linear_loss peers --seconds 1 --device "$device" \
  --commit "$commit" --stop-after $((limit * 4 / 5)) --output "$out/targets.json" "${cases[@]+"${cases[@]}"}"

# what needs the logits of the long pair has no place
limit=${PAIRS_SECONDS:-45}
wanted pairs && stage pairs "$limit" "$python" -m fused_po bench --cases pairs --methods linear_loss trl --seconds 1 \
  --device "$device" --commit "$commit" --stop-after $((limit * 4 / 5)) --output "$out/pairs.json" \
  "${cases[@]+"${cases[@]}"}"

if wanted tune; then
  for run in first second; do
    # interpreted where there is no GPU
    stage "tune-$run" 240 env TRITON_INTERPRET="$([ "$device" = cpu ] && echo 1 || echo 0)" "$python" -m bench.tune --device "$device" --commit "$commit" --stop-after 200 \
      --seconds "$([ "$device" = cpu ] && echo 0.1 || echo 2)" --output "$out/tune-$run.json"
  done
fi

wanted checks && stage checks 20 "$python" -m bench.targets "$out/targets.json" "$out/pairs.json"

echo "== summary"
cat "$out/summary.txt"
exit $failed
