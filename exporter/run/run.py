"""`wanexport run`: a prompt, or text embeddings, becomes a video or a latent, and a record of how.

What needs PyTorch is imported where it is needed: text embeddings to a latent work without.
"""

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from wanexport.exporter.compare.recorded import read_sample_inputs
from wanexport.exporter.run.record import RunResult, run_record
from wanexport.exporter.run.request import LATENT, RunRequest, check_request, sidecar
from wanexport.runtime.arrays import to_numpy
from wanexport.runtime.bundle.check import file_sha256
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.bundle.tensorfile import save_arrays
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest, WanExportError, explain, needing_extra
from wanexport.runtime.family import family_named
from wanexport.runtime.host_copy import HostCopy
from wanexport.runtime.load import chosen, load
from wanexport.runtime.parts.find import PARTS, find_components, origin_note
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.pictures import fit_images
from wanexport.runtime.parts.protocols import VideoCodec, decoded_chunks
from wanexport.runtime.sample import Plan, Step, plan_of, run_plan, seeded_noise
from wanexport.runtime.sample_stream import sample_clip
from wanexport.runtime.serving.finished import check_step, finished_steps
from wanexport.runtime.serving.video import write_chunks

if TYPE_CHECKING:
    from wanexport.runtime.serving.request import Generation

Show = Callable[[str, int, int], None]  # stage, how much of it is done, of how much


def run(request: RunRequest, *, show: Show, tell: Callable[[str], None]) -> dict[str, Any]:
    """Sample and write the output, and beside it the record that is returned.

    show is given the progress; tell what became of an image, before the sampling, and after it
    whether the VAE cut it into tiles. A video is written while the rest of it is decoded. When one
    of both fails, the latent is saved, and the error or tell says where.
    Raises WanExportError for what does not fit together, and as `load` and `sample` do.
    """
    check_request(request)
    if request.makes_video:  # not after an hour of sampling
        with needing_extra("pipeline", "an .mp4 file"):
            import av  # noqa: F401
    show("opening the engine", 0, 0)
    steps = _Steps(show, decodes=request.makes_video)
    make = _from_text if request.prompt is None else _from_prompt
    with saving_the_latent(request.output, steps, tell):
        result = make(request, show, tell, steps)
    if not request.makes_video:
        save_arrays(request.output, {"latent": result.latent})
    try:
        record = run_record(request, result)
    except WanExportError as error:
        raise WanExportError(f"{request.output} is written, but not its record: {error}") from error
    return write_record(request.output, record)


def write_record(output: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record, which lies beside the output from then on.

    Raises WanExportError when it cannot be written.
    """
    try:
        # The command in it is for copying: no character of a prompt is written as its number.
        written = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_durably(sidecar(output), written.encode(errors="backslashreplace"))
    except OSError as error:
        raise WanExportError(
            f"{output} is written, but not its record: {explain(error)}"
        ) from error
    return record


class Latent(Protocol):
    """What has the latent that there is by now, None for none."""

    @property
    def latent(self) -> np.ndarray | None: ...


class _Steps:
    """Shows each finished step, and keeps the last one's latent where it is to be decoded.

    The pace that is shown is that of the steps after the first.
    """

    def __init__(self, show: Show, *, decodes: bool) -> None:
        self.latent: np.ndarray | None = None
        self._show, self._decodes = show, decodes
        self._began = 0.0

    def __call__(self, step: Step, steps: int) -> None:
        now, done = time.monotonic(), step.index + 1
        self._began = self._began if step.index else now
        pace = f", {(now - self._began) / step.index:.2f} s/step" if step.index else ""
        self._show(f"sampling{pace}", done, steps)
        if done == steps and self._decodes:
            # On the host, where a GPU's failure cannot take it; nothing runs there at this moment.
            self.latent = HostCopy(step.latent).array()
            self._show("decoding and writing the video", 0, 0)


@contextmanager
def saving_the_latent(output: Path, steps: Latent, tell: Callable[[str], None]) -> Iterator[None]:
    """Save the latent when what follows the last step fails or is interrupted, and say where.

    It never replaces a file. What cannot be saved either leaves the error as it was.
    """
    try:
        yield
    except BaseException as error:
        if steps.latent is None:
            raise
        tags = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
        names = (output.with_suffix(tag + LATENT) for tag in tags)
        path = next(name for name in names if not name.exists())
        try:
            save_arrays(path, {"latent": steps.latent})
        except (OSError, WanExportError):
            raise error from None
        said = f"the latent is saved as {path}"
        if isinstance(error, WanExportError | OSError):
            raise WanExportError(f"{explain(error)}; {said}") from error
        tell(said)
        raise


def _from_text(
    request: RunRequest, show: Show, tell: Callable[[str], None], steps: _Steps
) -> RunResult:
    assert request.text_file is not None
    started = time.monotonic()
    denoiser = load(request.bundle, **request.engine.given())
    inputs = read_sample_inputs(request.text_file, denoiser.inputs)
    text = file_facts(request.text_file)  # it may be another when the sampling ends
    if not denoiser.geometry.chunk:
        inputs.setdefault("noise", seeded_noise(denoiser.inputs["latent"].shape, request.seed))
    inputs = {name: denoiser.array(value) for name, value in inputs.items()}
    plan = plan_of(denoiser, request.settings)
    vae, facts = _open_vae(request, denoiser, tell) if request.makes_video else (None, {})
    load_seconds = time.monotonic() - started
    show("sampling", 0, len(plan))
    latent, pace = _sample(denoiser, plan, inputs, steps, request.seed)
    if vae is not None:
        write_chunks(request.output, decoded_chunks(vae, latent), denoiser.sampling.fps)
    return RunResult(
        denoiser=denoiser,
        latent=to_numpy(latent),
        load_seconds=load_seconds,
        seconds_per_step=pace,
        facts={
            "text": text,
            **facts,
            "solver": plan.solver,
            "timesteps": plan.schedule.timesteps,
            "guidance": plan.guidance,
        },
    )


def _open_vae(
    request: RunRequest, denoiser: Denoiser, tell: Callable[[str], None]
) -> tuple[VideoCodec, dict[str, Any]]:
    """What decodes a latent, and where it was found."""
    facts = component_facts(request, denoiser, ("vae",), tell)
    parts = Parts(request.bundle, request.model, denoiser.record, denoiser.device, {})
    return parts.vae(), facts


def _sample(
    denoiser: Denoiser,
    plan: Plan,
    inputs: Mapping[str, Any],
    on_step: Callable[[Step, int], None],
    seed: int,
) -> tuple[Any, float]:
    """Return the final latent and the seconds per step; a causal model draws more than the noise
    with the seed."""
    started, done = time.monotonic(), 0

    def told(step: Step, steps: int) -> None:
        nonlocal done
        check_step(step, denoiser.record.name)
        on_step(step, steps)
        done = step.index + 1

    if denoiser.geometry.chunk:
        latent = sample_clip(denoiser, plan, seed=seed, on_step=told, **_of_clip(inputs))
        return latent, (time.monotonic() - started) / done
    for step in finished_steps(run_plan(denoiser, plan, **inputs), denoiser.record.name):
        on_step(step, len(plan))
    return step.latent, (time.monotonic() - started) / len(plan)


def _of_clip(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a causal clip takes of a file's arrays. Raises BadRequest for what it does not."""
    if wrong := inputs.keys() - {"text", "noise", "negative"}:
        raise BadRequest(
            f"a causal model takes no {min(wrong)}: leave it out of the file of --text"
        )
    return {name: value for name, value in inputs.items() if name != "negative"}


def _from_prompt(
    request: RunRequest, show: Show, tell: Callable[[str], None], steps: _Steps
) -> RunResult:
    from wanexport.runtime.serving.pipeline import Pipeline

    assert request.prompt is not None
    started = time.monotonic()
    beside, prompts = _opened_beside(request), _prompts(request)
    with Pipeline(
        request.bundle, model=request.model, keep_text_encoder=False, open_parts=beside,
        prompts=prompts, **request.engine.given(),
    ) as pipeline:  # fmt: skip
        denoiser = pipeline.denoiser
        load_seconds = time.monotonic() - started
        told, facts = _prepare(request, denoiser, show, tell)
        made = pipeline.generate(
            request.prompt,
            negative=request.negative,
            image=request.image,
            last_image=request.last_image,
            seed=request.seed,
            decode=request.makes_video,
            output=request.output if request.makes_video else None,
            on_step=steps,
            **asdict(request.settings),
        )
    for note in made.notes:
        if note not in told:
            tell(note)
    return RunResult(
        denoiser=denoiser,
        latent=made.latent,
        load_seconds=load_seconds,
        seconds_per_step=made.seconds["sampling"] / len(made.timesteps),
        facts={**facts, "placement": pipeline.placement, **_facts_of(made)},
    )


def _opened_beside(request: RunRequest) -> tuple[str, ...]:
    """The parts that open while the engine does: all that the run takes, where the bundle itself
    has all of them, and none is followed to a checkpoint."""
    with warnings.catch_warnings(action="ignore"):  # who opens the engine says it
        record, device = chosen(request.bundle, **request.engine.given())
    needs = _needs(request, record)
    own = _own_parts(request, record, device, needs)
    return needs if own.keys() >= set(needs) else ()


def _prompts(request: RunRequest) -> tuple[str, ...]:
    """What the run encodes; the official negative prompt too where no other is given."""
    family = read_manifest(request.bundle).config.family
    official = family_named(family).negative
    prompt, negative = request.prompt, request.negative
    return (prompt or "", official if negative is None else negative)


def _prepare(
    request: RunRequest, denoiser: Denoiser, show: Show, tell: Callable[[str], None]
) -> tuple[list[str], dict[str, Any]]:
    """Refuse what cannot work before a part is downloaded; the notes told, and facts."""
    plan = plan_of(denoiser, request.settings)
    if request.negative is not None and all(scale == 1 for scale in plan.guidance):
        tell("--negative changes nothing here: guidance is 1 in every step")
    given = {"image": request.image, "last_image": request.last_image}
    images = {name: file_facts(path) for name, path in given.items()}
    fitted = fit_images(denoiser.record, request.image, request.last_image)
    told = [image.note for image in fitted if image.note]
    for note in told:
        tell(note)
    show("finding the encoders and the VAE", 0, 0)
    components = component_facts(request, denoiser, _needs(request, denoiser.record), tell)
    encoded = "the prompt and image" if request.image else "the prompt"
    show(f"encoding {encoded}, then the first step", 0, 0)
    return told, {**images, **components}


def _facts_of(made: "Generation") -> dict[str, Any]:
    """What the pipeline says of its prompts and its sampling."""
    return {
        "prompt": made.prompt,
        "negative": made.negative,
        "notes": made.notes,
        "solver": made.solver,
        "timesteps": made.timesteps,
        "guidance": made.guidance,
        "seconds": {stage: round(seconds, 3) for stage, seconds in made.seconds.items()},
    }


def _needs(request: RunRequest, engine: EngineRecord) -> tuple[str, ...]:
    """The parts that a prompt takes: no VAE from text to a latent, CLIP where the engine has it."""
    if not request.makes_video and not request.image:
        return ("text_encoder",)
    return tuple(part for part in PARTS if part != "image_encoder" or "image" in engine.inputs)


def component_facts(
    request: RunRequest, denoiser: Denoiser, needs: Sequence[str], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Where the parts come from. Raises WanExportError when one is missing."""
    own = _own_parts(request, denoiser.record, denoiser.device, needs)
    needs = [part for part in needs if part not in own]
    if not needs:
        return {"components": own}
    if note := origin_note(request.bundle, request.model, needs=needs):
        tell(note)  # before anything is downloaded
    files = find_components(request.bundle, request.model, needs=needs)
    paths = {part: getattr(files, part) for part in PARTS if part in needs}
    return {
        "components": {
            "origin": files.origin,
            "layout": files.layout,
            **{part: str(path) for part, path in paths.items() if path is not None},
            **own,
        }
    }


def _own_parts(
    request: RunRequest, record: EngineRecord, device: str, needs: Sequence[str]
) -> dict[str, str]:
    """What the bundle itself has of the parts: an engine of the VAE by its name, encoders by their
    files."""
    parts = Parts(request.bundle, request.model, record, device, {})
    with warnings.catch_warnings(action="ignore"):  # who opens the parts says it
        found = {part: parts.own(part) for part in needs}
    return {
        part: own.name if isinstance(own, EngineRecord) else own.file.path
        for part, own in found.items()
        if own is not None
    }


def file_facts(path: Path | None) -> dict[str, str] | None:
    """The path of a file and the hash of its content, for a record; None of none."""
    return None if path is None else {"path": str(path.resolve()), "sha256": file_sha256(path)}
