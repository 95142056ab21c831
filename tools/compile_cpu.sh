#!/bin/sh
# Compiles kernels/cpu with Clang, warnings being errors: the portable path for aarch64, linked without undefined symbols; and all
# paths for this machine, whose tests are run then.
# Usage: tools/compile_cpu.sh [python]     (an interpreter with minillm's packages, pytest and ziglang: a Clang with the C libraries
# of other machines; without ziglang it says so and does nothing)
set -e
python=$(realpath -s "$(command -v "${1:-python3}")")
root=$(cd "$(dirname "$0")/.." && pwd)
if ! zig=$("$python" -c "import ziglang; print(ziglang.__path__[0] + '/zig')" 2>/dev/null); then
    echo "tools/compile_cpu.sh: $python has no ziglang (pip install ziglang): Clang and aarch64 were not tried" >&2
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
clang="$zig cc"
cd "$root" && $clang -target aarch64-linux-gnu -std=gnu11 -O2 -Wall -Wextra -Werror -fPIC -shared -Wl,--no-undefined \
    -DMINILLM_PATH=portable -Ikernels/cpu kernels/cpu/*.c -lm -lpthread -o "$work/aarch64.so"

mkdir "$work/tree"
cp -r minillm kernels setup.py pyproject.toml README.md LICENSE "$work/tree" && cd "$work"
rm -f tree/minillm/ops/_cpu.*
CC="$clang -target $(uname -m)-linux-gnu" LDSHARED="$clang -target $(uname -m)-linux-gnu -shared" CFLAGS=-Werror \
    "$python" -m pip install -q --no-deps --target site ./tree
ls site/minillm/ops/_cpu.* >/dev/null
PYTHONPATH=site "$python" -m pytest -x -p no:cacheprovider "$root/tests/ops/test_cpu_ops.py" "$root/tests/compress/test_scores.py"
