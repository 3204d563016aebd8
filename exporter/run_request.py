"""What `wanexport run` is asked for, and what of it is refused before any work."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanexport.runtime.durable import check_writable
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.regular_file import read_regular

VIDEO, LATENT = ".mp4", ".safetensors"
_LARGEST_RECORD = 1 << 24  # bytes


@dataclass(frozen=True)
class RunRequest:
    """What `run` is asked for. Exactly one of prompt and text_file is given.

    settings are those of `sample`, load_options those of `load`.
    """

    bundle: Path
    output: Path
    prompt: str | None = None
    text_file: Path | None = None
    negative: str | None = None
    image: Path | None = None
    last_image: Path | None = None
    model: str | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    load_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def makes_video(self) -> bool:
        """Whether the latent is decoded."""
        return self.output.suffix.lower() == VIDEO


def check_request(request: RunRequest) -> None:
    """Raise WanExportError, before any work, for what could not be done or written after it."""
    _check_output(request.output)
    if (request.prompt is None) == (request.text_file is None):
        raise WanExportError("give one of --prompt TEXT and --text FILE")
    prompted = ("negative", "image", "last_image")
    given = [name for name in prompted if getattr(request, name) is not None]
    if request.prompt is None and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise WanExportError(
            f"{names} goes with --prompt: the file of --text has what it takes in it"
        )
    if request.prompt is None and request.model is not None and not request.makes_video:
        raise WanExportError(
            "-m is where the VAE comes from: leave it out with --text and a .safetensors output"
        )
    for path in (request.text_file, request.image, request.last_image):
        if path is not None and path.exists() and request.output.exists():
            if path.samefile(request.output):
                raise WanExportError(f"{path} is read by this run: name another -o")


def _check_output(output: Path) -> None:
    # Path.is_dir raises for a name that is too long.
    if output.suffix.lower() not in (VIDEO, LATENT) or os.path.isdir(output):
        raise WanExportError(
            f"{output}: a video goes to an .mp4 file, latents to a .safetensors file: "
            f"name one with -o"
        )
    try:
        check_writable(output)
    except OSError as error:
        raise WanExportError(
            f"cannot write {output} ({error.strerror}): name a file in an existing folder with -o"
        ) from error
    if sidecar(output).exists() and not _is_record(sidecar(output)):
        raise WanExportError(
            f"{sidecar(output)}, where the record goes, is no record of a run: name another -o"
        )


def sidecar(output: Path) -> Path:
    """Where the record of an output goes."""
    return output.with_suffix(".json")


def _is_record(path: Path) -> bool:
    try:
        return "command" in json.loads(read_regular(path, at_most=_LARGEST_RECORD))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
