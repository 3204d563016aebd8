"""Print the table of the tiny trained Wan: 200 clips of each backend, read and compared.

    python -m tests.tables.tiny_wan FOLDER

Builds FOLDER/bundle, and writes a contact sheet of 12 clips of each backend beside it. All backends
run in fp32 on the CPU, from the same noise.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samples.tiny_wan.clips import CAPTIONS, FRAMES, SIDE, TWELVE, meaning
from samples.tiny_wan.codec import PixelCodec, to_uint8
from samples.tiny_wan.contact_sheet import contact_sheet
from samples.tiny_wan.words import WordEmbeddings
from tests.oracles.clip_reading import Reading, read
from wanexport.exporter.build import build
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import Denoiser, load
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.sample import denoise, seeded_noise

MODEL = Path(__file__).parents[2] / "samples" / "tiny_wan"
SHAPE: dict[str, Any] = {"resolution": f"{SIDE}x{SIDE}", "frames": FRAMES}
COMPILED = ("onnx", "aoti")
CLIPS, STEPS = 200, 4
TOGETHER = 8  # clips that the codec decodes at a time


@dataclass(frozen=True)
class Judgement:
    """What the clips of each backend show, and their PSNR in dB [CLIPS] for each two backends."""

    readings: dict[str, list[Reading | None]]
    psnr: dict[tuple[str, str], np.ndarray]


def caption_of(number: int) -> str:
    """Every caption in turn."""
    return CAPTIONS[number % len(CAPTIONS)]


def open_backends(bundle: Path, backends: Sequence[str] = COMPILED) -> dict[str, Denoiser]:
    """Build the engines into the bundle, and open them and eager PyTorch, in fp32 on the CPU."""
    build(MODEL, **SHAPE, backends=backends, device="cpu", dtype="fp32", output=bundle)
    chosen: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}
    compiled = {name: load(bundle, backend=name, **chosen) for name in backends}
    manifest = read_manifest(bundle)
    config, record = manifest.config, compiled["onnx"].record
    (weights,) = manifest.weights.values()
    names = {name: name for name in parameter_shapes(config)}
    tensors = bundle_tensors(bundle / weights.file.path, names)
    eager = EagerEngine(config, record.geometry, "fp32", tensors)
    return {"eager": Denoiser(record, {"": eager}), **compiled}


def sample_clips(denoiser: Denoiser, count: int = CLIPS) -> Tensor:
    """Latents [count, 16, f, h, w], on the CPU: UniPC at the model's own shift, no guidance."""
    texts = dict(zip(CAPTIONS, WordEmbeddings()(CAPTIONS)))
    latents = []
    for number in range(count):
        noise = denoiser.array(seeded_noise(denoiser.inputs["latent"].shape, number))
        text = texts[caption_of(number)]
        latent = denoise(denoiser, noise=noise, text=text, steps=STEPS, guidance=1).latent
        latents.append(torch.as_tensor(latent).cpu())
    return torch.cat(latents)


@torch.inference_mode()
def judge(latents: Mapping[str, Tensor]) -> Judgement:
    """Decode the clips of all backends, a few at a time, read them, and compare them."""
    codec = PixelCodec(MODEL / "codec.safetensors").net
    readings: dict[str, list[Reading | None]] = {name: [] for name in latents}
    psnr: dict[tuple[str, str], list[float]] = {pair: [] for pair in combinations(latents, 2)}
    for parts in zip(*(latent.split(TOGETHER) for latent in latents.values())):
        videos = {n: codec.decode(part).clamp(-1, 1) for n, part in zip(latents, parts)}
        for name, video in videos.items():
            readings[name] += [read(frames) for frames in to_uint8(video).numpy()]
        for one, other in psnr:
            psnr[one, other] += psnr_of(videos[one], videos[other]).tolist()
    return Judgement(readings, {pair: np.array(values) for pair, values in psnr.items()})


def psnr_of(one: Tensor, other: Tensor) -> Tensor:
    """dB [B] between videos [B, 3, F, H, W] in [-1, 1], before they are rounded to 8 bits."""
    return -10 * ((one - other) / 2).double().square().mean(dim=(1, 2, 3, 4)).log10()


def read_right(readings: list[Reading | None]) -> list[bool]:
    """For each clip, whether shape, colour and direction are all the caption's."""
    return [reading == meaning(caption_of(n)) for n, reading in enumerate(readings)]


@torch.inference_mode()
def sheet_of(latents: Tensor) -> bytes:
    """A contact sheet of twelve of the clips."""
    codec = PixelCodec(MODEL / "codec.safetensors").net
    videos = to_uint8(codec.decode(latents[[CAPTIONS.index(caption) for caption in TWELVE]]))
    return contact_sheet(list(videos.numpy()), TWELVE)


def main(folder: Path) -> None:
    """Sample, judge, write the contact sheets, and print the table in Markdown."""
    latents, seconds = {}, {}
    for name, denoiser in open_backends(folder / "bundle").items():
        started = time.perf_counter()
        latents[name] = sample_clips(denoiser)
        seconds[name] = time.perf_counter() - started
        write_durably(folder / f"{name}.png", sheet_of(latents[name]))
    judgement = judge(latents)
    print("| backend | read right | s a clip |\n|---|---|---|")
    for name, readings in judgement.readings.items():
        print(f"| {name} | {sum(read_right(readings))} of {CLIPS} | {seconds[name] / CLIPS:.2f} |")
    different = sum(len(set(clips)) > 1 for clips in zip(*judgement.readings.values()))
    print(f"\n{different} clips are read otherwise from one backend than from another; PSNR:")
    for (one, other), values in judgement.psnr.items():
        print(f"{one}, {other}: median {np.median(values):.0f} dB, least {values.min():.0f} dB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
