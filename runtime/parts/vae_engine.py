"""A bundle's VAE engine as a VideoCodec: pixels to normalised latents and back, whole or streaming.

Tensors stay on the engine's device from the caller's latent to frames, which are copied out once.
Its convolutions are not of diffusers' model: nothing here imports that.
"""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanexport.runtime.arrays import Array, count_not_finite, is_on_gpu, is_torch, to_numpy
from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import VAE, EngineRecord, read_manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.device import gpu_or_cpu, on_device
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights
from wanexport.runtime.engines.operators import open_kernel
from wanexport.runtime.engines.vae_clip import Clip
from wanexport.runtime.engines.vae_regions import BoundVae, VaeRegions
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportWarning
from wanexport.runtime.geometry import TEMPORAL_STRIDE
from wanexport.runtime.host_copy import HostCopy
from wanexport.runtime.parts.protocols import VideoCodec

CLOSED = "the VAE is closed: open it again"


def open_vae_engine(
    bundle: str | Path,
    record: EngineRecord,
    device: str,
    *,
    tiles: Callable[[], VideoCodec] | None = None,
) -> "VaeEngine":
    """Open an engine that `choose_vae_engine` gave; tiles opens what serves where memory is short.

    Raises BundleError when a file is missing or was altered, EngineFailure when the device has too
    little memory for the weights.
    """
    bundle = Path(bundle)
    weights = read_manifest(bundle).weights_of(record.layout, role=VAE)
    if not weights:
        raise BundleError(f"{bundle} has no weights for engine {record.name}: build it again")
    # Engines are code: their whole content is checked at every load.
    files = {role: check_content(bundle, file) for role, file in record.files.items()}
    return VaeEngine(record, files, check_weights(bundle, weights[0]), device, tiles=tiles)


class VaeEngine:
    """A VideoCodec of one picture size and any number of frames. It serves one call at a time.

    Packages are opened when they are first needed. Where memory does not suffice, `tiles` gives
    another codec, which cuts the picture into tiles and serves all later calls of the kind; `tiled`
    tells whether it served the last one.
    """

    def __init__(
        self,
        record: EngineRecord,
        files: Mapping[str, PinnedFile],
        weights: PinnedFile,
        device: str,
        *,
        tiles: Callable[[], VideoCodec] | None = None,
    ) -> None:
        self.record, self.device_of, self.tiled = record, gpu_or_cpu(device), False
        self.sizes = record.details.sizes
        self.channels: int = self.sizes.channels
        self.spatial_stride: int = self.sizes.spatial_stride
        self._files, self._tiles = files, tiles
        self._weights: DeviceWeights | None = device_weights(weights, self.device_of)
        self._parts: dict[str, BoundVae] = {}
        self._decided: dict[str, bool] = {}  # task -> whether in tiles
        self._cutting: VideoCodec | None = None

    @property
    def device(self) -> str:
        """PyTorch's name of the device."""
        return str(self.device_of)

    def encode(self, video: Array) -> np.ndarray:
        """The normalised posterior mean, fp32 [1, C, f, h, w], of a video [3, F, H, W] in [-1, 1].

        F is of 4k+1, H and W are the engine's. Raises BadRequest when the video has another shape,
        NaN or Inf, and EngineFailure when memory does not suffice.
        """
        shape = self._shape(video, 4)
        sides = (self.record.geometry.height, self.record.geometry.width)
        if shape[0] != 3 or shape[1] % TEMPORAL_STRIDE != 1 or shape[2:] != sides:
            raise BadRequest(
                f"a video of shape {list(shape)} cannot be encoded: this engine takes "
                f"[3, F, {sides[0]}, {sides[1]}], F of 4k+1"
            )
        mean: np.ndarray = self._run("encode", video, partial(self._encode, shape))
        return mean

    def decode(self, latent: Array) -> np.ndarray:
        """The frames, uint8 [F, H, W, 3], of a normalised latent [1, C, f, h, w].

        A value v, clamped to [-1, 1], becomes (v + 1) / 2 * 255 without its fraction. Raises
        BadRequest when the latent has another shape, NaN or Inf, and EngineFailure when memory does
        not suffice.
        """
        self.check_latent(latent)
        frames: np.ndarray = self._run("decode", latent, self._decode)
        return frames

    def decode_chunks(self, latent: Array) -> Generator[np.ndarray, None, None]:
        """The frames of `decode`, chunk by chunk, uint8 [n, H, W, 3].

        On a GPU they are copied beside the work of the next chunk, which goes on while the caller
        has them. Raises as `decode` does; where memory did not suffice, before the first frame, one
        chunk is the whole, made of tiles.
        """
        self.check_latent(latent)
        self.check("decode", latent)
        if not self._takes_tiles("decode"):
            try:
                yield from self._streamed(latent)
                return
            except EngineFailure as error:
                self._take_tiles("decode", error)
        yield self._in_tiles("decode", latent)

    def session(self) -> "VaeSession":
        """Decoding from a first frame on, latents in order; its state is its own.

        It takes the engine's whole memory for a call: it is never cut into tiles.
        """
        return VaeSession(self)

    def close(self) -> None:
        """Free the weights and the packages; later calls raise EngineFailure."""
        self._weights = None
        self._parts.clear()
        if (cutting := getattr(self._cutting, "close", None)) is not None:
            cutting()

    def check(self, task: str, *given: Array) -> None:
        """Raise EngineFailure after `close`, and BadRequest for NaN and Inf that are on a CPU."""
        if self._weights is None:
            raise EngineFailure(CLOSED)
        for value in given:
            if bad := count_not_finite(value if is_on_gpu(value) else to_numpy(value)):
                raise BadRequest(
                    f"cannot {task} {bad} values that are NaN or Inf: look at what made them"
                )

    def clip(self, part: str) -> Clip:
        """A clip to decode or encode, its packages open. Raises EngineFailure after `close`."""
        if self._weights is None:
            raise EngineFailure(CLOSED)
        if part not in self._parts:
            record = self.record
            kernels = {kind: open_kernel(n, None) for kind, n in record.details.attention.items()}
            regions = VaeRegions(
                self._files, self.sizes, record.geometry, record.dtype, part, kernels,
                self.device_of,
            )  # fmt: skip
            self._parts[part] = regions.bind(self._weights.tensors)
        return self._parts[part].clip()

    def on_device(self, value: Array) -> Tensor:
        """An fp32 tensor on the device, without a copy of what is there."""
        tensor = value.detach() if is_torch(value) else torch.from_numpy(to_numpy(value))
        is_gpu = self.device_of.type == "cuda"
        return tensor.to(self.device_of, torch.float32, non_blocking=is_gpu)

    def _shape(self, value: Array, rank: int) -> tuple[int, ...]:
        """The shape of a caller's array, of so many numbers; raises BadRequest for no array."""
        found = tuple(value.shape) if is_torch(value) else to_numpy(value).shape
        return found if len(found) == rank and all(found) else (0,) * rank

    def check_latent(self, latent: Array) -> None:
        """Raise BadRequest for a latent that this engine does not decode."""
        _, height, width = self.record.geometry.latent
        batch, channels, _, *sides = self._shape(latent, 5)
        if (batch, channels, *sides) != (1, self.channels, height, width):
            found = list(getattr(latent, "shape", ()))
            raise BadRequest(
                f"a latent of shape {found} cannot be decoded: this engine takes "
                f"[1, {self.channels}, F, {height}, {width}]"
            )

    def _run(self, task: str, given: Array, work: Callable[[Array], Any]) -> Any:
        """Encode or decode; in tiles where memory did not suffice the first time."""
        self.check(task, given)
        if not self._takes_tiles(task):
            try:
                with self.computing(task):
                    result = work(given)
                self._decided[task] = False
                return result
            except EngineFailure as error:
                self._take_tiles(task, error)
        return self._in_tiles(task, given)

    def _takes_tiles(self, task: str) -> bool:
        self.tiled = self._decided.get(task, False)
        return self.tiled

    def _take_tiles(self, task: str, error: EngineFailure) -> None:
        """Decide for tiles after a first failure; raises it where that cannot be."""
        if self._tiles is None or task in self._decided:
            raise error
        warnings.warn(f"{error}: tiles are taken", WanExportWarning, stacklevel=4)
        torch.cuda.empty_cache()
        self.tiled = self._decided[task] = True

    def _in_tiles(self, task: str, given: Array) -> Any:
        assert self._tiles is not None
        self._cutting = self._cutting or self._tiles()
        return getattr(self._cutting, task)(given)

    @contextmanager
    def computing(self, task: str) -> Iterator[None]:
        """What the device raises within the block becomes an EngineFailure of one line."""
        autocast = torch.autocast(self.device_of.type, enabled=False)
        try:
            with torch.no_grad(), autocast, on_device(self.device_of):
                yield
        except EngineFailure as error:
            if error.__cause__ is None:  # not the device's
                raise
            raise EngineFailure(
                f"engine {self.record.name} failed to {task} on {self.device} "
                f"({error.__cause__!s:.120}), for want of memory most likely: free some, build it "
                f"with a smaller --vae-chunk, or cut the picture into tiles (vae_tiling)"
            ) from error

    def _encode(self, shape: tuple[int, ...], video: Array) -> np.ndarray:
        """Frames go to the device a chunk at a time."""
        clip, means = self.clip("encode"), []
        cuts = [0, *range(1, shape[1], clip.chunk), shape[1]]
        for begin, end in pairwise(cuts):
            frames = self.on_device(video[:, begin:end]).permute(1, 2, 3, 0)
            means += [written["mean"] for written in clip.feed(frames)]
        means += [written["mean"] for written in clip.finish()]
        found: np.ndarray = torch.cat(means).permute(3, 0, 1, 2)[None].contiguous().cpu().numpy()
        return found

    def _decode(self, latent: Array) -> np.ndarray:
        size = self.record.geometry
        count = (latent.shape[2] - 1) * TEMPORAL_STRIDE + 1
        is_gpu = self.device_of.type == "cuda"
        frames = torch.empty(
            count, size.height, size.width, 3, dtype=torch.uint8, pin_memory=is_gpu
        )
        done = 0
        for own in self._computed(latent):
            frames[done : done + len(own)].copy_(own, non_blocking=True)
            done += len(own)
        if is_gpu:
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(self.device_of))
            copied.synchronize()
        array: np.ndarray = frames.numpy()
        return array

    def _computed(self, latent: Array) -> Iterator[Tensor]:
        """The frames of each call, on the device; nothing is computed before it is asked for."""
        clip, given = self.clip("decode"), self.on_device(latent)[0].permute(1, 2, 3, 0)
        for written in chain(clip.feed(given), clip.finish()):
            yield written["frames"]

    def _streamed(self, latent: Array) -> Iterator[np.ndarray]:
        """The frames of each call, on the host. A GPU has a call to go on with meanwhile; that
        memory suffices is known when two calls, or all, were launched."""
        computed, copies = self._computed(latent), deque[HostCopy]()
        on_the_side = torch.cuda.Stream(self.device_of) if self.device_of.type == "cuda" else None
        is_last = False
        while not is_last:
            with self.computing("decode"):
                frames = next(computed, None)
                if frames is not None:
                    copies.append(HostCopy(frames, on_the_side))
            is_last = frames is None
            if is_last or len(copies) > 1:
                self._decided["decode"] = False
            while copies and (is_last or len(copies) > 1 or self._may_go(copies[0])):
                with self.computing("decode"):
                    found = copies.popleft().array()
                yield found

    def _may_go(self, copy: HostCopy) -> bool:
        return "decode" in self._decided and copy.is_there()


class VaeSession:
    """Latents in, frames out as soon as there are enough of them.

    The first latent frame gives one frame at once, later ones four each, in the engine's chunks.
    """

    def __init__(self, engine: VaeEngine) -> None:
        self.engine = engine
        engine.check("decode")
        with engine.computing("decode"):
            self._clip = engine.clip("decode")

    def decode(self, latents: Array) -> Array:
        """The frames, uint8 [n, H, W, 3], that the next latents [1, C, f, h, w] complete.

        They are a tensor on the engine's device where the latents are tensors, else a numpy array;
        n may be 0. Raises as `VaeEngine.decode` does.
        """
        self.engine.check_latent(latents)
        self.engine.check("decode", latents)
        given = self.engine.on_device(latents)[0].permute(1, 2, 3, 0)
        return self._joined(self._clip.feed(given), is_torch(latents))

    def finish(self, *, as_tensor: bool = False) -> Array:
        """The frames of latents that wait for others of a chunk; there come no more."""
        return self._joined(self._clip.finish(), as_tensor)

    def _joined(self, results: Iterable[Mapping[str, Tensor]], as_tensor: bool) -> Array:
        size = self.engine.record.geometry
        with self.engine.computing("decode"):
            none = torch.empty(
                0, size.height, size.width, 3, dtype=torch.uint8, device=self.engine.device_of
            )
            frames = torch.cat([none, *(written["frames"] for written in results)])
            return frames if as_tensor else frames.cpu().numpy()
