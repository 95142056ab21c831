"""The head sizes that kernels are compiled for, and how each is shared out to threads: a kernel made for one head_dim
is given these as constants."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSize:
    team: int  # threads that share a row, 8 elements each: a power of two, so that they can sum it by shuffles
    queries: int  # of a block of prefill_attention and of the scores

    def defines(self):
        return {"TEAM": str(self.team), "QUERIES": str(self.queries)}


# A warp holds the results of a quarter of a block's queries: of 32 x 128 elements in 128 of a thread's 255 registers.
# And 64 queries with 2 x 64 keys, or 2 x 64 with 64 keys, of 256 elements are 96 KiB of the 99 KiB that a block of any
# card has.
HEAD_SIZES = {
    d: HeadSize(team=8 if d <= 64 else 16 if d <= 128 else 32, queries=128 if d <= 128 else 64)
    for d in range(64, 257, 16)
}
