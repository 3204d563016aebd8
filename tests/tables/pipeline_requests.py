"""Put 100 requests to one pipeline from 4 threads, cancels and bad ones among them.

    python -m tests.tables.pipeline_requests BUNDLE

Prints as JSON what came of them: `answers` counts those equal to the same request served by itself,
those cancelled and those refused; `rss_after_10` and `rss_after_100` are resident bytes. The
encoder and the codec are stand-ins that compute next to nothing. Nothing here imports PyTorch.
"""

import hashlib
import json
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.serving.pipeline import Generation, Pipeline

REQUESTS, THREADS, FIRST = 100, 4, 10
PROMPTS = ("a red circle", "a blue square", "a green triangle")
STEPS, ENDLESS = 2, 10_000
BAD: tuple[dict[str, Any], ...] = ({"solver": "none"}, {"seed": -1}, {"steps": 0})


def encode(prompts: Sequence[str]) -> list[np.ndarray]:
    """Embeddings [20, 4096] that follow from the text."""
    seeds = [int(hashlib.md5(text.encode()).hexdigest()[:8], 16) for text in prompts]
    return [np.random.default_rng(s).standard_normal((20, 4096), np.float32) for s in seeds]


class Codec:
    """Frames of the video's size, all of one value that follows from the latent."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Text-to-video encodes nothing."""
        raise AssertionError(f"a video {video.shape} to encode")

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """uint8 [9, 64, 96, 3]."""
        return np.full((9, 64, 96, 3), abs(latent.sum()) % 256, np.uint8)


def options(number: int) -> dict[str, Any]:
    """What request `number` asks for: of 20, three are bad and three will be cancelled."""
    wanted = {"prompt": PROMPTS[number % 3], "seed": number % 7, "steps": STEPS, "guidance": 1}
    if number % 20 in (6, 12, 18):
        return {**wanted, **BAD[number % 3]}
    return {**wanted, "steps": ENDLESS} if number % 20 in (4, 9, 14) else wanted


def answer(pipeline: Pipeline, number: int) -> str:
    """Put one request and wait: a hash of its latent and video, or why there is none."""
    job = pipeline.submit(**options(number))
    if options(number)["steps"] == ENDLESS:
        job.cancel()
    try:
        return digest(job.result())
    except CancelledError:
        return "cancelled"
    except WanExportError:
        return "refused"


def digest(made: Generation) -> str:
    """MD5 of what a request gave."""
    return hashlib.md5(made.latent.tobytes() + np.asarray(made.video).tobytes()).hexdigest()


def judged(pipeline: Pipeline, answers: Sequence[str]) -> Iterator[str]:
    """Each answer, or `equal` where it is a hash that the request served by itself repeats."""
    known: dict[str, str] = {}
    for number, given in enumerate(answers):
        wanted = options(number)
        if given in ("cancelled", "refused"):
            yield given
            continue
        if str(wanted) not in known:
            known[str(wanted)] = digest(pipeline.generate(**wanted))
        yield "equal" if given == known[str(wanted)] else "another"


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(bundle: Path) -> None:
    """Put the requests, then each again by itself, and print what came of them."""
    with (
        Pipeline(bundle, text_encoder=encode, vae=Codec(), dtype="fp32") as pipeline,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        answers = list(threads.map(lambda n: answer(pipeline, n), range(FIRST)))
        after_10 = resident_bytes()
        answers += threads.map(lambda n: answer(pipeline, n), range(FIRST, REQUESTS))
        after_100 = resident_bytes()
        counts = Counter(judged(pipeline, answers))
    print(json.dumps({"answers": counts, "rss_after_10": after_10, "rss_after_100": after_100}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
