#!/bin/sh
# Runs the CUDA kernels in the emulator under sanitizers: ASan and UBSan (memory outside arrays, misaligned loads), then TSan
# (races between threads of a block and, where a kernel has no static shared memory, between blocks).
# Usage: tools/sanitize_cuda.sh [python]      (the interpreter needs minillm and pytest; g++ with its sanitizers on x86-64)
set -e
python=${1:-python3}
cd "$(dirname "$0")/.."
library() { g++ -print-file-name="lib$1.so"; }
export OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1

run() { "$python" -m pytest -x -q -s -p no:cacheprovider -k "not gpu" "$@"; }

MINILLM_EMULATOR=address ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 LD_PRELOAD="$(library asan) $(library ubsan)" \
    run tests/test_cuda_kernels.py tests/test_cuda_attention.py tests/test_cuda_sampling.py
# Each thread of a block is a thread to TSan, which costs 50 times the plain run: the small shapes.
MINILLM_EMULATOR=thread TSAN_OPTIONS=exitcode=66 LD_PRELOAD="$(library tsan)" \
    run tests/test_cuda_attention.py -k "not gpu and (decode_groups and 4-64 or prefill_groups and 1-64 or test_scores and lengths1 and 3-50-half)"
MINILLM_EMULATOR=thread TSAN_OPTIONS=exitcode=66 LD_PRELOAD="$(library tsan)" \
    run tests/test_cuda_kernels.py -k "not gpu and not order and not Q4_1 and not 1056 and not 4096"
MINILLM_EMULATOR=thread TSAN_OPTIONS=exitcode=66 LD_PRELOAD="$(library tsan)" \
    run tests/test_cuda_sampling.py -k "not gpu and every and 37 and top_k and min_p"
