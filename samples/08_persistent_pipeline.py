"""Serve many prompts from one process: a pipeline that stays open.

    python samples/08_persistent_pipeline.py FOLDER

The model is small and random, so the text encoder and the codec are small ones of the sample's own.
With a bundle of a published model, `Pipeline(bundle)` takes both from the checkpoint that the
bundle came from.
"""

import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event

import numpy as np

from wanexport.exporter.build import build
from wanexport.runtime import Step
from wanexport.runtime.serving.pipeline import Pipeline

PROMPTS = ("a red circle moves left", "a blue square moves up", "a red circle  moves left")


class WordEncoder:
    """A text encoder: each word has a seeded random embedding."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """One [number of words, 4096] for each prompt."""
        self.calls += 1
        return [np.stack([self.embedding(word) for word in prompt.split()]) for prompt in prompts]

    def embedding(self, word: str) -> np.ndarray:
        """A word's row."""
        return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(4096, np.float32)


class BlockCodec:
    """A video codec: three channels of the latent are the colours, each value a block of 8x8."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """A latent [1, 16, f, h, w] of a video [3, F, H, W]; image-to-video would need it."""
        latent = np.zeros((1, 16, *(-(-n // s) for n, s in zip(video.shape[1:], (4, 8, 8)))))
        latent[0, :3] = video[:, ::4, ::8, ::8]
        return latent.astype(np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Frames [F, H, W, 3] of a latent: the first latent frame is one, each other one four."""
        colours = np.clip(latent[0, :3] * 64 + 128, 0, 255).astype(np.uint8)
        frames = np.repeat(colours, 4, axis=1)[:, 3:]
        return frames.repeat(8, axis=2).repeat(8, axis=3).transpose(1, 2, 3, 0)


def main(folder: Path) -> None:
    """Build into folder/bundle, and serve requests of several kinds."""
    build("tiny", random_weights=0, resolution="64x96", frames=9, output=folder / "bundle")
    encoder = WordEncoder()
    with Pipeline(folder / "bundle", text_encoder=encoder, vae=BlockCodec()) as pipeline:
        print(f"prewarmed in {pipeline.prewarm():.2f} s")

        # From any number of threads: the requests wait for each other, in order.
        jobs = [pipeline.submit(prompt, steps=4) for prompt in PROMPTS]
        begun = Event()
        unwanted = pipeline.submit("a mistake", steps=1000, on_step=lambda *_: begun.set())
        for job in jobs:
            made = job.result()
            assert made.video is not None  # which it is with decode=False
            cached = "prompt cached" if made.prompt_cached else "prompt encoded"
            print(f"{made.prompt!r}: video {made.video.shape}, {cached}")

        begun.wait()
        unwanted.cancel()  # stops it after the step under way
        try:
            unwanted.result()
        except CancelledError:
            print("'a mistake': cancelled")

        for made in pipeline.generate_seeds(PROMPTS[0], seeds=[1, 2], steps=4):
            print(f"seed {made.seed}: latent std {made.latent.std():.3f}")

        def show(step: Step, steps: int) -> None:
            print(f"step {step.index + 1} of {steps}: timestep {step.timestep:g}")

        pipeline.generate(PROMPTS[1], steps=3, guidance=1, on_step=show)
    print(f"served 6 requests with {encoder.calls} calls of the text encoder")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
