"""Serve for minutes from 8 threads, with cancels, bad requests and parts that fail.

    python -m tests.tables.serving_soak --minutes 10

Prints a table of what became of the requests, and how the process grew. Every answer is compared
with that of the same request served by itself, bit by bit. Engine, encoder and codec are doubles
that compute next to nothing: what is tried is everything around them. Nothing here imports PyTorch.
"""

import argparse
import ctypes
import gc
import hashlib
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime.bundle.details import OnnxDetails
from wanexport.runtime.bundle.manifest import DENOISER, EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.serving import pipeline as pipeline_module
from wanexport.runtime.serving.pipeline import Pipeline
from wanexport.runtime.serving.request import Generation

THREADS, MAX_WAITING = 8, 6
PROMPTS, SEEDS = tuple(f"a circle, number {number}" for number in range(5)), 4
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD: the least bytes that have a mapping of their own
WAIT = 30.0  # seconds within which every request ends, or the soak fails
BAD: tuple[dict[str, Any], ...] = (
    {"solver": "none"},
    {"seed": -1},
    {"timesteps": [1.0, 0.5], "steps": None},
    {"image": ""},
    {"prompt": " "},
)


class PartFailed(Exception):
    """What a part of the caller's own raises; of a group, so that its members are freed too."""

    @property
    def __cause__(self) -> BaseException | None:  # type: ignore[override]
        """Not even to be looked at."""
        raise RuntimeError("no cause")


class Faults:
    """Raises now and then, where it is armed, as a part would that fails."""

    def __init__(self, seed: int) -> None:
        self.armed = False
        self._random = random.Random(seed)

    def __call__(self, part: str) -> None:
        """Fail one call of 12: with a plain error, a group of them, or one that bites."""
        if not self.armed or self._random.random() > 1 / 12:
            return
        held = np.zeros(2**20, np.float32)  # 4 MB, for as long as the error keeps this frame
        errors = (
            RuntimeError(f"{part} failed, holding {held.nbytes}"),
            ExceptionGroup(part, [ValueError(part), MemoryError(part)]),
            PartFailed(part),
        )
        raise self._random.choice(errors)


def encode(prompts: Sequence[str]) -> list[np.ndarray]:
    """Embeddings [20, 4096] that follow from the text."""
    seeds = [int(hashlib.md5(text.encode()).hexdigest()[:8], 16) for text in prompts]
    return [np.random.default_rng(s).standard_normal((20, 4096), np.float32) for s in seeds]


class Codec:
    """Frames of the video's size, all of one value that follows from the latent."""

    def __init__(self, fail: Faults) -> None:
        self.fail = fail

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Text-to-video encodes nothing."""
        raise AssertionError(f"a video {video.shape} to encode")

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """uint8 [9, 64, 96, 3]."""
        self.fail("the VAE")
        return np.full((9, 64, 96, 3), abs(latent.sum()) % 256, np.uint8)


class Engine:
    """velocity = latent / 2 + mean of the text."""

    device = "cpu"

    def __init__(self, fail: Faults) -> None:
        self.fail = fail

    def array(self, value: np.ndarray) -> np.ndarray:
        """Every array is numpy's here."""
        return value

    def memory(self) -> Memory:
        """Nothing is kept."""
        return Memory()

    def use(self, weights: PinnedFile) -> None:
        """There are no weights."""

    def close(self) -> None:
        """Nothing is held."""

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> np.ndarray:
        """fp32, shaped like the latent."""
        self.fail("the engine")
        velocity: np.ndarray = inputs["latent"] / 2 + inputs["text"].mean(dtype=np.float32)
        return velocity


def denoiser_of(fail: Faults) -> Denoiser:
    """The tiny preset at 64x96x9."""
    config, geometry = PRESETS["tiny"].config, Geometry(64, 96, 9)
    record = EngineRecord(
        backend="onnx",
        role=DENOISER,
        family=config.family,
        dtype="fp32",
        geometry=geometry,
        program=program_of(config, geometry).whole(),
        details=OnnxDetails(),
        sampling=sampling_defaults(config, (), geometry),
        files={},
        layout="",
        key="",
        target={"device": "cpu"},
    )
    return Denoiser(record, {"": Engine(fail)})


def open_pipeline(fail: Faults) -> Pipeline:
    """A pipeline of doubles, whose prompts seldom stay in its cache."""

    def failing_encoder(prompts: Sequence[str]) -> list[np.ndarray]:
        fail("the text encoder")
        return encode(prompts)

    with patch.object(pipeline_module, "load", lambda bundle: denoiser_of(fail)):
        return Pipeline(
            "bundle",
            text_encoder=failing_encoder,
            vae=Codec(fail),
            prompt_cache=3,
            max_waiting=MAX_WAITING,
        )


def wish(rng: random.Random) -> dict[str, Any]:
    """A good request."""
    prompt, seed = rng.choice(PROMPTS), rng.randrange(SEEDS)
    return good(prompt, seed, rng.choice((1, 4)))


def good(prompt: str, seed: int, guidance: int) -> dict[str, Any]:
    """A request that is answered."""
    return {"prompt": prompt, "seed": seed, "steps": 2, "guidance": guidance}


def digest(made: Generation) -> str:
    """MD5 of what a request gave."""
    return hashlib.md5(made.latent.tobytes() + np.asarray(made.video).tobytes()).hexdigest()


def key(wanted: Mapping[str, Any]) -> str:
    """What tells good requests apart."""
    return f"{wanted['prompt']} {wanted['seed']} {wanted['guidance']}"


def expected_answers() -> dict[str, str]:
    """The digest of every good request, each served by itself, in one thread."""
    with open_pipeline(Faults(0)) as pipeline:
        wishes = [
            good(prompt, seed, guidance)
            for prompt in PROMPTS
            for seed in range(SEEDS)
            for guidance in (1, 4)
        ]
        return {key(wanted): digest(pipeline.generate(**wanted)) for wanted in wishes}


def ask(pipeline: Pipeline, rng: random.Random, expected: Mapping[str, str]) -> str:
    """Put one request of some kind and wait for its end: what became of it."""
    wanted, kind = wish(rng), rng.random()
    if kind < 0.15:
        wanted |= rng.choice(BAD)
    elif kind < 0.3:
        wanted |= {"steps": 10_000}  # which nobody waits for
    try:
        job = pipeline.submit(**wanted)
    except WanExportError as error:
        time.sleep(0.02)  # as it was told
        return "told that it is full" if "wait already" in str(error) else "another error"
    if wanted["steps"] == 10_000:
        time.sleep(rng.random() / 100)
        job.cancel()
    try:
        given = digest(job.result(WAIT))
    except CancelledError:
        return "cancelled"
    except WanExportError:
        return "refused" if kind < 0.15 else "another error"
    except TimeoutError:
        return "hung"
    except (RuntimeError, ExceptionGroup, PartFailed):
        return "failed with its part"
    return "bit-equal" if given == expected.get(key(wanted)) else "another answer"


def state() -> dict[str, int]:
    """What may not grow."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident bytes": pages * resource.getpagesize(),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "open files": len(list(Path("/proc/self/fd").iterdir())),
    }


def soak(seconds: float) -> tuple[Counter[str], dict[str, list[int]], int]:
    """Counts of what became of the requests, the state over time, and threads left after it."""
    expected, fail = expected_answers(), Faults(1)
    threads_before = threading.active_count()
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def serve(number: int, end: float) -> None:
        rng = random.Random(f"{number} {len(history['threads'])}")
        while time.monotonic() < end:
            outcome = ask(pipeline, rng, expected)
            with lock:
                counts[outcome] += 1

    history: dict[str, list[int]] = {name: [] for name in state()}
    with open_pipeline(fail) as pipeline:
        fail.armed = True
        for _ in range(11):  # the first warms up
            end = time.monotonic() + seconds / 11
            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(serve, range(THREADS), [end] * THREADS))
            for name, value in state().items():
                history[name].append(value)
    return counts, history, threading.active_count() - threads_before


def main() -> None:
    """Print the table; exit code 1 when something hung, grew, was left or came out otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    # An array's memory goes back when it is freed: the C library would keep some, now and then.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 17)
    counts, history, left = soak(60 * parser.parse_args().minutes)
    print("| requests | |\n|---|---|")
    for outcome, number in counts.most_common():
        print(f"| {outcome} | {number} |")
    print("\n| | after 1/11 | half | end |\n|---|---|---|---|")
    for name, values in history.items():
        print(f"| {name} | {values[0]} | {values[5]} | {values[-1]} |")
    print(f"\nthreads left after close: {left}")
    if problems := faults_of(counts, history, left):
        raise SystemExit("; ".join(problems))


def faults_of(counts: Counter[str], history: Mapping[str, Sequence[int]], left: int) -> list[str]:
    """What must not be."""
    faults = [
        f"{counts[what]} {what}"
        for what in ("hung", "another answer", "another error")
        if counts[what]
    ]
    faults += [f"none {what}" for what in ("bit-equal", "failed with its part") if not counts[what]]
    grown = {
        "resident bytes": 1.05 * history["resident bytes"][0] + 2**22,
        "objects": history["objects"][0] + 500,
        "threads": history["threads"][0],
        "open files": history["open files"][0],
    }
    faults += [
        f"{name} grew to {history[name][-1]}"
        for name, most in grown.items()
        if history[name][-1] > most
    ]
    return faults + [f"{left} threads left"] * bool(left)


if __name__ == "__main__":
    main()
