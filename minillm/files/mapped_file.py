"""A read-only mapped file and the tensors that lie in it: what the safetensors and the GGUF reader have in common."""

import mmap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError

_NEIGHBOURS = 2**21  # bytes, the largest piece that the kernel maps at once
_SAMPLES, _SAMPLE_BYTES = 4, 1024  # of a tensor


class MappedFile:
    """The bytes of one file, mapped: nothing is read before it is touched. MinillmError if it cannot be opened."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise MinillmError(f"{path} cannot be read ({error}); check the path or download it again") from None
        self.size = len(self.map)
        if self.map[:24] == b"version https://git-lfs.":
            raise self.error("is a Git LFS pointer, not the model itself; run `git lfs pull` in its folder")

    def error(self, what: str) -> MinillmError:
        return MinillmError(f"{self.path} {what}")

    def bytes_at(self, offset: int, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8 view of the map."""
        return np.frombuffer(self.map, np.uint8, nbytes, offset)

    def sample(self, offset: int, nbytes: int) -> bytes:
        """Up to 4 KiB, of the first and the last bytes here and of some between them, read without what is around
        them."""
        size = min(_SAMPLE_BYTES, nbytes)
        places = sorted({(nbytes - size) * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
        self._advise("MADV_RANDOM", 0, self.size)
        try:
            return b"".join(self.map[offset + place : offset + place + size] for place in places)
        finally:
            self._advise("MADV_NORMAL", 0, self.size)

    def release(self, offset: int, nbytes: int) -> None:
        """Takes these pages out of the process's resident memory; the next touch maps them again."""
        # a touch maps the pages around it too, so the neighbours go as well: 7 % of a file stayed without this
        start = max(0, offset - _NEIGHBOURS) // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise("MADV_DONTNEED", start, min(self.size, offset + nbytes + _NEIGHBOURS) - start)

    def _advise(self, advice: str, start: int, nbytes: int) -> None:
        if hasattr(self.map, "madvise"):  # not on Windows
            self.map.madvise(getattr(mmap, advice), start, nbytes)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `kind` is the format's own name of the element type: "F32", "BF16", "Q4_1", "Q6_K", ..."""

    file: MappedFile
    name: str  # as the file has it
    kind: str
    shape: tuple[int, ...]  # (out, in), row-major, in both formats
    offset: int  # from the start of the file
    nbytes: int

    def rows(self, lo: int, hi: int) -> "StoredTensor":
        """Rows lo : hi of a matrix."""
        row = self.nbytes // self.shape[0]
        return replace(self, shape=(hi - lo, *self.shape[1:]), offset=self.offset + lo * row, nbytes=(hi - lo) * row)

    @property
    def parts(self) -> tuple["StoredTensor", ...]:
        """What it consists of: itself."""
        return (self,)

    @property
    def bytes(self) -> np.ndarray:
        """(nbytes,) uint8 view of the map."""
        return self.file.bytes_at(self.offset, self.nbytes)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def cut_off(self) -> MinillmError:
        return self.error(
            f"ends at byte {self.end}, but the file has {self.file.size}: it is truncated, or its header lies; "
            "download it again"
        )

    def error(self, what: str) -> MinillmError:
        return MinillmError(f"{self.file.path}: tensor {self.name} {what}")
