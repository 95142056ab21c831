"""From kernels/cuda/*.cu to a launch: nothing else computes grid, block, shared memory or the order of arguments. A
device (cuda_device.py, or the emulator of the tests) compiles and starts what it is given here, and knows nothing of
any kernel.

    head_sizes.py    the sizes of heads, and how each is shared out to threads
    sources.py       kernel files, the variants they are made for, and what their kernels take
    start.py         a kernel compiled, its arguments checked, started
    elementwise.py products.py rope.py attention.py sampling.py
                     the forward pass, up to the next token
    pages.py         the cache
    scores.py planning.py merging.py
                     compression

One function a kernel or a few that belong together. Arrays are the device's, with the shapes said there; real16 is the
16-bit type, "half" or "bf16", whose words are uint16 on the host."""

from minillm.ops.launch.attention import DecodeSpace, decode_attention, decode_plan, decode_space, prefill_attention
from minillm.ops.launch.elementwise import add_bias, add_rms_norm, glu, not_finite, rms_norm
from minillm.ops.launch.head_sizes import HEAD_SIZES
from minillm.ops.launch.merging import clusters, keep_cosines, merge, merge_unrotated, nearest, take, unit_rows
from minillm.ops.launch.pages import Paged, last_pages, read_entries, write_entries
from minillm.ops.launch.planning import (
    compact,
    compact_space,
    neighbours,
    pooled,
    segment_count,
    segment_sum,
    segment_topk,
    select_space,
)
from minillm.ops.launch.products import (
    dequantize,
    embed,
    gemv,
    norm_gemv,
    norm_gemv_glu,
    random_words,
    rows_at_once,
)
from minillm.ops.launch.rope import rope_append, rope_split, unrotate
from minillm.ops.launch.sampling import SampleSpace, draw_tables, sample, sample_space
from minillm.ops.launch.scores import Rows, column_scores, score_lse, score_splits, window_scores
from minillm.ops.launch.sources import files, kernels, parameters, source, variants
