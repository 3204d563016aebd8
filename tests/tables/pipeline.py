"""Print the table of a pipeline's requests: the first and later ones, cold and prewarmed.

    python -m tests.tables.pipeline FOLDER [full]

Writes a model with random weights into FOLDER: a small DiT between a umT5 encoder of 4 layers and
Wan2.1's VAE at a third of its width, or in `full` size all parts of the T2V-1.3B, for 480x832 and
81 frames (16 GB; on a GPU). Each row is the median (minimum to maximum) of fresh processes; encoder
and VAE are imported and opened when they are first needed.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.runtime.serving.pipeline import Generation, Pipeline

ROUNDS = 3  # processes of each row
STEPS = 4
WORDS = ["<pad>", "<unk>", "</s>", "a", "red", "blue", "circle", "square", "moves", "left"]
REQUESTS = {  # column -> prompt
    "first request": "a red circle moves left",
    "another prompt": "a blue square moves left",
    "the first prompt again": "a red circle moves left",
}


@dataclass(frozen=True)
class Size:
    """Of the parts of a model, and of its video."""

    vocabulary: int
    text_layers: int
    vae_width: int
    heads: int
    ffn_dim: int
    layers: int
    resolution: str
    frames: int


SIZES = {
    "small": Size(len(WORDS), 4, 32, 2, 1024, 4, "64x96", 9),
    "full": Size(256384, 24, 96, 12, 8960, 30, "480x832", 81),
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
    config = UMT5Config(vocab_size=size.vocabulary, d_model=4096, d_kv=64, d_ff=10240, num_heads=64)
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


def measure(bundle: str, prewarmed: bool) -> dict[str, Any]:
    """Seconds of opening, of prewarming and of each request, and each latent's MD5."""
    started = time.perf_counter()
    with Pipeline(bundle) as pipeline:
        opened = time.perf_counter() - started
        seconds = {"opening": opened, "prewarm": pipeline.prewarm() if prewarmed else 0.0}
        made: dict[str, Generation] = {}
        for column, prompt in REQUESTS.items():
            started = time.perf_counter()
            made[column] = pipeline.generate(prompt, steps=STEPS)
            seconds[column] = time.perf_counter() - started
    return {
        "seconds": seconds,
        "stages": {column: one.seconds for column, one in made.items()},
        "latents": {
            column: hashlib.md5(one.latent.tobytes()).hexdigest() for column, one in made.items()
        },
    }


def in_a_fresh_process(bundle: Path, prewarmed: bool) -> dict[str, Any]:
    """What `measure` tells there."""
    code = (
        "import json; from tests.tables.pipeline import measure; "
        f"print(json.dumps(measure({str(bundle)!r}, {prewarmed})))"
    )
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(child.stdout)
    return told


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    cells = []
    for column in runs[0]["seconds"]:
        times = [run["seconds"][column] for run in runs]
        cells.append(f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})")
    return f"| {name} | {' | '.join(cells)} |"


def main(folder: Path, size: Size) -> None:
    """Build the bundle, run both kinds of processes in turns, and print the table in Markdown."""
    from wanexport.exporter.build import build

    write_model(folder / "model", size)
    bundle = folder / "bundle"
    build(folder / "model", resolution=size.resolution, frames=size.frames, output=bundle)
    rounds = [[in_a_fresh_process(bundle, warm) for warm in (False, True)] for _ in range(ROUNDS)]
    cold, warm = (list(runs) for runs in zip(*rounds))
    print(f"\n| seconds | {' | '.join(cold[0]['seconds'])} |\n{'|---' * 6}|")
    print(row("as it is", cold), row("prewarmed", warm), "", sep="\n")
    for column in REQUESTS:
        for name, runs in (("as it is", cold), ("prewarmed", warm)):
            medians = {
                stage: statistics.median(run["stages"][column][stage] for run in runs)
                for stage in runs[0]["stages"][column]
            }
            print(column, name, *(f"{stage} {s:.3f} s" for stage, s in medians.items()), sep=", ")
    one, other, again = ({run["latents"][c] for run in cold + warm} for c in REQUESTS)
    same = len(one) == len(other) == 1 and one == again != other
    print(f"latents by prompt, over all {2 * ROUNDS} processes: {'same' if same else 'DIFFER'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), SIZES[sys.argv[2] if len(sys.argv) > 2 else "small"])
