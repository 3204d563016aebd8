"""Pieces of a file go where their values are used, in the dtype of that place."""

from pathlib import Path

import numpy as np
import pytest
import torch

from wanexport.runtime.bundle import piece_reading
from wanexport.runtime.bundle.piece_reading import Piece, pieces_of, read_pieces
from wanexport.runtime.errors import BundleError

VALUES = np.linspace(-3, 3, 1000, dtype=np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """12 bytes of something else, then the values."""
    path = tmp_path / "file"
    path.write_bytes(b"something___" + VALUES.tobytes())
    return path


def read(file: Path, pieces: list[Piece]) -> list[Piece]:
    """The pieces in the order in which they arrived."""
    arrived: list[Piece] = []
    with file.open("rb") as opened:
        read_pieces(opened.fileno(), file, pieces, arrived.extend)
    return arrived


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [64, 100, 1 << 20])
def test_values_arrive_whole_and_rounded_to_the_dtype_of_their_place(
    file: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_reading, "PIECE", piece)
    target = torch.zeros(20, 50, dtype=dtype)
    pieces = list(pieces_of("x", 12, target, torch.float32))
    assert len(pieces) == -(-VALUES.nbytes // piece)
    assert sum(piece.size for piece in pieces) == VALUES.nbytes
    assert len(read(file, pieces)) == len(pieces)
    assert torch.equal(target, torch.from_numpy(VALUES).view(20, 50).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_ends_early_is_one_line(file: Path, dtype: torch.dtype) -> None:
    pieces = list(pieces_of("x", 13, torch.zeros(1000, dtype=dtype), torch.float32))
    with pytest.raises(BundleError, match=f"{file} ended while it was read: write it again$"):
        read(file, pieces)


def test_nothing_to_read_is_no_piece(file: Path) -> None:
    assert read(file, list(pieces_of("x", 12, torch.zeros(0, 4), torch.float32))) == []
