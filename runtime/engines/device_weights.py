"""A weights file in one buffer of device memory, read once for all engines that need it."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import header_sha256, read_header
from wanexport.runtime.engines.device import room_on
from wanexport.runtime.engines.layer_parts import part_of
from wanexport.runtime.engines.weights_buffer import WeightsBuffer
from wanexport.runtime.errors import EngineFailure

_TIMED = 1000  # of the last switches
_ADVICE = "use --offload blocks with an AOTInductor engine, or --offload experts with two experts"

_resident: WeakValueDictionary[tuple[object, ...], "DeviceWeights"] = WeakValueDictionary()
_reading: WeakValueDictionary[tuple[object, ...], "threading.Lock"] = WeakValueDictionary()
_lock = threading.Lock()


class DeviceWeights(WeightsBuffer):
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
        self.switches: deque[float] = deque(maxlen=_TIMED)
        self._turn, self._holders = threading.Condition(), 0
        self._queue = threading.Lock()  # who waits for a replacement lets nobody overtake
        with file.opened():
            entries, header = read_header(file.path), header_sha256(file.path)
        offsets, total = (part := part_of(entries)).offsets, part.size
        if device.type == "cuda":
            check_room(total, device, str(file.path), _ADVICE)
        with torch.inference_mode(False):
            buffer = torch.empty(total, dtype=torch.uint8, device=device)
        super().__init__(entries, offsets, buffer, header, device)
        self._replace(file)
        self.switches.clear()

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
        self.fill(file)
        self.generation += 1
        self.switches.append(time.perf_counter() - started)


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


def is_resident(file: PinnedFile, device: torch.device) -> bool:
    """Whether `device_weights` would give what is on the device already."""
    with _lock:
        weights = _resident.get((str(device), file.identity))
        return weights is not None and weights.holds(file)


def check_room(size: int, device: torch.device, what: str, advice: str) -> None:
    """Raise EngineFailure when PyTorch cannot get so many bytes on the GPU, its cache included."""
    room, total = room_on(device), torch.cuda.mem_get_info(device)[1]
    if size > room:
        raise EngineFailure(
            f"{what} takes {size / 1e9:.1f} GB, the GPU has {room / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB free: close what else uses it, or {advice}"
        )
