"""Read pieces of an open file to where their values are used, a GPU's memory too.

Several threads take shares of a file's pieces: `THREADS` of them read 18 GB/s to a GPU where the
system has the file in memory. This file imports PyTorch: import it where something is opened.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanexport.runtime.bundle.regular_file import read_into
from wanexport.runtime.errors import BundleError

PIECE = 16 << 20  # bytes read at a time, by each thread
THREADS = 8


class Piece(NamedTuple):
    """Some values of a tensor: where they begin in the file, and where they go.

    `target` [n] may be of another dtype than the file's values, whose dtype is `dtype`.
    """

    tensor: str
    source: int
    target: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.target.numel() * self.dtype.itemsize


Arrived = Callable[[Sequence[Piece]], None]  # is told of pieces that are where they go


def pieces_of(name: str, source: int, target: Tensor, dtype: torch.dtype) -> Iterator[Piece]:
    """The pieces of a tensor that begins at `source` and goes into `target`, a contiguous one."""
    values, step = target.view(-1), PIECE // dtype.itemsize
    for begin in range(0, values.numel(), step):
        yield Piece(name, source + begin * dtype.itemsize, values[begin : begin + step], dtype)


def _nobody(pieces: Sequence[Piece]) -> None:
    """Is told of pieces and does nothing."""


def read_pieces(
    descriptor: int, file: Path, pieces: Sequence[Piece], arrived: Arrived = _nobody
) -> None:
    """Read pieces of an open file, which errors call `file`, on this thread.

    Raises BundleError when the file ends before them.
    """
    if pieces and pieces[0].target.device.type == "cuda":
        _read_to_gpu(descriptor, file, pieces, arrived)
        return
    for piece in pieces:
        if piece.dtype == piece.target.dtype:
            _read(descriptor, file, piece, piece.target.view(torch.uint8))
        else:
            staging = torch.empty(piece.size, dtype=torch.uint8)
            _read(descriptor, file, piece, staging)
            piece.target.copy_(staging.view(piece.dtype))
        arrived([piece])


def _read_to_gpu(descriptor: int, file: Path, pieces: Sequence[Piece], arrived: Arrived) -> None:
    # Two pinned buffers: one is read into while the other is copied.
    staging = torch.empty(2, PIECE, dtype=torch.uint8, pin_memory=True)
    copied = [torch.cuda.Event() for _ in staging]
    device = pieces[0].target.device
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        for number, piece in enumerate(pieces):
            half = number % 2
            copied[half].synchronize()
            arrived(pieces[number - 2 : number - 1] if number > 1 else ())
            pinned = staging[half, : piece.size]
            _read(descriptor, file, piece, pinned)
            values = pinned.view(piece.dtype)
            if piece.dtype != piece.target.dtype:  # copy_ would convert on the CPU
                values = values.to(device, non_blocking=True)
            piece.target.copy_(values, non_blocking=True)
            copied[half].record()
        for event in copied:
            event.synchronize()
        arrived(pieces[-2:])


def _read(descriptor: int, file: Path, piece: Piece, target: Tensor) -> None:
    view = memoryview(target.numpy().data)
    done = 0
    while done < piece.size:
        count = read_into(descriptor, view[done:], piece.source + done)
        if not count:
            raise BundleError(f"{file} ended while it was read: write it again")
        done += count
