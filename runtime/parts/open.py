"""The encoders and the VAE around one engine: given, or found and opened when first needed."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.check import check_weights
from wanexport.runtime.bundle.manifest import ENCODERS, EngineRecord, WeightsRecord, read_manifest
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BundleError, WanExportError, WanExportWarning
from wanexport.runtime.machine.memory import free_bytes
from wanexport.runtime.parts.carried import carried_encoder
from wanexport.runtime.parts.find import ComponentFiles, find_components
from wanexport.runtime.parts.placement import (
    BEFORE,
    BESIDE,
    CPU,
    FIRST,
    encoder_bytes,
    needs_of,
    place_encoders,
    placement_note,
)
from wanexport.runtime.parts.protocols import (
    ImageEncoder,
    TextEncoder,
    VideoCodec,
    check_text_encoder,
    check_vae,
)
from wanexport.runtime.parts.vae_choice import choose_vae_engine


class Parts:
    """The parts that `given` holds, and the others of the bundle or of a checkpoint.

    A VAE of which the bundle has an engine is that engine, unless tiles are asked for. Encoders are
    those of `model` where one is named, else those that the bundle carries, else those of its
    checkpoint. `device` is PyTorch's name of where they are opened, but for what `place` puts on
    the CPU; `vae_tiling` is as in `open_vae`. What was given belongs to its giver, and is never
    closed here. One thread may call at a time.
    """

    def __init__(
        self,
        bundle: str | Path,
        model: str | Path | None,
        record: EngineRecord,
        device: str,
        given: Mapping[str, Any],
        *,
        vae_tiling: bool | None = None,
    ) -> None:
        self._options = {"vae": {"tiling": vae_tiling}}
        self.bundle, self.model, self.record, self.device = bundle, model, record, device
        self._given = {part: value for part, value in given.items() if value is not None}
        self._files: dict[str, ComponentFiles] = {}
        self._carried: dict[str, WeightsRecord | None] = {}  # once looked for
        self._opened: dict[str, Any] = {}
        self._opening: dict[str, Future[Any]] = {}
        self._notes: dict[str, str] = {}
        self._engine: tuple[EngineRecord | None] | None = None  # of the VAE, once looked for
        self.placement: dict[str, str] = {}  # of encoders, once `place` has decided it
        self.precedes = False  # whether the engine is not open yet
        self.later: frozenset[str] = frozenset()  # parts in whose memory the engine is to lie too

    def find(self, parts: Sequence[str]) -> None:
        """Find the files of these parts, without opening them.

        Raises BundleError, as `find_components` does, when one is missing.
        """
        known = self._given.keys() | self._files.keys()
        missing = [part for part in parts if part not in known and self.own(part) is None]
        if missing:
            files = find_components(self.bundle, self.model, needs=missing)
            self._files.update(dict.fromkeys(missing, files))

    def own(self, part: str) -> EngineRecord | WeightsRecord | None:
        """What the bundle itself has of a part: an engine of the VAE, or an encoder's weights."""
        if part == "vae":
            return self._vae_engine()
        if self.model is not None:
            return None
        if part not in self._carried:
            self._carried[part] = carried_encoder(self.bundle, part)
        return self._carried[part]

    def place(
        self, *, keeps_text: bool, options: EngineOptions, precedes: bool, first: bool
    ) -> None:
        """Decide where the encoders run beside the engine on a GPU; who asks for one is told.

        keeps_text: whether the text encoder is to stay; options: how the engine is opened there;
        precedes: whether it is still to be opened, and first: whether the first prompts are known
        then. Raises BundleError as read_manifest does.
        """
        self.precedes = precedes
        if device_kind(self.device) == "cpu":
            return
        manifest = read_manifest(Path(self.bundle))
        sizes = {
            part: encoder_bytes(manifest, part)
            for part, name in _INPUTS.items()
            if part not in self._given and name in self.record.inputs
        }
        vae = None if "vae" in self._given else self._vae_engine()
        needs = needs_of(
            manifest, self.record, vae,
            offload=options.offload, resident_blocks=options.resident_blocks,
        )  # fmt: skip
        needs = needs if precedes else replace(needs, engine=0, blocks="")
        free = free_bytes(self.device) + _cached_bytes(self.device)
        self.placement = place_encoders(
            needs, sizes, free, keeps_text=keeps_text, may_precede=precedes and first
        )
        there = [part for part, place in self.placement.items() if place in (BESIDE, BEFORE)]
        if needs.most + sum(sizes[part] for part in there) > free:
            self.later = frozenset(p for p in there if self.placement[p] == BEFORE)
        for part, place in self.placement.items():
            if place != BEFORE or keeps_text or part != "text_encoder":  # it was not asked to stay
                self._notes[part] = placement_note(part, place, sizes[part], needs, free)

    def begin(self, parts: Sequence[str]) -> None:
        """Begin to open these parts, each in a thread of its own; who needs one waits for it.

        Raises BundleError, before any is opened, when one is missing. What else goes wrong is told
        by the method that gives the part.
        """
        self.find(parts)
        known = self._given.keys() | self._opened.keys() | self._opening.keys()
        new = [part for part in dict.fromkeys(parts) if part not in known]
        if not new:
            return
        pool = ThreadPoolExecutor(len(new), "wanexport opening")
        self._opening.update({part: pool.submit(self._open, part) for part in new})
        pool.shutdown(wait=False)

    def text_encoder(self) -> TextEncoder:
        """The text encoder. Raises BundleError when there is none, or one of another width."""
        return self._part("text_encoder")

    def vae(self) -> VideoCodec:
        """The VAE. Raises BundleError when there is none, or it makes other latents."""
        return self._part("vae")

    def image_encoder(self) -> ImageEncoder:
        """The CLIP image encoder. Raises BundleError when there is none."""
        return self._part("image_encoder")

    def release(self, part: str) -> None:
        """Close a part that was opened here; its next use opens it again."""
        if (opening := self._opening.pop(part, None)) is not None:
            with suppress(Exception):  # what failed to open has nothing to release
                self._opened[part] = opening.result()
        if (opened := self._opened.pop(part, None)) is not None:
            opened.close()

    def spare(self, part: str, *, keep: bool) -> None:
        """Release a part after its use, unless it is to be kept and has its place on the GPU."""
        place = self.placement.get(part)
        if not keep or place == BEFORE or (place == FIRST and self.precedes):
            self.release(part)

    def close(self) -> None:
        """Close every part that was opened here."""
        for part in [*self._opening, *self._opened]:
            self.release(part)

    def _part(self, part: str) -> Any:
        if part in self._given:
            return self._given[part]
        if (opening := self._opening.pop(part, None)) is not None:
            self._opened[part] = opening.result()
        if part not in self._opened:
            self.find([part])
            self._opened[part] = self._open(part)
        opened = self._opened[part]
        if note := self._notes.pop(part, ""):
            warnings.warn(note, WanExportWarning, stacklevel=4)
        return opened

    def _open(self, part: str) -> Any:
        """Open a part that was found, and refuse, and close, one that does not fit the engine."""
        if part == "vae" and (engine := self._vae_engine()):
            return self._open_engine(engine)
        device, own = self._device_of(part), self._carried.get(part)
        if own is not None:
            opened = _CARRIED[part](check_weights(Path(self.bundle), own), device)
        else:
            opened = _OPENERS[part](self._files[part], device, **self._options.get(part, {}))
        try:
            if part in _CHECKS:
                origin = str(self.bundle) if own is not None else self._files[part].origin
                _CHECKS[part](opened, self.record, origin)
        except WanExportError:
            opened.close()
            raise
        if note := getattr(opened, "note", ""):  # told by the thread that asks for the part
            self._notes[part] = note
        return opened

    def _device_of(self, part: str) -> str:
        """Where an encoder computes: one that came first has no room once the engine is open."""
        place = self.placement.get(part)
        is_off = place == CPU or (place == FIRST and not self.precedes)
        return "cpu" if is_off else self.device

    def engine_is_open(self, device: str) -> None:
        """Say that the engine was opened, on this device: what came first has no room there."""
        self.precedes, self.device = False, device

    def _vae_engine(self) -> EngineRecord | None:
        """The bundle's engine of the VAE, where it has one that runs here, and no tiles are asked
        for: it takes the picture whole."""
        if self._options["vae"]["tiling"] is True:
            return None
        if self._engine is None:
            self._engine = (choose_vae_engine(self.bundle, self.record, self.device),)
        return self._engine[0]

    def _open_engine(self, engine: EngineRecord) -> VideoCodec:
        from wanexport.runtime.parts.vae_engine import open_vae_engine

        is_whole = self._options["vae"]["tiling"] is False
        tiles = None if is_whole else self._open_tiles
        return open_vae_engine(self.bundle, engine, self.device, tiles=tiles)

    def _open_tiles(self) -> VideoCodec:
        """The checkpoint's VAE over tiles, for where the engine's memory does not suffice."""
        files = find_components(self.bundle, self.model, needs=("vae",))
        codec: VideoCodec = _OPENERS["vae"](files, self.device, tiling=True)
        check_vae(codec, self.record, files.origin)
        return codec


def _cached_bytes(device: str) -> int:
    """What PyTorch holds of a GPU's memory, and has no tensor in."""
    import torch

    held: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return held


def _open_text_encoder(files: ComponentFiles, device: str) -> Any:
    from wanexport.runtime.parts.text_encoder import open_text_encoder

    return open_text_encoder(files.text_encoder, files.tokenizer, device=device, warns=False)


def _open_vae(files: ComponentFiles, device: str, *, tiling: bool | None) -> Any:
    from wanexport.runtime.parts.vae import open_vae

    return open_vae(files.vae, device=device, tiling=tiling)


def _open_image_encoder(files: ComponentFiles, device: str) -> Any:
    from wanexport.runtime.parts.image_encoder import open_image_encoder

    if files.image_encoder is None:
        raise BundleError(f"the model of {files.origin} takes no image features")
    return open_image_encoder(files.image_encoder, device=device)


def _open_carried_text(file: PinnedFile, device: str) -> Any:
    from wanexport.runtime.parts.text_encoder import open_carried_text_encoder

    return open_carried_text_encoder(file, device=device)


def _open_carried_image(file: PinnedFile, device: str) -> Any:
    from wanexport.runtime.parts.image_encoder import open_carried_image_encoder

    return open_carried_image_encoder(file, device=device)


_INPUTS = {"text_encoder": "text", "image_encoder": "image"}  # of an engine, which they make
_CARRIED = dict(zip(ENCODERS, (_open_carried_text, _open_carried_image)))
_OPENERS: dict[str, Callable[..., Any]] = {
    "text_encoder": _open_text_encoder,
    "vae": _open_vae,
    "image_encoder": _open_image_encoder,
}
_CHECKS: dict[str, Callable[[Any, EngineRecord, str], None]] = {
    "text_encoder": check_text_encoder,
    "vae": check_vae,
}
