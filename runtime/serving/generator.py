"""One request, from its prompt to its videos, in the thread that asks.

Imports PyTorch no sooner than a part needs it.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.arrays import Array, is_finite, to_numpy
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest, EngineFailure
from wanexport.runtime.family import family_named
from wanexport.runtime.host_copy import HostCopy
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.pictures import (
    FittedImage,
    fit_images,
    image_inputs,
    takes_image,
    takes_last_image,
)
from wanexport.runtime.parts.protocols import VideoCodec, decoded_chunks
from wanexport.runtime.parts.text_encoder import clean_prompt
from wanexport.runtime.program import TensorSpec
from wanexport.runtime.sample import Plan, Step, plan_of, run_plan, seeded_noise
from wanexport.runtime.sample_stream import sample_clip
from wanexport.runtime.serving.finished import check_step, finished_steps
from wanexport.runtime.serving.jobs import Check
from wanexport.runtime.serving.prompt_cache import PromptCache
from wanexport.runtime.serving.request import STAGES, Generation, Request, check_request
from wanexport.runtime.serving.video import write_chunks
from wanexport.runtime.solvers import NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True, eq=False)
class _Conditioning:
    """What the seeds of a request share: the inputs of a run, on the engine's device."""

    inputs: dict[str, Array]
    negative: str | None
    prompt_cached: bool
    notes: tuple[str, ...]
    seconds: dict[str, float]


class Generator:
    """Makes videos with one engine, its parts and the embeddings of earlier prompts.

    gpu is the engine's, None on a CPU. With keep_text_encoder=False the text encoder is released
    after each encoding. One thread may call at a time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        parts: Parts,
        prompts: PromptCache,
        *,
        gpu: int | None,
        keep_text_encoder: bool,
    ) -> None:
        self.denoiser, self.parts, self.prompts = denoiser, parts, prompts
        self.gpu, self.keep_text_encoder = gpu, keep_text_encoder
        self._own_weights = denoiser.weights
        self._holds_others = False  # than its own weights
        self._warm: set[str] = set()  # stages

    def __call__(self, request: Request, check: Check) -> list[Generation]:
        """One generation for each of the request's seeds; check is called between steps.

        Raises BadRequest for a request that does not fit, BundleError when a part is missing, and
        EngineFailure for NaN or Inf in a step.
        """
        check_request(request)
        self._use_weights(request.weights)
        plan = plan_of(self.denoiser, request.settings)
        conditioning = self._condition(request, plan, check)
        generations = []
        for seed in map(int, request.seeds):  # of any kind of whole numbers
            check()
            generations.append(self._generate(request, plan, conditioning, seed, check))
            conditioning = replace(conditioning, prompt_cached=True, seconds={})
        return generations

    def _use_weights(self, name: str | None) -> None:
        """Have the engine hold the set of this name, or again the one that it was opened with.

        It is not even asked before a request has named one.
        """
        if name is None and not self._holds_others:
            return
        # Even where the change fails: what it holds then is known only where it cannot change.
        self._holds_others = bool(self._own_weights)
        with computing(self.gpu):
            self.denoiser.use(self._own_weights if name is None else name)
        self._holds_others = name is not None

    def _condition(self, request: Request, plan: Plan, check: Check) -> _Conditioning:
        """What the request's text and images become; what cannot work is refused first."""
        seconds: dict[str, float] = {}
        prompts = {"text": request.prompt}
        if any(scale != 1 for scale in plan.guidance):
            official = family_named(self.denoiser.record.family).negative
            prompts["negative"] = official if request.negative is None else request.negative
        texts = {name: clean_prompt(prompt) for name, prompt in prompts.items()}
        if not texts["text"]:
            raise BadRequest("the prompt is empty: say what the video shows")
        with _timed(seconds, "image"):
            images = fit_images(self.denoiser.record, request.image, request.last_image)
        cached = self.prompts.get(texts["text"]) is not None
        self._begin_parts(texts.values(), image=bool(images), decode=request.decode)
        with _timed(seconds, "text"):
            embeddings = self._embed(list(texts.values()))
        check()
        with _timed(seconds, "image"):
            inputs = {name: embeddings[text] for name, text in texts.items()}
            inputs |= self._image_inputs(images)
        notes = tuple(image.note for image in images if image.note)
        if images:
            notes += _tiling_note(self.parts.vae(), "encoded")
        if request.decode:  # a VAE that does not fit must not show after the denoising
            with _timed(seconds, "decode"):
                self.parts.vae()
        return _Conditioning(
            inputs={name: self.denoiser.array(value) for name, value in inputs.items()},
            negative=prompts.get("negative"),
            prompt_cached=cached,
            notes=notes,
            seconds=seconds,
        )

    def _begin_parts(self, texts: Iterable[str], *, image: bool, decode: bool) -> None:
        """Refuse work whose parts are missing, before any of them is opened; open them at once."""
        needed = []
        if any(self.prompts.get(text) is None for text in texts):
            needed.append("text_encoder")
        if decode or image:
            needed.append("vae")
        if image and "image" in self.denoiser.inputs:
            needed.append("image_encoder")
        self.parts.begin(needed)

    def _embed(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Text embeddings [n, text_dim] of cleaned texts, of the cache where it has them.

        One at a time: the same text must not depend in its last bits on what it was encoded with.
        """
        known = {text: kept for text in texts if (kept := self.prompts.get(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if not missing:
            return known
        return {**known, **self._encode(missing)}

    def _encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        try:
            return encode_texts(self.parts, self.prompts, texts, gpu=self.gpu)
        finally:
            self.parts.spare("text_encoder", keep=self.keep_text_encoder)

    def _image_inputs(self, images: Sequence[FittedImage]) -> dict[str, np.ndarray]:
        """The engine's inputs of the fitted images; no part is opened where there are none."""
        if not images:
            return {}
        record = self.denoiser.record
        image_encoder = self.parts.image_encoder() if "image" in record.inputs else None
        vae = self.parts.vae()
        try:
            with computing(self.gpu):
                return image_inputs(record, images, vae, image_encoder)
        finally:
            self.parts.spare("image_encoder", keep=True)

    def _generate(
        self,
        request: Request,
        plan: Plan,
        conditioning: _Conditioning,
        seed: int,
        check: Check,
    ) -> Generation:
        """Denoise and decode one seed."""
        seconds = {**dict.fromkeys(STAGES, 0.0), **conditioning.seconds}
        with _timed(seconds, "sampling"):
            latent = self._sample(request, plan, conditioning.inputs, seed, check)
        kept = HostCopy(latent)  # before the VAE, or who keeps the step, can write to it
        video, notes = None, conditioning.notes
        if request.decode:
            with _timed(seconds, "decode"):
                if request.output is None:
                    video = self._decode(latent)
                else:
                    self._write(latent, request.output, check)
            notes += _tiling_note(self.parts.vae(), "decoded")
        return Generation(
            prompt=request.prompt,
            negative=conditioning.negative,
            seed=seed,
            latent=np.array(kept.array(), np.float32),  # in memory that is not pinned
            video=video,
            fps=self.denoiser.sampling.fps,
            solver=plan.solver,
            timesteps=plan.schedule.timesteps,
            guidance=plan.guidance,
            seconds=seconds,
            prompt_cached=conditioning.prompt_cached,
            notes=notes,
        )

    def _sample(
        self, request: Request, plan: Plan, inputs: dict[str, Array], seed: int, check: Check
    ) -> Array:
        """The final latent, where the engine keeps it."""
        if self.denoiser.geometry.chunk:
            return self._sample_chunks(request, plan, inputs["text"], seed, check)
        noise = self.denoiser.array(seeded_noise(self.denoiser.inputs["latent"].shape, seed))
        with computing(self.gpu):
            steps = run_plan(self.denoiser, plan, noise=noise, **inputs)
            for step in finished_steps(steps, self.denoiser.record.name):
                if request.on_step is not None:
                    request.on_step(step, len(plan))
                check()
        return step.latent

    def _sample_chunks(
        self, request: Request, plan: Plan, text: Array, seed: int, check: Check
    ) -> Array:
        """The whole clip of a causal model."""

        def on_step(step: Step, steps: int) -> None:
            check_step(step, self.denoiser.record.name)
            if request.on_step is not None:
                request.on_step(step, steps)
            check()

        with computing(self.gpu):
            return sample_clip(self.denoiser, plan, text=text, seed=seed, on_step=on_step)

    def text_of(self, prompt: str | Array, weights: str | None, *, decode: bool) -> Array:
        """The embedding of a prompt, or one that is given; the engine has these weights from then
        on.

        With decode the VAE is opened too. Raises as a request does.
        """
        self._use_weights(weights)
        text = clean_prompt(prompt) if isinstance(prompt, str) else None
        if text == "":
            raise BadRequest("the prompt is empty: say what the video shows")
        self._begin_parts([] if text is None else [text], image=False, decode=decode)
        embedding = prompt if text is None else self._embed([text])[text]
        if decode:
            self.parts.vae()
        return embedding

    def _decode(self, latent: Array) -> np.ndarray:
        vae = self.parts.vae()
        with computing(self.gpu):
            return vae.decode(latent)

    def _write(self, latent: Array, output: str | Path, check: Check) -> None:
        vae = self.parts.vae()
        with computing(self.gpu):
            write_chunks(output, decoded_chunks(vae, latent), self.denoiser.sampling.fps, check)

    def prewarm(self, decode: bool, check: Check) -> float:
        """Do what a first request would pay for; see `Pipeline.prewarm`."""
        started = time.perf_counter()
        record = self.denoiser.record
        negative = clean_prompt(family_named(record.family).negative)
        self._begin_parts([negative], image=takes_image(record), decode=decode)
        warm_ups: dict[str, Callable[[], object]] = {
            "text": lambda: self._embed([negative]),
            "image": self._warm_up_images,
            "sampling": self._warm_up_engine,
        }
        if decode:
            _, channels, _, *sides = record.output.shape
            latent = np.zeros((1, channels, record.geometry.clip_frames, *sides), np.float32)
            warm_ups["decode"] = lambda: self._decode(latent)
        for stage, warm_up in warm_ups.items():
            check()
            if stage not in self._warm:
                warm_up()
                self._warm.add(stage)
        return time.perf_counter() - started

    def _warm_up_images(self) -> None:
        record = self.denoiser.record
        if takes_image(record):
            grey = np.zeros((3, record.geometry.height, record.geometry.width), np.float32)
            fitted = FittedImage(grey, grey, "")
            self._image_inputs([fitted] * (2 if takes_last_image(record) else 1))

    def _warm_up_engine(self) -> None:
        """Run each expert once, last the one that a request begins with: it is then in memory."""
        if self.denoiser.geometry.chunk:
            self._warm_up_stream()
            return
        zeros = {
            name: self.denoiser.array(np.zeros(spec.shape, np.float32))
            for name, spec in self.denoiser.inputs.items()
            if name != "timestep"
        }
        with computing(self.gpu):
            for timestep in (0, NUM_TRAIN_TIMESTEPS)[-len(self.denoiser.engines) :]:
                is_finite(self.denoiser(**zeros, timestep=timestep))  # which waits for the GPU

    def _warm_up_stream(self) -> None:
        """A step and a commit of a causal model."""
        make, latent = self.denoiser.array, np.zeros(self.denoiser.record.output.shape, np.float32)
        text = np.zeros(self.denoiser.inputs["text"].shape, np.float32)
        with computing(self.gpu):
            stream = self.denoiser.stream(make(text))
            is_finite(stream.step(make(latent), NUM_TRAIN_TIMESTEPS))  # which waits for the GPU
            stream.commit(make(latent))


def encode_texts(
    parts: Parts, prompts: PromptCache, texts: Iterable[str], *, gpu: int | None
) -> dict[str, np.ndarray]:
    """Text embeddings [n, text_dim] of cleaned texts, each encoded by itself, and kept in prompts.

    Raises as the text encoder does, and EngineFailure for what does not fit the parts' engine.
    """
    encoder, embeddings = parts.text_encoder(), {}
    for text in texts:
        with computing(gpu):
            given = encoder([text])
        embeddings[text] = _checked_embedding(given, text, parts.record.inputs["text"])
        prompts.put(text, embeddings[text])
    return embeddings


def _checked_embedding(given: Any, text: str, spec: TensorSpec) -> np.ndarray:
    """A copy of the one text embedding [n, text_dim] that an encoder gave for a text.

    Raises EngineFailure when it is none, or does not fit the engine, whose input is spec.
    """
    rows, width = spec.shape[-2:]
    try:
        (embedding,) = given
    except (TypeError, ValueError):
        found = f"a {type(given).__name__}, not a list of one,"
    else:
        copy = np.array(to_numpy(embedding))
        if copy.ndim != 2 or copy.shape[1] != width or not 1 <= len(copy) <= rows:
            found = f"shape {list(copy.shape)}"
        elif is_finite(copy):
            return copy
        else:
            found = "NaN or Inf"
    raise EngineFailure(
        f"the text encoder gave {found} for {text!r:.40}: expected finite [n, {width}] with n from "
        f"1 to {rows}"
    )


def _tiling_note(vae: VideoCodec, done: str) -> tuple[str, ...]:
    """That the VAE's last call cut the picture into tiles, where it says so."""
    if not getattr(vae, "tiled", False):
        return ()
    return (f"the video was {done} in tiles, which shows a little",)


@contextmanager
def computing(gpu: int | None) -> Iterator[None]:
    """Where PyTorch is in use: without autograd, and on the engine's GPU."""
    with ExitStack() as stack:
        if "torch" in sys.modules:
            import torch  # waits for another thread that is about to

            stack.enter_context(torch.inference_mode())
            if gpu is not None:
                stack.enter_context(torch.cuda.device(gpu))
        yield


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that the block takes to that of its stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
