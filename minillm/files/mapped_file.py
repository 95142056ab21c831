"""A read-only mapped file and the tensors that lie in it: what the safetensors and the GGUF reader have in common."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.errors import MinillmError

_NEIGHBOURS = 2**21  # bytes, the largest piece that the kernel maps at once


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

    def release(self, offset: int, nbytes: int) -> None:
        """Takes these pages out of the process's resident memory; the next touch maps them again."""
        if hasattr(self.map, "madvise"):
            # a touch maps the pages around it too, so the neighbours go as well: 7 % of a file stayed without this
            start = max(0, offset - _NEIGHBOURS) // mmap.PAGESIZE * mmap.PAGESIZE
            end = min(self.size, offset + nbytes + _NEIGHBOURS)
            self.map.madvise(mmap.MADV_DONTNEED, start, end - start)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `kind` is the format's own name of the element type: "F32", "BF16", "Q4_1", "Q6_K", ..."""

    file: MappedFile
    name: str  # as the file has it
    kind: str
    shape: tuple[int, ...]  # (out, in), row-major, in both formats
    offset: int  # from the start of the file
    nbytes: int

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
