"""One causal video in the making: steps of its next chunk, and the cache of what was committed."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from wanexport.runtime.arrays import Array, is_torch, like, to_numpy, whole_numbers_like
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import SamplingDefaults
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.kept_frames import KeptFrames, Window
from wanexport.runtime.program import Input


class Caller(Protocol):
    """What a denoiser is to its streams."""

    record: EngineRecord

    @property
    def inputs(self) -> dict[str, Input]: ...

    @property
    def sampling(self) -> SamplingDefaults: ...

    @property
    def weights(self) -> str: ...

    @property
    def weights_set(self) -> Any: ...

    def array(self, value: Array) -> Array: ...

    def check(self, inputs: Mapping[str, Array], known: Collection[str]) -> dict[str, Array]: ...

    def expert(self, timestep: float) -> str: ...

    def memory(self) -> Memory: ...

    def run(
        self, expert: str, arrays: Mapping[str, Array], memory: Memory, moment: str, weights: Any
    ) -> Array: ...


class Stream:
    """A causal video, chunk by chunk: `step` as often as the sampler wants, then `commit`.

    A step changes nothing that another step or the commit of its chunk would not write again: steps
    may be repeated, with other latents too, and a chunk may be left before its commit. Streams of
    one denoiser have nothing in common but the weights. One thread may call at a time.
    `Denoiser.stream` opens one.
    """

    def __init__(self, denoiser: Caller, text: Array, window: Window) -> None:
        self.denoiser, self.window = denoiser, window
        self._kept = self._no_frames()
        self._given = self._checked(text)
        self._memory = denoiser.memory()
        self._weights = denoiser.weights_set
        self._count = 0  # frames of the chunk whose place on the device is known
        self._place: dict[str, Array] = {}
        self._slots: tuple[int, ...] = ()  # of the chunk's frames that can be seen
        self._written: tuple[int, ...] = ()  # the same of the last commit

    @property
    def geometry(self) -> Geometry:
        """The video's, whose `chunk` is how many latent frames a call takes at the most."""
        return self.denoiser.record.geometry

    @property
    def position(self) -> int:
        """The number of the next chunk's first latent frame: so many are committed."""
        return self._kept.position

    @property
    def frames(self) -> tuple[int, ...]:
        """The numbers of the committed latent frames whose keys and values are in the cache."""
        return self._kept.frames

    def step(self, latent: Array, timestep: Array) -> Array:
        """The velocity of the next chunk, [1, 16, f, h, w]: shaped and placed like latent, fp32.

        f is 1 to the engine's chunk; timestep is a number, or [f]. The host waits for nothing on
        a GPU, where latent is there.
        Raises BadRequest for an input that does not fit, a full cache, a chunk beyond the last
        position that the model knows, and weights that were changed since the stream began;
        EngineFailure when the device cannot.
        """
        count, arrays = self._arrays(latent, timestep)
        velocity = self._run(arrays, "step")
        own = velocity if count == velocity.shape[2] else velocity[:, :, :count]
        return like(own, latent)

    def commit(self, latent: Array, timestep: Array = 0.0) -> None:
        """Keep a finished chunk, or one that is given, and move on to the next one.

        Its keys and values are those of one pass at the timestep. Raises as `step` does, and the
        chunk is then not kept.
        """
        _, arrays = self._arrays(latent, timestep)
        self._run(arrays, "commit")
        self._kept.commit()
        self._written, self._count = self._slots, 0

    def reset(self, text: Array | None = None) -> None:
        """Begin another video, of another text where one is given, with the weights now in use.

        Raises BadRequest for a text that does not fit; the video before then goes on.
        """
        if text is not None:
            self._given = self._checked(text)
        self._kept, self._count = self._no_frames(), 0
        self._weights = self.denoiser.weights_set
        self._memory.values = None
        for kept in self._memory.state.values():  # NaN of a failed video would outlast a mask
            kept[...] = 0

    def rewind(self, frames: int) -> None:
        """Drop the last committed chunks, of so many latent frames together; 0 drops none.

        Raises BadRequest when no chunk begins there, and when frames that a chunk there would see
        have left the cache.
        """
        self._kept.rewind(frames)
        self._count = 0

    @property
    def kept_names(self) -> tuple[str, ...]:
        """The names of the tensors of the state that a commit writes."""
        return tuple(name for name in self._memory.state if name.startswith("cache_"))

    def kept(self, name: str) -> Array:
        """What the last commit has written of one of them: [1, f * tokens, H, D], of those frames
        of the chunk that can be seen. For comparisons: it waits for the device."""
        tokens, tensor = self.geometry.frame_tokens, self._memory.state[name]
        rows = [slot * tokens + token for slot in self._written for token in range(tokens)]
        axis = tuple(tensor.shape).index(self.geometry.slots * tokens)
        return tensor.swapaxes(axis, 1)[:, rows]

    def check_room(self, sizes: Collection[int]) -> None:
        """Raise BadRequest unless chunks of so many frames each can follow."""
        self._kept.check_room(sizes)

    def _no_frames(self) -> KeptFrames:
        return KeptFrames(self.window, chunk=self.geometry.chunk, cache=self.geometry.cache)

    def _checked(self, text: Array) -> dict[str, Array]:
        checked = self.denoiser.check({"text": text}, known=self.denoiser.inputs)
        return {name: self.denoiser.array(value) for name, value in checked.items()}

    def _arrays(self, latent: Array, timestep: Array) -> tuple[int, dict[str, Array]]:
        """How many frames a chunk has, and all inputs of a call on the device.

        Nothing is changed before everything has been checked.
        """
        self._check_weights()
        latent = latent if is_torch(latent) else to_numpy(latent)
        count = latent.shape[2] if latent.ndim == 5 else 0
        missing = self.geometry.chunk - count
        given = {"latent": latent, "timestep": timestep}
        if 0 < count and 0 < missing:
            given = {"latent": _filled(latent, missing, 2), "timestep": _times(timestep, missing)}
        checked = self.denoiser.check(given, known=self.denoiser.inputs)
        if count != self._count:
            self._place, self._count = self._placed(count), count
        arrays = {name: self.denoiser.array(value) for name, value in checked.items()}
        return count, {**self._given, **arrays, **self._place}

    def _placed(self, count: int) -> dict[str, Array]:
        """Where the next chunk lies, on the device: once a chunk."""
        self._count = 0
        place = self._kept.begin(count)
        self._slots = tuple(s for s in place.slots[:count] if s != self.geometry.cache)
        keys = len(place.attended) * self.geometry.frame_tokens
        self._memory.attended = keys
        parts = ([place.position], place.slots, [keys])
        names = ("position", "slots", "keys")
        return dict(zip(names, whole_numbers_like(parts, self._given["text"])))

    def _run(self, arrays: Mapping[str, Array], moment: str) -> Array:
        expert = self.denoiser.expert(0.0)  # the only one
        return self.denoiser.run(expert, arrays, self._memory, moment, self._weights)

    def _check_weights(self) -> None:
        if self.denoiser.weights_set != self._weights:
            raise BadRequest(
                f"the weights became {self.denoiser.weights} in the middle of this video, whose "
                f"frames are kept as those before saw them: use those again, or begin anew (reset)"
            )


def _times(timestep: Array, missing: int) -> Array:
    """Timesteps of the frames [f], with zeros for those that fill the chunk up; a number stays."""
    times = timestep if is_torch(timestep) else to_numpy(timestep)
    is_number = times.ndim == 0 or times.shape[0] == 1
    return times if is_number else _filled(times, missing, 0)


def _filled(array: Array, missing: int, axis: int) -> Array:
    """array with so many zeros more along an axis."""
    if not is_torch(array):
        widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
        return np.pad(array, widths)
    import torch

    return torch.nn.functional.pad(array, [0, 0] * (array.ndim - 1 - axis) + [0, missing])
