"""What `wanexport run` is asked for, and what of it is refused before any work."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from wanexport.runtime.bundle.durable import check_writable
from wanexport.runtime.bundle.path import ARTEFACTS
from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.settings import Settings

VIDEO, LATENT = ".mp4", ".safetensors"
_MOST_BYTES = 2**24  # of a record


@dataclass(frozen=True)
class RunRequest:
    """What `run` is asked for. Exactly one of prompt and text_file is given.

    overwrite: whether an output that is there, and its record, may be replaced. engine says which
    engine runs, and how it is opened.
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
    overwrite: bool = False
    settings: Settings = field(default_factory=Settings)
    engine: EngineOptions = field(default_factory=EngineOptions)

    @property
    def makes_video(self) -> bool:
        """Whether the latent is decoded."""
        return self.output.suffix.lower() == VIDEO


def check_request(request: RunRequest) -> None:
    """Raise BadRequest, before any work, for what could not be done or written after it."""
    _check_output(request.output)
    _check_source(request)
    for path in (request.text_file, request.image, request.last_image):
        if path is not None and path.exists() and request.output.exists():
            if path.samefile(request.output):
                raise BadRequest(f"{path} is read by this run: name another -o")
    place = request.output.resolve()
    if any(place.is_relative_to((request.bundle / name).resolve()) for name in ARTEFACTS):
        raise BadRequest(f"{request.output} lies among the bundle's own files: name another -o")
    if not request.overwrite:
        for path in (request.output, sidecar(request.output)):
            if os.path.lexists(path):
                raise BadRequest(f"{path} exists: name another -o, or add --overwrite")


def _check_source(request: RunRequest) -> None:
    """Raise BadRequest unless the run is made from one thing, with what goes with that."""
    if (request.prompt is None) == (request.text_file is None):
        raise BadRequest("give one of --prompt TEXT and --text FILE")
    if request.prompt is not None:
        return
    prompted = ("negative", "image", "last_image")
    given = [name for name in prompted if getattr(request, name) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BadRequest(f"{names} goes with --prompt: the file of --text has what it takes in it")
    if request.model is not None and not request.makes_video:
        raise BadRequest(
            "-m is where the VAE comes from: leave it out with --text and a .safetensors output"
        )


def _check_output(output: Path) -> None:
    # Path.is_dir raises for a name that is too long.
    if output.suffix.lower() not in (VIDEO, LATENT) or os.path.isdir(output):
        raise BadRequest(
            f"{output}: a video goes to an .mp4 file, latents to a .safetensors file: "
            f"name one with -o"
        )
    try:
        check_writable(output)
        check_writable(output.with_suffix(LATENT))  # where that goes when decoding fails
        check_writable(sidecar(output))
    except OSError as error:
        raise BadRequest(
            f"cannot write {output} ({error.strerror}): name a file in an existing folder with -o"
        ) from error
    record = sidecar(output)
    if os.path.lexists(record) and (recorded := _recorded_output(record)) != output.name:
        held = f"is the record of {recorded}" if recorded else "is no record of a run"
        raise BadRequest(f"{record}, where the record goes, {held}: name another -o")


def sidecar(output: Path) -> Path:
    """Where the record of an output goes: clip.json of clip.mp4, x.safetensors.json of a latent."""
    is_video = output.suffix.lower() == VIDEO
    return output.with_suffix(".json") if is_video else output.with_name(output.name + ".json")


def _recorded_output(path: Path) -> str:
    """The name of the file whose record this is; empty when it is the record of no run."""
    try:
        record = json.loads(read_regular(path, at_most=_MOST_BYTES))
        return Path(record["output"]).name if "command" in record else ""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
