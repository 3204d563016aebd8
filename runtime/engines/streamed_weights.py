"""Weights of which a GPU holds a part: layers come from the host's memory while others compute.

What belongs to no layer is on the device, and so are the layers that stay. The others go through a
few buffers by turns. The host does not wait in a forward, but where it has to read a file.
"""

import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from weakref import finalize

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import Identity, PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import header_sha256, read_header
from wanexport.runtime.engines.device import unreserved_on
from wanexport.runtime.engines.device_weights import check_room
from wanexport.runtime.engines.host_weights import (
    REST,
    Host,
    HostWeights,
    has_room,
    host_weights,
    known_weights,
)
from wanexport.runtime.engines.layer_parts import parts_of
from wanexport.runtime.engines.layer_ring import LayerRing, spread
from wanexport.runtime.engines.streams import CpuStreams, CudaStreams, streams_of
from wanexport.runtime.engines.weights_buffer import view_of
from wanexport.runtime.errors import BadRequest, WanExportWarning
from wanexport.runtime.gpu_fit import LAYER_BUFFERS
from wanexport.runtime.program import Program

_TIMED = 1000  # of the last switches
_SPARE = 256 << 20  # bytes of a GPU that layers which stay leave free
_SMALLER = "run a smaller model"


class StreamedWeights:
    """The tensors of a weights file for one Program, of whose layers some are on the device.

    `tensors` are those of no layer; `layer` gives a layer's to a call. Files of one layout use the
    device by turns, as in DeviceWeights; their values stay in the host's memory as far as there is
    room. One forward is launched at a time. `switches` has the seconds that the host took for each
    replacement, the last 1000.
    Raises BundleError when a file cannot be read or is not what was pinned, EngineFailure when
    there is too little memory, BadRequest for a Program without layers.
    """

    holds_several = True  # files, so that each may be read ahead

    def __init__(
        self,
        file: Path | PinnedFile,
        program: Program,
        device: torch.device,
        *,
        buffers: int = LAYER_BUFFERS,
        streams: CudaStreams | CpuStreams | None = None,
    ) -> None:
        file = pin(file)
        self.device, self.generation = device, 0
        self.file: PinnedFile | None = None  # None while the content is none
        self.switches: deque[float] = deque(maxlen=_TIMED)
        self._turn = threading.Lock()
        with file.opened():
            self.entries, self._header = read_header(file.path), header_sha256(file.path)
        self.parts = parts_of(self.entries, program)
        if not self.parts.layers:
            raise BadRequest("the engine has no call that repeats: leave --offload blocks out")
        size = self.parts.rest.size + buffers * self.parts.layer_bytes
        if device.type == "cuda":
            check_room(size, device, f"{file.path}, of which layers are streamed,", _SMALLER)
        self._streams = streams or streams_of(device)
        with torch.inference_mode(False):
            self._rest = self._new(self.parts.rest.size)
            self._source = _Source([self._new(self.parts.layer_bytes) for _ in range(buffers)])
            offsets = self.parts.rest.offsets
            self.tensors = {n: view_of(self._rest, self.entries[n], o) for n, o in offsets.items()}
        self._resident: dict[int, Tensor] = {}
        self._ring = LayerRing(self._streams, self._source.copy, buffers)
        self._ring.arrange(range(len(self.parts.layers)))
        self._idle, self._filled = self._streams.event(), self._streams.event()
        self._hosts: OrderedDict[Identity, Host] = OrderedDict()  # what was used last, last
        finalize(self, self._streams.host_waits_for_copies).atexit = False
        self._replace(file)
        self.switches.clear()

    @property
    def resident_blocks(self) -> int:
        """How many layers stay on the device."""
        return len(self._resident)

    def holds(self, file: PinnedFile) -> bool:
        """Whether the device has the content of a file."""
        return self.file is not None and self.file.content == file.content

    def layer(self, index: int, names: Sequence[str]) -> "StreamedLayer":
        """A layer's parameters in this order, for calls that are made in blocks of `with`."""
        return StreamedLayer(self, index, names)

    @contextmanager
    def held(self, file: PinnedFile) -> Iterator[None]:
        """Have the weights of this file, whose layout is that of the first, until the block ends.

        Raises BundleError when the file cannot be read, is not what was pinned, or is laid out
        otherwise: what is held is none then, until the next call.
        """
        with self._turn:
            self._streams.computing_waits(self._idle)
            if not self.holds(file):
                self._replace(file)
            self._streams.computing_waits(self._filled)
            try:
                yield
            finally:  # what was launched before a failure uses the buffers too
                self._streams.computing_records(self._idle)

    def read_ahead(self, file: PinnedFile) -> None:
        """Have the values of a file in the host's memory, as far as it has room for them beside
        those of others. Raises as `held` does."""
        with self._turn:
            host = self._hosts.get(file.identity)
            is_there = host is not None and host.holds(file)
            if is_there or host is self._source.host or not (host or has_room(self.parts)):
                return
            self._hosts[file.identity] = self._changed(file, host)
            self._hosts.move_to_end(file.identity, last=False)

    def keep(self, count: int, *, beside: int = 0) -> None:
        """Let so many layers stay on the device, or, said aloud, as many as a GPU has room for with
        `beside` bytes for what runs there. Raises BadRequest for more than there are."""
        layers, size = len(self.parts.layers), self.parts.layer_bytes
        if not 0 <= count <= layers:
            raise BadRequest(f"{count} resident blocks: expected from 0 to {layers}")
        with self._turn:
            self._resident.clear()
            room = layers
            if self.device.type == "cuda":
                room = max(0, unreserved_on(self.device) - beside - _SPARE) // size
            if count > room:
                warnings.warn(
                    f"{count} resident blocks take {count * size / 1e9:.1f} GB, for which "
                    f"{self.device} has no room beside a forward: {room} stay",
                    WanExportWarning,
                    stacklevel=2,
                )
            order = spread(layers - min(count, room), layers)
            with torch.inference_mode(False):
                for index in sorted(set(range(layers)) - set(order)):
                    self._resident[index] = self._new(self.parts.layers[index].size)
            self._ring.arrange(order)
            assert self._source.host is not None
            self._send(self._source.host)

    def take(self, index: int) -> Tensor:
        """The buffer with a layer, which the caller's stream waits for."""
        buffer = self._resident.get(index)
        return self._source.buffers[self._ring.take(index)] if buffer is None else buffer

    def release(self, index: int) -> None:
        """What needs the layer that was taken has been launched."""
        if index not in self._resident:
            self._ring.release()

    def _new(self, size: int) -> Tensor:
        """A buffer of bytes on the device, that is not given to others while copies go there."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            with self._streams.copying():
                buffer.record_stream(torch.cuda.current_stream(self.device))
        return buffer

    def _replace(self, file: PinnedFile) -> None:
        started = time.perf_counter()
        self.file = None
        host = self._hosts.get(file.identity)
        if host is None or not host.holds(file):
            host = self._changed(file, host)
        self._hosts[file.identity] = host
        self._hosts.move_to_end(file.identity)
        self._send(host)
        self.file, self.generation = file, self.generation + 1
        self.switches.append(time.perf_counter() - started)

    def _send(self, host: Host) -> None:
        """Copy what stays on the device there, and begin with the layers that do not."""
        self._source.host = host
        now = self._streams.event()
        self._streams.computing_waits(self._idle)
        self._streams.computing_records(now)
        self._streams.copying_waits(now)
        with self._streams.copying():
            host.copy(REST, self._rest)
            for index, buffer in self._resident.items():
                host.copy(index, buffer)
        self._streams.copying_records(self._filled)
        self._ring.start()

    def _changed(self, file: PinnedFile, host: Host | None) -> Host:
        """The values of a file: in place of its own with other LoRAs, if nobody else has those."""
        if isinstance(host, HostWeights):
            if set(host.users) == {self}:
                host.fill(file)  # which waits for the copies from it
                return host
            host.users.discard(self)
        self._hosts.pop(file.identity, None)
        while self._hosts and known_weights(file, self.parts) is None and not has_room(self.parts):
            self._streams.host_waits_for_copies()
            _, oldest = self._hosts.popitem(last=False)
            if oldest is self._source.host:
                self._source.host = None
            del oldest
        return self._read(file)

    def _read(self, file: PinnedFile) -> Host:
        host: Host | None = known_weights(file, self.parts)
        if host is None:
            shared = (self.entries, self._header, self.parts, self._streams, self.device)
            host = host_weights(file, *shared)
        if isinstance(host, HostWeights):
            host.users.add(self)
        return host


class _Source:
    """Where layers come from, and the buffers that they go to."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self.buffers, self.host = buffers, cast(Host | None, None)

    def copy(self, layer: int, buffer: int) -> None:
        assert self.host is not None
        self.host.copy(layer, self.buffers[buffer])


class StreamedLayer:
    """The parameters of one layer, which are on the device in a block of `with`."""

    def __init__(self, weights: StreamedWeights, index: int, names: Sequence[str]) -> None:
        self._weights, self._index, self._names = weights, index, names
        self._lists: dict[int, list[Tensor]] = {}  # by the address of the buffer

    def __enter__(self) -> list[Tensor]:
        buffer = self._weights.take(self._index)
        found = self._lists.get(buffer.data_ptr())
        if found is None:
            found = self._lists[buffer.data_ptr()] = [self._in(buffer, n) for n in self._names]
        return found

    def __exit__(self, *_: object) -> None:
        self._weights.release(self._index)

    def _in(self, buffer: Tensor, name: str) -> Tensor:
        weights = self._weights
        offset = weights.parts.layers[self._index].offsets.get(name)
        if offset is None:
            return weights.tensors[name]
        with torch.inference_mode(False):
            return view_of(buffer, weights.entries[name], offset)
