"""A tensor of a checkpoint: mapped, and where it lies in a file that may be read."""

from dataclasses import dataclass

from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on the CPU, mapped to its file where that is possible.

    `file` has its values from the byte `offset` on, one after another; None where no file has them
    like that.
    """

    tensor: Tensor
    file: PinnedFile | None = None
    offset: int = 0

    def rows(self, part: int, parts: int) -> "StoredTensor":
        """One of so many equal parts of its rows."""
        rows = self.tensor.chunk(parts)[part]
        return StoredTensor(rows, self.file, self.offset + part * rows.nbytes)

    def shaped(self, shape: tuple[int, ...]) -> "StoredTensor":
        """The same values in a shape that differs by leading dimensions of 1; else as it is."""
        if _without_ones(self.tensor.shape) != _without_ones(shape):
            return self
        return StoredTensor(self.tensor.reshape(shape), self.file, self.offset)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        del sizes[0]
    return tuple(sizes)
