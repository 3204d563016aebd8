"""Section `persistent`: requests in processes of their own, and of one prewarmed pipeline.

    python -m tests.tables.published.persistent [--device cuda] [--folder FOLDER]

An AOTInductor engine. On a CPU the model is that of `tests.tables.pipeline`, with a text encoder of
two layers and a small VAE; on a GPU it is the 1.3B at 480x832 with 33 frames, whose text encoder
and codec are stand-ins that compute next to nothing. On a CPU seconds are of the processor.
"""

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.tables.published.clock import Times, clock_of_process, spread
from tests.tables.published.section import Cells, Place, Section, main
from wanexport.runtime.arrays import Array, to_numpy

PROMPTS = ("a red circle moves left", "a blue square moves left", "a red square moves up")
ROUNDS, STEPS = 5, 4


class Codec:
    """Frames of one value that follows from the latent."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Text-to-video encodes nothing."""
        raise AssertionError(f"a video {video.shape} to encode")

    def decode(self, latent: Array) -> np.ndarray:
        """uint8 [F, H, W, 3] of a latent [1, 16, f, h, w]."""
        _, _, f, h, w = latent.shape
        value = abs(to_numpy(latent).sum()) % 256
        return np.full((4 * f - 3, 8 * h, 8 * w, 3), value, np.uint8)


def encode(prompts: Sequence[str]) -> list[np.ndarray]:
    """Embeddings [20, 4096] that follow from the text."""
    seeds = [int(hashlib.md5(text.encode()).hexdigest()[:8], 16) for text in prompts]
    return [np.random.default_rng(s).standard_normal((20, 4096), np.float32) for s in seeds]


def serve(bundle: str, device: str, requests: int) -> None:
    """Serve requests and print JSON: seconds of each stage, and MD5s. Several are prewarmed for."""
    from wanexport.runtime.serving.pipeline import Pipeline

    clock = clock_of_process(device)
    own: dict[str, Any] = {"text_encoder": encode, "vae": Codec()} if device == "cuda" else {}
    stages, digests, last = {}, [], clock()
    with Pipeline(bundle, device=device, **own) as pipeline:
        stages["opening"], last = clock() - last, clock()
        if requests > 1:
            pipeline.prewarm()
            stages["prewarm"], last = clock() - last, clock()
        for number, prompt in enumerate(PROMPTS[:requests], 1):
            made = pipeline.generate(prompt, steps=STEPS)
            stages[f"request {number}"], last = clock() - last, clock()
            digests.append(hashlib.md5(to_numpy(made.latent).tobytes()).hexdigest())
    print(json.dumps({"stages": stages, "latents": digests}))


def in_a_process(bundle: Path, device: str, requests: int) -> dict[str, Any]:
    """What `serve` prints in a fresh process, and the seconds of the whole process."""
    code = "from tests.tables.published.persistent import serve; "
    code += f"serve({str(bundle)!r}, {device!r}, {requests})"
    started = _seconds(device)
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    told["process"] = _seconds(device) - started
    return told


def _seconds(device: str) -> float:
    """Of the processor in children that ended, or of the wall clock."""
    if device == "cuda":
        return time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def small_bundle(folder: Path) -> Path:
    """A bundle of a small model with all its parts, for a CPU."""
    from tests.tables.pipeline import SIZES, write_model
    from wanexport.exporter.build import build

    bundle, model = folder / "pipeline", folder / "pipeline-model"
    if not bundle.exists():
        size = replace(SIZES["small"], text_layers=2, text_ffn=10240)
        write_model(model, size)
        build(
            model,
            resolution=size.resolution,
            frames=size.frames,
            output=bundle,
            backends=["aoti"],
            device="cpu",
            dtype="fp32",
        )
    return bundle


def bundle_of(place: Place) -> tuple[Path, str]:
    """The bundle to serve from, and what it is."""
    if place.device == "cpu":
        return small_bundle(place.folder), "4 blocks of 256, umT5 of 2 layers, VAE of a third"
    from tests.tables.published.bundle import engine_bundle
    from tests.tables.published.compiled_norms import SIZES

    return engine_bundle(SIZES["cuda"], place), "the 1.3B at 480x832x33, stand-ins beside it"


def measure(place: Place, rounds: int = ROUNDS) -> Cells:
    """Both kinds of processes in turns."""
    bundle, name = bundle_of(place)
    yield "model", f"{name}; {STEPS} steps"
    in_a_process(bundle, place.device, 1)  # reads the files into memory
    pairs = [[in_a_process(bundle, place.device, n) for n in (1, 3)] for _ in range(rounds)]
    yield from cells(*(list(runs) for runs in zip(*pairs)))


def cells(alone: list[dict[str, Any]], together: list[dict[str, Any]]) -> Cells:
    """Rows of processes that served one request each, and of those that served three."""
    yield from stage_cells(alone, together)
    one, three = (tuple(run["process"] for run in runs) for runs in (alone, together))
    gains = tuple(3 * a / b for a, b in zip(one, three))
    yield "three processes / one process", spread(gains)
    first = {run["latents"][0] for run in (*alone, *together)}
    others = {tuple(run["latents"]) for run in together}
    same = len(first) == len(others) == 1
    yield "latents of a prompt, over all processes", "the same bits" if same else "differ"


def stage_cells(alone: list[dict[str, Any]], together: list[dict[str, Any]]) -> Cells:
    """Rows of the parts of both processes, in seconds."""

    def of(runs: list[dict[str, Any]], stage: str) -> str:
        return str(Times(tuple(run["stages"][stage] for run in runs)))

    yield "one request, its process, s", spread(tuple(run["process"] for run in alone))
    yield "opening in it, s", of(alone, "opening")
    yield "the request in it, s", of(alone, "request 1")
    yield "three requests, their process, s", spread(tuple(run["process"] for run in together))
    yield "opening, s", of(together, "opening")
    yield "prewarm, s", of(together, "prewarm")
    for number in (1, 2, 3):
        yield f"request {number}, s", of(together, f"request {number}")


ROWS = {
    "model": "14B, 480x832x81, 8 H100",
    "one request, its process, s": "189.6 (a third of the estimate)",
    "opening in it, s": "",
    "the request in it, s": "22.1",
    "three requests, their process, s": "181.9",
    "opening, s": "128.9",
    "prewarm, s": "7.0",
    "request 1, s": "15.6",
    "request 2, s": "15.2",
    "request 3, s": "15.2",
    "three processes / one process": "3.13",
    "latents of a prompt, over all processes": "",
}
SECTION = Section("persistent", ROWS, measure)

if __name__ == "__main__":
    main(SECTION)
