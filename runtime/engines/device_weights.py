"""A weights file in one buffer of device memory, read once for all engines that need it."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from wanexport.runtime.bundle.piece_reading import THREADS, Piece, pieces_of, read_pieces
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import TensorEntry, header_sha256, read_header
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BundleError, EngineFailure
from wanexport.runtime.lora.merged_file import stack_of

if TYPE_CHECKING:
    from wanexport.runtime.lora.merge import LoraStack

_ALIGNMENT = 256  # bytes: what compiled kernels expect, and the caching allocator gives
_MERGING = 24  # bytes that a value takes while a LoRA is merged into it
_TIMED = 1000  # of the last switches

_resident: WeakValueDictionary[tuple[object, ...], "DeviceWeights"] = WeakValueDictionary()
_reading: WeakValueDictionary[tuple[object, ...], "threading.Lock"] = WeakValueDictionary()
_lock = threading.Lock()


class DeviceWeights:
    """The tensors of a weights file on a device, by name.

    Files of one layout share the buffer by turns: `held` replaces its content, and the tensors,
    being views of it, stay valid, in a captured graph too. Forwards that need the same file run
    side by side; a replacement waits for those of another. `generation` counts what the buffer has
    held, and `switches` has the seconds of each replacement, the last 1000.
    Raises BundleError when the file cannot be read or is not what was pinned, and EngineFailure
    when the device has too little memory.
    """

    def __init__(self, file: Path | PinnedFile, device: torch.device) -> None:
        file = pin(file)
        self.device, self.generation = device, 0
        self.file: PinnedFile | None = None  # None while its content is neither
        self.switches: deque[float] = deque(maxlen=_TIMED)
        self._turn, self._holders = threading.Condition(), 0
        self._queue = threading.Lock()  # who waits for a replacement lets nobody overtake
        with file.opened():
            self._entries, self._header = read_header(file.path), header_sha256(file.path)
        offsets, total = _offsets(self._entries)
        if device.type == "cuda":
            advice = "use --offload where the model has two experts"
            check_room(total, device, str(file.path), advice)
        # Of a caller in inference mode, other threads and calls could not write it.
        with torch.inference_mode(False):
            self.buffer = torch.empty(total, dtype=torch.uint8, device=device)
            self.tensors = {
                name: self._view(entry, offsets[name]) for name, entry in self._entries.items()
            }
            self._pieces = [
                piece
                for name, entry in self._entries.items()
                for piece in pieces_of(
                    name, entry.offset, self._raw(entry, offsets[name]), torch.uint8
                )
            ]
        self._replace(file)
        self.switches.clear()

    def holds(self, file: PinnedFile) -> bool:
        """Whether the content is that of a file, whatever name it was opened by."""
        return self.file is not None and self.file.content == file.content

    @contextmanager
    def held(self, file: PinnedFile) -> Iterator[None]:
        """Have the tensors of this file, whose layout is that of the first, until the block ends.

        Raises BundleError when the file cannot be read, is not what was pinned, or is laid out
        otherwise. What was held then stays, unless the file was cut or changed while it was read:
        what is held is neither then, until the next call.
        """
        with self._queue, self._turn:
            while self._holders and not self.holds(file):
                self._turn.wait()
            if not self.holds(file):
                self._replace(file)
            self._holders += 1
        try:
            yield
        finally:
            with self._turn:
                self._holders -= 1
                self._turn.notify_all()

    def _replace(self, file: PinnedFile) -> None:
        started = time.perf_counter()
        self._fill(file)
        self.file, self.generation = file, self.generation + 1
        self.switches.append(time.perf_counter() - started)

    def _view(self, entry: TensorEntry, offset: int) -> Tensor:
        raw = self._raw(entry, offset)
        return raw.view(getattr(torch, STORED[entry.dtype].torch)).view(entry.shape)

    def _raw(self, entry: TensorEntry, offset: int) -> Tensor:
        return self.buffer[offset : offset + entry.size]

    def _fill(self, file: PinnedFile) -> None:
        """Read with several threads, through pinned memory where the buffer is on a GPU; merge.

        Of a file that is held already, only what LoRAs had changed is read again.
        """
        held, stack = self.file, stack_of(file)
        with file.opened() as handle:
            if header_sha256(file.path) != self._header:
                raise BundleError(
                    f"{file.path} is laid out otherwise than the weights in whose place it is to "
                    f"go: run wanexport build again"
                )
            if self.device.type == "cuda":  # what still reads the old content must end first
                torch.cuda.synchronize(self.device)
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

    def _merge(self, stack: "LoraStack", missing: "_Missing") -> None:
        """Merge LoRAs into the tensors that they change, where these are, as each is there."""
        try:
            with torch.inference_mode(False):
                for name, tensor in self.tensors.items():
                    if stack.changes(name) and missing.arrives(name):
                        tensor.copy_(stack.rounded(name, tensor))
        except torch.OutOfMemoryError as error:
            largest = max(t.numel() for n, t in self.tensors.items() if stack.changes(n))
            raise EngineFailure(
                f"{self.device} has too little memory free to merge a LoRA, which takes about "
                f"{_MERGING * largest / 1e9:.1f} GB: merge it into a set with wanexport add"
            ) from error
        if self.device.type == "cuda":  # forwards run on streams of their own
            torch.cuda.synchronize(self.device)

    def _read(self, handle: int, file: Path, missing: "_Missing", pieces: list[Piece]) -> None:
        with missing.failing():
            read_pieces(handle, file, pieces, missing.arrived)


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


def device_weights(
    file: Path | PinnedFile, device: torch.device, *, private: bool = False
) -> DeviceWeights:
    """The weights of a file on a device: those already there, if any engine of this process holds
    them, or read anew. private ones are never given to others: experts take turns in them."""
    if private:
        return DeviceWeights(file, device)
    file = pin(file)
    key = (str(device), file.identity)
    with _lock:
        reading = _reading.setdefault(key, threading.Lock())
    with reading:  # another file may be read meanwhile
        with _lock:
            weights = _resident.get(key)
        # Whose engine uses another set keeps its buffer for that.
        if weights is None or not weights.holds(file):
            weights = DeviceWeights(file, device)
            with _lock:
                _resident[key] = weights
    return weights


def _offsets(entries: dict[str, TensorEntry]) -> tuple[dict[str, int], int]:
    """Where each tensor lies in the buffer, aligned, and the buffer's size."""
    offsets, end = {}, 0
    for name, entry in entries.items():
        offsets[name] = end
        end += -(-entry.size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def check_room(size: int, device: torch.device, what: str, advice: str) -> None:
    """Raise EngineFailure when the GPU has not so many bytes free, PyTorch's cache included."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if size > free:
        raise EngineFailure(
            f"{what} takes {size / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB free: close what else uses it, or {advice}"
        )
