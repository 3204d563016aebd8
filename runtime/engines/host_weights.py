"""Weights in the host's memory, laid out so that a GPU takes each layer in one copy.

A file's weights are there once for all engines of the process, on whatever GPU. Where memory does
not suffice for them, they are read from the file at every use.
"""

import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from wanexport.runtime.bundle.piece_reading import THREADS, pieces_of, read_pieces
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.engines.layer_parts import Parts
from wanexport.runtime.engines.layer_ring import Event, Streams
from wanexport.runtime.engines.page_lock import lock_pages
from wanexport.runtime.engines.weights_buffer import WeightsBuffer
from wanexport.runtime.errors import EngineFailure, WanExportWarning
from wanexport.runtime.lora.merged_file import stack_of
from wanexport.runtime.machine.memory import available_bytes

REST = -1  # the number of the part that belongs to no layer
_SPARE = 1 << 30  # bytes of the host's memory that are left to others

_known: WeakValueDictionary[tuple[object, ...], "HostWeights"] = WeakValueDictionary()
_lock = threading.Lock()


class CopyStreams(Streams, Protocol):
    """Streams whose copies the host may have to wait for."""

    def host_waits(self, event: Event) -> None:
        """Wait on the host until a recorded event has come."""


class Host(Protocol):
    """Where the parts of a weights file come from."""

    def holds(self, file: PinnedFile) -> bool:
        """Whether it is the content of a file, its LoRAs included."""

    def copy(self, number: int, target: Tensor) -> None:
        """Give the current stream the copy of a part, by its number, into a buffer of bytes."""


class HostWeights(WeightsBuffer):
    """The parts of a weights file in page-locked memory, with LoRAs merged on a device.

    `users` are whoever copies from it: one that others use is not to be filled with something else.
    Raises as `fill` does, and EngineFailure when the system has not the memory.
    """

    def __init__(
        self,
        file: PinnedFile,
        entries: Mapping[str, TensorEntry],
        header: str,
        parts: Parts,
        merging: torch.device,
    ) -> None:
        self.users: WeakSet[object] = WeakSet()
        offsets: dict[str, int] = {}
        self._begins, end = {}, 0
        self._sizes = {REST: parts.rest.size, **{i: p.size for i, p in enumerate(parts.layers)}}
        for number, part in ((REST, parts.rest), *enumerate(parts.layers)):
            self._begins[number] = end
            offsets |= {name: end + offset for name, offset in part.offsets.items()}
            end += part.size
        with torch.inference_mode(False):
            buffer = torch.empty(end, dtype=torch.uint8)
        super().__init__(entries, offsets, buffer, header, merging)
        plain = PinnedFile(file.path, file.identity, file.sha256)
        self.fill(plain)  # by many threads, which page-locked memory would be given by one
        if not lock_pages(buffer, merging, self):
            raise EngineFailure(
                f"the system locks no {end / 1e9:.1f} GB of the host's memory for {merging}"
            )
        if stack_of(file) is not None:
            self.fill(file)

    def copy(self, number: int, target: Tensor) -> None:
        """See Host; the host does not wait."""
        begin, size = self._begins[number], self._sizes[number]
        target[:size].copy_(self.buffer[begin : begin + size], non_blocking=True)


class FileWeights:
    """The parts of a weights file, read into two small buffers by turns at every use.

    The host waits while it reads. Raises BundleError when the file is not what was pinned.
    """

    def __init__(
        self,
        file: PinnedFile,
        entries: Mapping[str, TensorEntry],
        parts: Parts,
        streams: CopyStreams,
        device: torch.device,
    ) -> None:
        self.file, self._entries, self._streams = file, entries, streams
        self._parts = {REST: parts.rest, **dict(enumerate(parts.layers))}
        size = max(part.size for part in self._parts.values())
        with torch.inference_mode(False):
            self._staging = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        for buffer in self._staging:
            lock_pages(buffer, device, self)  # else the driver copies through memory of its own
        self._copied = [streams.event() for _ in self._staging]
        self._turn = 0

    def holds(self, file: PinnedFile) -> bool:
        """See Host."""
        return self.file.content == file.content

    def copy(self, number: int, target: Tensor) -> None:
        """See Host; the host waits for the reading."""
        turn = self._turn = 1 - self._turn
        part, staging = self._parts[number], self._staging[turn]
        self._streams.host_waits(self._copied[turn])
        pieces = [
            piece
            for name, offset in part.offsets.items()
            for piece in pieces_of(
                name,
                self._entries[name].offset,
                staging[offset : offset + self._entries[name].size],
                torch.uint8,
            )
        ]
        with self.file.opened() as handle, ThreadPoolExecutor(THREADS) as pool:
            shares = [pieces[i::THREADS] for i in range(THREADS)]
            list(pool.map(lambda share: read_pieces(handle, self.file.path, share), shares))
        target[: part.size].copy_(staging[: part.size], non_blocking=True)
        self._streams.copying_records(self._copied[turn])


def known_weights(file: PinnedFile, parts: Parts) -> HostWeights | None:
    """The weights of a file that an engine of this process holds in these parts."""
    with _lock:
        host = _known.get(_key(file, parts))
        return host if host is not None and host.holds(file) else None


def host_weights(
    file: PinnedFile,
    entries: Mapping[str, TensorEntry],
    header: str,
    parts: Parts,
    streams: CopyStreams,
    device: torch.device,
) -> Host:
    """The weights of a file in memory, or, said aloud, where that does not suffice, in the file.

    Raises EngineFailure when it does not suffice for LoRAs, which have to be merged in memory.
    """
    free, reason = available_bytes(), ""
    if parts.size + _SPARE > free:
        reason = f"{free / 1e9:.1f} GB are free"
    else:
        try:
            host = HostWeights(file, entries, header, parts, device)
        except (EngineFailure, RuntimeError) as error:  # PyTorch's, for want of memory
            if stack_of(file) is not None:
                raise
            reason = str(error).splitlines()[0]
        else:
            with _lock:
                _known[_key(file, parts)] = host
            return host
    told = f"{file.path} takes {parts.size / 1e9:.1f} GB of the host's memory ({reason})"
    if stack_of(file) is not None:
        raise EngineFailure(f"{told}: merge its LoRAs into a set with wanexport add")
    warnings.warn(
        f"{told}: its layers are read from the file at every forward, which takes longer",
        WanExportWarning,
        stacklevel=2,
    )
    return FileWeights(file, entries, parts, streams, device)


def has_room(parts: Parts) -> bool:
    """Whether the host's memory holds the weights of one more file."""
    return parts.size + _SPARE <= available_bytes()


def _key(file: PinnedFile, parts: Parts) -> tuple[object, ...]:
    return file.identity, parts.call, tuple(parts.rest.offsets)
