#!/bin/sh
# Builds kernels/cpu with sanitizers, away from the checkout, and runs their tests there.
# Usage: tools/sanitize_cpu.sh [python] [sanitizers]     (an interpreter with minillm's extra dev; GCC on Linux)
# Sanitizers: address,undefined (default) or thread.
set -e
python=$(realpath -s "$(command -v "${1:-python3}")")
sanitizers=${2:-address,undefined}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree"
cd "$root" && cp -r minillm kernels setup.py pyproject.toml README.md LICENSE "$work/tree" && cd "$work"
rm -f tree/minillm/ops/_cpu.*
CC=gcc CFLAGS="-O1 -g -fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer" LDFLAGS="-fsanitize=$sanitizers" \
    "$python" -m pip install -q --no-deps --target site ./tree
ls site/minillm/ops/_cpu.* >/dev/null
# The sanitizers' libraries must be in the process before Python; Python leaks by design.
case $sanitizers in
thread) preload=$(gcc -print-file-name=libtsan.so) workers=0 ;;
*) preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" workers=auto ;;
esac
# -s: pytest would swallow a report. One thread of OpenBLAS: nothing sees how its threads wait for one another.
export OPENBLAS_NUM_THREADS=1
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 LD_PRELOAD=$preload \
    PYTHONPATH=$work/site "$python" -m pytest -n $workers -s -x -p no:cacheprovider -k "not greedy_text" \
    "$root/tests/ops/test_cpu_ops.py" "$root/tests/compress/test_scores.py" "$root/tests/model/test_cpu_model.py"
