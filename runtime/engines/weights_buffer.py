"""A weights file's tensors in one buffer of memory, with LoRAs merged where it says so."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wanexport.runtime.bundle.piece_reading import THREADS, Piece, pieces_of, read_pieces
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.tensorfile import TensorEntry, header_sha256
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BundleError, EngineFailure
from wanexport.runtime.lora.merged_file import stack_of

if TYPE_CHECKING:
    from wanexport.runtime.lora.merge import LoraStack

_MERGING = 24  # bytes that a value takes while a LoRA is merged into it


class WeightsBuffer:
    """The tensors of a weights file, by name, as views of a buffer of bytes.

    `entries` are the file's, `offsets` their places in the buffer, `header` the hash of the file's
    header, which every file that is read must have. LoRAs are merged on the device `merging`.
    """

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        offsets: Mapping[str, int],
        buffer: Tensor,
        header: str,
        merging: torch.device,
    ) -> None:
        self.buffer, self.merging, self._header = buffer, merging, header
        self._entries, self._offsets = entries, offsets
        self.file: PinnedFile | None = None  # None while its content is neither
        # Of a caller in inference mode, other threads and calls could not write it.
        with torch.inference_mode(False):
            self.tensors = {name: view_of(buffer, e, offsets[name]) for name, e in entries.items()}
            self._pieces = [
                piece
                for name, entry in entries.items()
                for piece in pieces_of(name, entry.offset, self._raw(name), torch.uint8)
            ]

    def holds(self, file: PinnedFile) -> bool:
        """Whether the content is that of a file, whatever name it was opened by."""
        return self.file is not None and self.file.content == file.content

    def fill(self, file: PinnedFile) -> None:
        """Read with several threads, through pinned memory where the buffer is on a GPU; merge.

        Of a file that is held already, only what LoRAs had changed is read again. Nobody may use
        the buffer. Raises BundleError when the file cannot be read, is not what was pinned, or is
        laid out otherwise, EngineFailure when there is too little memory to merge.
        """
        held, stack = self.file, stack_of(file)
        with file.opened() as handle:
            if header_sha256(file.path) != self._header:
                raise BundleError(
                    f"{file.path} is laid out otherwise than the weights in whose place it is to "
                    f"go: run wanexport build again"
                )
            if self.merging.type == "cuda":  # what still reads the old content must end first
                torch.cuda.synchronize(self.merging)
            self.file = None
            pieces = self._pieces
            if held is not None and held.identity == file.identity:
                old = stack_of(held)
                pieces = [p for p in pieces if old is not None and old.changes(p.tensor)]
            missing = _Missing(pieces)
            with ThreadPoolExecutor(THREADS) as pool:
                shares = [pieces[i::THREADS] for i in range(THREADS)]
                read = partial(self._read, handle, file.path, missing)
                reading = [pool.submit(read, share) for share in shares]
                if stack is not None:
                    self._merge(stack, missing)
                for share in reading:
                    share.result()
        self.file = file

    def _raw(self, name: str) -> Tensor:
        offset = self._offsets[name]
        return self.buffer[offset : offset + self._entries[name].size]

    def _merge(self, stack: "LoraStack", missing: "_Missing") -> None:
        """Merge LoRAs into the tensors that they change, as each is there."""
        try:
            with torch.inference_mode(False):
                for name, tensor in self.tensors.items():
                    if stack.changes(name) and missing.arrives(name):
                        tensor.copy_(stack.rounded(name, tensor.to(self.merging)))
        except torch.OutOfMemoryError as error:
            largest = max(t.numel() for n, t in self.tensors.items() if stack.changes(n))
            raise EngineFailure(
                f"{self.merging} has too little memory free to merge a LoRA, which takes about "
                f"{_MERGING * largest / 1e9:.1f} GB: merge it into a set with wanexport add"
            ) from error
        if self.merging.type == "cuda":  # forwards run on streams of their own
            torch.cuda.synchronize(self.merging)

    def _read(self, handle: int, file: Path, missing: "_Missing", pieces: list[Piece]) -> None:
        with missing.failing():
            read_pieces(handle, file, pieces, missing.arrived)


def view_of(buffer: Tensor, entry: TensorEntry, offset: int) -> Tensor:
    """The tensor of an entry that lies at an offset of a buffer of bytes."""
    raw = buffer[offset : offset + entry.size]
    return raw.view(getattr(torch, STORED[entry.dtype].torch)).view(entry.shape)


class _Missing:
    """How many pieces of each tensor are not there yet."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._left = Counter(piece.tensor for piece in pieces)
        self._changed, self._failed = threading.Condition(), False

    def arrived(self, pieces: Iterable[Piece]) -> None:
        """Count pieces as there."""
        with self._changed:
            self._left.subtract(piece.tensor for piece in pieces)
            self._changed.notify_all()

    def arrives(self, tensor: str) -> bool:
        """Wait until a tensor is whole; False when one will never be, as reading failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._left[tensor] <= 0)
            return not self._failed

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Let nobody wait for what an error in the block keeps away."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise
