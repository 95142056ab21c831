#!/bin/sh
# Builds kernels/cpu with the address and undefined-behaviour sanitizers in a copy of the tree and runs their tests there.
# Usage: tools/sanitize_cpu.sh [python]     (the interpreter needs numpy, pytest and setuptools >= 77; GCC on Linux)
set -e
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/minillm" "$root/kernels" "$root/tests" "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$work"
cd "$work"
rm -f minillm/ops/_cpu.*
CC=gcc CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
    LDFLAGS="-fsanitize=address,undefined" "$python" setup.py -q build_ext --inplace
# Python leaks by design; the sanitizers' libraries must come first; -s, or pytest would swallow their report.
ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" PYTHONPATH=. \
    "$python" -m pytest -s -x -p no:cacheprovider tests/test_cpu_ops.py
