"""Print the table of a pipeline's requests: from the start of a process, first and later ones.

    python -m tests.tables.pipeline FOLDER [full] [ROUNDS]

Writes a model with random weights into FOLDER: a small DiT between a umT5 encoder of one layer and
Wan2.1's VAE at a third of its width, or in `full` size all parts of the T2V-1.3B, for 480x832 and
81 frames (on a GPU; 16 GB for the model, 15 for the bundle). The bundle is built with --parts, so
that it serves by itself. Requests take 4 timesteps of a distilled model, guided and unguided.

Each figure is the median (minimum to maximum) over fresh processes. `process start to first video`
is of processes that open their parts beside the engine: from the parent's call to frames in memory.
The others open the engine alone, and the parts at the first request.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.runtime.serving.pipeline import Generation, Pipeline

ROUNDS = 3  # processes of each kind
TIMESTEPS = (1000.0, 937.5, 833.333, 625.0)
GUIDED, UNGUIDED = 5.0, 1.0
WORDS = ["<pad>", "<unk>", "</s>", "a", "red", "blue", "circle", "square", "moves", "left"]
FIRST = "a red circle moves left"
REQUESTS = {  # what a process asks for, in this order: prompt and guidance
    "first request, guided": (FIRST, GUIDED),
    "later, guided, new prompt": ("a blue square moves left", GUIDED),
    "later, guided, known prompt": (FIRST, GUIDED),
    "later, unguided, new prompt": ("a red square moves left", UNGUIDED),
    "later, unguided, known prompt": (FIRST, UNGUIDED),
}
GOALS = {  # seconds, on one H100 or H200
    "process start to first video": 14.0,
    "first request, guided": 8.0,
    "later, guided, new prompt": 5.0,
    "later, guided, known prompt": 5.0,
    "later, unguided, new prompt": 3.0,
    "later, unguided, known prompt": 3.0,
}


@dataclass(frozen=True)
class Size:
    """Of the parts of a model, and of its video."""

    vocabulary: int
    text_layers: int
    text_ffn: int
    vae_width: int
    heads: int
    ffn_dim: int
    layers: int
    resolution: str
    frames: int


SIZES = {
    "small": Size(len(WORDS), 1, 1024, 32, 2, 1024, 4, "64x96", 9),
    "full": Size(256384, 24, 10240, 96, 12, 8960, 30, "480x832", 81),
}


def write_model(folder: Path, size: Size) -> None:
    """A checkpoint in diffusers' layout, of the real classes; made on a GPU where there is one."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=size.vocabulary, d_model=4096, d_kv=64, d_ff=size.text_ffn, num_heads=64
    )
    config.num_layers = size.text_layers
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        UMT5EncoderModel(config).bfloat16().save_pretrained(folder / "text_encoder")
        AutoencoderKLWan(base_dim=size.vae_width).save_pretrained(folder / "vae")
        transformer = WanTransformer3DModel(
            num_attention_heads=size.heads, ffn_dim=size.ffn_dim, num_layers=size.layers
        )
        transformer.bfloat16().save_pretrained(folder / "transformer")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    (folder / "tokenizer").mkdir()
    words.save(str(folder / "tokenizer" / "tokenizer.json"))


def measure_start(bundle: str, started: float) -> dict[str, Any]:
    """Seconds from `started`, of time.time(), to the frames of a first request."""
    with Pipeline(bundle, open_parts=("text_encoder", "vae")) as pipeline:
        opened = time.time() - started
        made = pipeline.generate(FIRST, timesteps=TIMESTEPS, guidance=GUIDED)
        took = {"process start to first video": time.time() - started}
    return {
        "seconds": took,
        "stages": {"process start to first video": {"engine open": opened, **made.seconds}},
        "latents": {"process start to first video": digest(made)},
    }


def measure_requests(bundle: str, started: float) -> dict[str, Any]:
    """Seconds of opening and of each request, their stages, and each latent's MD5."""
    seconds: dict[str, float] = {}
    made: dict[str, Generation] = {}
    began = time.perf_counter()
    with Pipeline(bundle) as pipeline:
        seconds["opening the engine"] = time.perf_counter() - began
        for name, (prompt, guidance) in REQUESTS.items():
            began = time.perf_counter()
            made[name] = pipeline.generate(prompt, timesteps=TIMESTEPS, guidance=guidance)
            seconds[name] = time.perf_counter() - began
    return {
        "seconds": seconds,
        "stages": {name: one.seconds for name, one in made.items()},
        "latents": {name: digest(one) for name, one in made.items()},
    }


def digest(made: Generation) -> str:
    """MD5 of the latent."""
    return hashlib.md5(made.latent.tobytes()).hexdigest()


def in_a_fresh_process(kind: str, bundle: Path) -> dict[str, Any]:
    """What `measure_start` or `measure_requests` tells there."""
    code = (
        f"import json; from tests.tables.pipeline import {kind}; "
        f"print(json.dumps({kind}({str(bundle)!r}, {time.time()!r})))"
    )
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return told


def machine() -> str:
    """The card and the rate of a product there, or that there is none."""
    import torch

    if not torch.cuda.is_available():
        return "on a CPU"
    from tests.tables.lora_swap import product_rate

    return f"{torch.cuda.get_device_name()}, product at {product_rate():.0f} TFLOP/s"


def lines(runs: list[dict[str, Any]]) -> Iterable[str]:
    """The rows of the table in Markdown: each figure with its stages and its goal."""
    names = dict.fromkeys(name for run in runs for name in run["seconds"])
    yield "| | seconds | goal | stages, seconds |\n|---|---|---|---|"
    for name in names:
        having = [run for run in runs if name in run["seconds"]]
        times = [run["seconds"][name] for run in having]
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        stages = [run["stages"].get(name, {}) for run in having]
        medians = {s: statistics.median(each[s] for each in stages) for s in stages[0]}
        told = ", ".join(f"{stage} {value:.2f}" for stage, value in medians.items() if value > 0)
        yield f"| {name} | {spread} | {GOALS.get(name, '')} | {told} |"


def same_latents(runs: list[dict[str, Any]]) -> bool:
    """Whether a prompt and guidance have one latent, whatever came before and in which process."""
    found: dict[tuple[str, float], set[str]] = {}
    asked = {**REQUESTS, "process start to first video": (FIRST, GUIDED)}
    for run in runs:
        for name, latent in run["latents"].items():
            found.setdefault(asked[name], set()).add(latent)
    return all(len(latents) == 1 for latents in found.values())


def main(folder: Path, size: Size, rounds: int) -> None:
    """Build the bundle, run both kinds of processes in turns, and print the table."""
    from wanexport.exporter.build import build

    began = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s: {what}", flush=True)

    write_model(folder / "model", size)
    told("the model is written")
    bundle = folder / "bundle"
    build(
        folder / "model", resolution=size.resolution, frames=size.frames, output=bundle, parts=True
    )
    told("the bundle is built")
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        runs.append(in_a_fresh_process("measure_start", bundle))
        runs.append(in_a_fresh_process("measure_requests", bundle))
        told(f"round {number + 1}: {json.dumps([run['seconds'] for run in runs[-2:]])}")
    print(f"\n{machine()}; medians of {rounds} processes\n", *lines(runs), sep="\n")
    print(
        f"\nlatents of a request, over all processes: {'same' if same_latents(runs) else 'DIFFER'}"
    )


if __name__ == "__main__":
    named = SIZES[sys.argv[2] if len(sys.argv) > 2 else "small"]
    main(Path(sys.argv[1]), named, int(sys.argv[3]) if len(sys.argv) > 3 else ROUNDS)
