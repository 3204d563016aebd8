"""From prompts to videos, many from one process: encoders, engine and VAE stay open between them.

One thread serves all requests in order, so any number of threads may ask.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self, TypeVar, Unpack

from wanexport.runtime.arrays import Array
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import EngineKeywords
from wanexport.runtime.errors import BadRequest, refuse_empty
from wanexport.runtime.load import load
from wanexport.runtime.parts.picture_reading import Picture
from wanexport.runtime.parts.protocols import ImageEncoder, TextEncoder, VideoCodec
from wanexport.runtime.serving.generator import Generator
from wanexport.runtime.serving.jobs import MAX_WAITING, Check, Job, JobQueue
from wanexport.runtime.serving.opening import Opening, gpu_number
from wanexport.runtime.serving.prompt_cache import PromptCache
from wanexport.runtime.serving.request import (
    Generation,
    OnStep,
    Request,
    RequestKeywords,
    make_request,
)
from wanexport.runtime.serving.streaming import (
    Chunks,
    StreamedChunk,
    StreamKeywords,
    handed_over,
    make_stream_request,
    stream_chunks,
)

__all__ = ["Generation", "Job", "Pipeline", "StreamedChunk"]

T = TypeVar("T")


class Pipeline:
    """A bundle's engine with its encoders and VAE, serving requests until it is closed.

    text_encoder, vae and image_encoder are parts of the caller's own; what is None is found in the
    checkpoint that the bundle says it came from (a path here, or a hub id to download), or in
    `model` (a folder or hub id), when it is first needed. prompt_cache is how many prompts'
    embeddings are kept. With keep_text_encoder=False the text encoder that was found is freed after
    each encoding, before denoising, and opened again for the next new prompt; one that was given is
    its giver's to free. vae_tiling True cuts pictures into tiles for the VAE that was found, False
    never does, and None does where memory does not suffice for the whole. While max_waiting
    requests wait, another one is refused. load_options are those of `load`.

    open_parts are those (`text_encoder`, `vae`, `image_encoder`) that open while the engine does;
    prompts are those that are asked for first. On a GPU that does not hold the text encoder beside
    the engine's weights, these are encoded before the engine is opened, and later ones on the CPU.
    `placement` says of each encoder on a GPU whether it stays `beside` the engine, is there
    `before` each sampling alone, came `first`, or runs on the `cpu`. It is decided here, once.

    A dropped pipeline closes itself once its jobs are done, and so does, after the step under way,
    one that is open when the interpreter exits; the engine's memory is then freed with the object.
    Raises WanExportError as `load` does, and BadRequest for a prompt_cache or max_waiting that is
    no number.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        model: str | Path | None = None,
        text_encoder: TextEncoder | None = None,
        vae: VideoCodec | None = None,
        image_encoder: ImageEncoder | None = None,
        prompt_cache: int = 64,
        keep_text_encoder: bool = True,
        vae_tiling: bool | None = None,
        max_waiting: int = MAX_WAITING,
        open_parts: Sequence[str] = (),
        prompts: Sequence[str] = (),
        **load_options: Unpack[EngineKeywords],
    ) -> None:
        refuse_empty(model=model)
        cache = PromptCache(prompt_cache)
        given = {"text_encoder": text_encoder, "vae": vae, "image_encoder": image_encoder}
        opening = Opening(Path(bundle), model, given, vae_tiling, keep_text_encoder, load_options)
        with opening.beside(open_parts, prompts, cache):
            self.denoiser: Denoiser = load(bundle, **load_options)
        self._parts = opening.parts_of(self.denoiser)
        self._generator = Generator(
            self.denoiser,
            self._parts,
            cache,
            gpu=gpu_number(self.denoiser.device),
            keep_text_encoder=keep_text_encoder,
        )
        self._queue = JobQueue("wanexport pipeline", max_waiting)
        weakref.finalize(self, self._queue.close)

    @property
    def placement(self) -> dict[str, str]:
        """Where each encoder runs on a GPU; empty on a CPU."""
        return dict(self._parts.placement)

    def generate(
        self,
        prompt: str,
        *,
        negative: str | None = None,
        image: Picture | None = None,
        last_image: Picture | None = None,
        seed: int = 0,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | tuple[float, float] | None = None,
        solver: str | None = None,
        timesteps: Sequence[float] | None = None,
        recipe: str | None = None,
        weights: str | None = None,
        decode: bool = True,
        output: str | Path | None = None,
        on_step: OnStep | None = None,
    ) -> Generation:
        """Serve one request after those that wait, and return what it gave.

        negative None is the family's official negative prompt. steps to recipe are as in `sample`;
        weights names a set of the bundle that serves this request alone, with its recipe if it has
        one, None the set that the pipeline was opened with. decode=False leaves the VAE out. output
        is an .mp4 file for the video, which is written while the rest is decoded and appears whole
        or not, in the place of a file that is there; the generation then holds no frames.
        on_step is called after every step, in the pipeline's thread, with the step and the number
        of steps; what it raises ends this request.

        image and last_image are each a path; the bytes of a PNG, JPEG or WebP file; a PIL image of
        any mode; or pixels in RGB as a numpy array or torch tensor [H, W, 3], uint8 or floating
        point from 0 to 1, which is rounded to 8 bits. The same pixels give the same video in any
        form. A file and a PIL image are turned upright as their EXIF says; of an alpha channel
        nothing is used.

        Raises BadRequest for a request that does not fit, BundleError when a part is missing, and
        EngineFailure for NaN or Inf in a step, and when the pipeline is closed or full;
        WanExportError when output cannot be written.
        KeyboardInterrupt cancels the request.
        """
        request = make_request(
            prompt,
            (seed,),
            negative=negative,
            image=image,
            last_image=last_image,
            steps=steps,
            shift=shift,
            guidance=guidance,
            solver=solver,
            timesteps=timesteps,
            recipe=recipe,
            weights=weights,
            decode=decode,
            output=output,
            on_step=on_step,
        )
        return self._wait_for(partial(self._generator, request))[0]

    def generate_seeds(
        self, prompt: str, seeds: Iterable[int], **asked: Unpack[RequestKeywords]
    ) -> list[Generation]:
        """One generation for each seed, as one request: text and images are encoded once.

        What may be asked, and what is raised, are as in `generate`.
        """
        if not isinstance(seeds, Iterable):
            raise BadRequest(f"seeds is {seeds!r:.40}: expected whole numbers, as [0, 1, 2]")
        request = make_request(prompt, tuple(seeds), **asked)
        return self._wait_for(partial(self._generator, request))

    def submit(
        self, prompt: str, *, seed: int = 0, **asked: Unpack[RequestKeywords]
    ) -> Job[Generation]:
        """Queue a request, and return at once; what may be asked is as in `generate`.

        The caller may change or close what it passed. Errors are the job's to raise, but for those
        of a closed or full pipeline, and of an image that is neither a path nor bytes.
        """
        request = make_request(prompt, (seed,), **asked)
        return self._queue.submit(partial(self._serve, request))

    def stream(self, prompt: str | Array, **asked: Unpack[StreamKeywords]) -> Chunks:
        """A causal model's video, chunk by chunk, each given when it is made.

        prompt is text, or its embeddings [n, 4096], for which no encoder is opened. What may be
        asked are the fields of StreamKeywords: seed; weights, decode as in `generate`; length, the
        number of frames, 4k+1, by default the engine's own. window, sink and
        max_attention are as in `Denoiser.stream`; independent_first_frame to noise as in
        `sample_stream`. The video is made in the pipeline's thread, which waits while two chunks
        are not taken: requests that wait begin after it. To close the iterator cancels it after the
        step under way. on_step is called after every step, in the pipeline's thread.

        Raises, at the first chunk, BadRequest for a request that does not fit or a model that is
        not causal, BundleError when a part is missing, and EngineFailure for NaN or Inf in a chunk,
        and when the pipeline is closed or full.
        """
        if not self.denoiser.geometry.chunk:
            raise BadRequest(
                f"engine {self.denoiser.record.name} makes a video whole: use generate"
            )
        request = make_stream_request(prompt, asked)
        return handed_over(self._queue, partial(stream_chunks, self._generator, request))

    def prewarm(self, *, decode: bool = True) -> float:
        """Do what the first request would pay for, and return the seconds it took.

        Opens the parts, and runs each of them once and each expert once, on zeros and on the
        official negative prompt, whose embedding is kept. decode=False leaves out the decoding.
        What is warm already is not done again; no later result depends on it.
        Raises BundleError when a part is missing, before any is opened.
        """
        return self._wait_for(partial(self._generator.prewarm, decode))

    def clear_prompts(self) -> None:
        """Forget the embeddings of all prompts."""
        self._generator.prompts.clear()

    def close(self) -> None:
        """Cancel every request, wait for the step under way, and free encoders, VAE and engine.

        Parts that were given stay open. Closing again does nothing; a request after it is refused
        with EngineFailure.
        """
        self._queue.close()
        try:
            self._parts.close()
        finally:
            self._generator.prompts.clear()
            self.denoiser.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, request: Request, check: Check) -> Generation:
        """The work of a job for one seed, which by its self keeps the pipeline open until then."""
        return self._generator(request, check)[0]

    def _wait_for(self, work: Callable[[Check], T]) -> T:
        """Queue the work and wait for it; an interrupted wait cancels it."""
        job = self._queue.submit(work)
        try:
            return job.result()
        except BaseException:
            job.cancel()
            raise
        finally:
            del job  # an error keeps this frame, and the job keeps the error
