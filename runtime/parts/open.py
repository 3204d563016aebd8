"""The encoders and the VAE around one engine: given, or found and opened when first needed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.errors import BundleError, WanExportError
from wanexport.runtime.parts.find import ComponentFiles, find_components
from wanexport.runtime.parts.protocols import (
    ImageEncoder,
    TextEncoder,
    VideoCodec,
    check_text_encoder,
    check_vae,
)
from wanexport.runtime.parts.vae_choice import choose_vae_engine


class Parts:
    """The parts that `given` holds, and the others of the bundle's checkpoint or of `model`'s.

    A VAE of which the bundle has an engine is that engine, unless tiles are asked for.
    `device` is PyTorch's name of where they are opened; `vae_tiling` is as in `open_vae`. What was
    given belongs to its giver, and is never closed here.
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
        self._opened: dict[str, Any] = {}
        self._engine: tuple[EngineRecord | None] | None = None  # of the VAE, once looked for

    def find(self, parts: Sequence[str]) -> None:
        """Find the files of these parts, without opening them.

        Raises BundleError, as `find_components` does, when one is missing.
        """
        known = self._given.keys() | self._files.keys()
        missing = [part for part in parts if part not in known]
        if "vae" in missing and self._vae_engine() is not None:
            missing.remove("vae")
        if missing:
            files = find_components(self.bundle, self.model, needs=missing)
            self._files.update(dict.fromkeys(missing, files))

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
        if (opened := self._opened.pop(part, None)) is not None:
            opened.close()

    def close(self) -> None:
        """Close every part that was opened here."""
        for part in list(self._opened):
            self.release(part)

    def _part(self, part: str) -> Any:
        if part in self._given:
            return self._given[part]
        if part not in self._opened and part == "vae" and (engine := self._vae_engine()):
            self._opened[part] = self._open_engine(engine)
        if part not in self._opened:
            self.find([part])
            self._opened[part] = _OPENERS[part](
                self._files[part], self.device, **self._options.get(part, {})
            )
            self._check(part)
        return self._opened[part]

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

    def _check(self, part: str) -> None:
        """Refuse, and close, a part that was opened and does not fit the engine."""
        try:
            if part in _CHECKS and part in self._files:
                _CHECKS[part](self._opened[part], self.record, self._files[part].origin)
        except WanExportError:
            self.release(part)
            raise


def _open_text_encoder(files: ComponentFiles, device: str) -> Any:
    from wanexport.runtime.parts.text_encoder import open_text_encoder

    return open_text_encoder(files.text_encoder, files.tokenizer, device=device)


def _open_vae(files: ComponentFiles, device: str, *, tiling: bool | None) -> Any:
    from wanexport.runtime.parts.vae import open_vae

    return open_vae(files.vae, device=device, tiling=tiling)


def _open_image_encoder(files: ComponentFiles, device: str) -> Any:
    from wanexport.runtime.parts.image_encoder import open_image_encoder

    if files.image_encoder is None:
        raise BundleError(f"the model of {files.origin} takes no image features")
    return open_image_encoder(files.image_encoder, device=device)


_OPENERS: dict[str, Callable[..., Any]] = {
    "text_encoder": _open_text_encoder,
    "vae": _open_vae,
    "image_encoder": _open_image_encoder,
}
_CHECKS: dict[str, Callable[[Any, EngineRecord, str], None]] = {
    "text_encoder": check_text_encoder,
    "vae": check_vae,
}
