#!/bin/sh
# Runs the CUDA kernels in the emulator under sanitizers: ASan and UBSan (memory outside arrays, misaligned loads), then TSan
# (races between the threads of a block, and between neighbouring blocks). Each part ends with how long it took and how often
# every kernel ran on how many blocks at most, and fails where one never ran on several.
# Usage: tools/sanitize_cuda.sh [python [address|thread]]
# (the interpreter needs minillm's extra dev; g++ with its sanitizers on x86-64)
set -e
python=${1:-python3}
parts=${2:-address thread}
cd "$(dirname "$0")/.."
library() { g++ -print-file-name="lib$1.so"; }
export OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 TSAN_OPTIONS=exitcode=66

for part in $parts; do
    case $part in
        address) chosen="not gpu" preload="$(library asan) $(library ubsan)" workers=auto ;;
        # To TSan each thread of a block is a thread: tests run the cases that they name (emulator.cases), and not in every order.
        thread) chosen="not gpu and not order_of_threads" preload="$(library tsan)" workers=0 ;;
        *) echo "a part is address or thread, not $part" >&2 && exit 2 ;;
    esac
    echo "== $part"
    MINILLM_EMULATOR=$part LD_PRELOAD=$preload "$python" -m pytest -n $workers -x -s -p no:cacheprovider -k "$chosen" --durations=10 \
        tests/cuda/test_cuda_kernels.py tests/cuda/test_cuda_attention.py tests/cuda/test_cuda_sampling.py
done
