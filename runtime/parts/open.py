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


class Parts:
    """The parts that `given` holds, and the others of the bundle's checkpoint or of `model`'s.

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

    def find(self, parts: Sequence[str]) -> None:
        """Find the files of these parts, without opening them.

        Raises BundleError, as `find_components` does, when one is missing.
        """
        missing = [part for part in parts if part not in self._given and part not in self._files]
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
        if part not in self._opened:
            self.find([part])
            self._opened[part] = _OPENERS[part](
                self._files[part], self.device, **self._options.get(part, {})
            )
            self._check(part)
        return self._opened[part]

    def _check(self, part: str) -> None:
        """Refuse, and close, a part that was opened and does not fit the engine."""
        try:
            if part in _CHECKS:
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
