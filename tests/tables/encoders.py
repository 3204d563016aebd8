"""Print how long the encoders take to open and to encode, ours beside transformers'.

    python -m tests.tables.encoders FOLDER [small]

Writes umT5-xxl in bf16 and CLIP's ViT-H in fp32 with random weights into FOLDER, in both layouts
(27 GB; `small`: 1 GB), and opens them in fresh processes, on a GPU where there is one. The files
were just written or read: the system has them in memory. Each row is the median (minimum to
maximum) of three processes; the digest is that of the results for prompts of several lengths, or
for two pictures.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles import official_encoders as official

ROUNDS = 3  # processes of each row
SMALL_TEXT = {"vocab": 20000, "dim": 1024, "heads": 16, "head_dim": 64, "ffn": 2560, "layers": 24,
              "buckets": 32}  # fmt: skip
SMALL_IMAGE = {"dim": 640, "ffn": 1280, "layers": 8, "patch": 14, "image": 224}
SIZES = {"full": (official.UMT5_XXL, official.VIT_H), "small": (SMALL_TEXT, SMALL_IMAGE)}
PROMPTS = ("a red circle moves left", "", "a red circle and " * 20, "then right, " * 200)
ARMS = {  # row -> the encoder, who opens it, and the file or folder
    "umT5, ours, .pth": ("text", "ours", "t5.pth"),
    "umT5, ours, folder": ("text", "ours", "text_encoder"),
    "umT5, ours, mapped and then moved": ("text", "moved", "t5.pth"),
    "umT5, transformers, folder": ("text", "transformers", "text_encoder"),
    "CLIP, ours, .pth": ("image", "ours", "clip.pth"),
    "CLIP, ours, folder": ("image", "ours", "image_encoder"),
    "CLIP, transformers, folder": ("image", "transformers", "image_encoder"),
}
COLUMNS = ("import", "open", "first", "later")


def place() -> str:
    """Where the encoders run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def write_checkpoints(folder: Path, size: str) -> None:
    """Both encoders in both layouts, with random weights made where they are made fastest."""
    import torch

    from tests.oracles.transformers_encoders import clip_of, umt5_of

    text, image = SIZES[size]
    torch.manual_seed(0)
    tensors = random_state(official.text_shapes(text), torch.bfloat16)
    torch.save(tensors, folder / "t5.pth")
    umt5_of(tensors, text).save_pretrained(folder / "text_encoder", max_shard_size="4GB")
    tensors = random_state(official.image_shapes(image), torch.float32)
    torch.save(tensors, folder / "clip.pth")
    clip_of(tensors, image).save_pretrained(folder / "image_encoder")
    official.write_tokenizer(folder / "tokenizer")


def random_state(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> dict[str, Any]:
    """Tensors of these names and shapes: norms near 1, the rest so that sizes stay."""
    import torch

    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, device=place()) * 0.02
        if "norm" in name and name.endswith("weight"):
            values = values + 1
        tensors[name] = values.to(dtype).cpu()
    return tensors


def measure(folder: str, kind: str, opener: str, name: str) -> dict[str, Any]:
    """Seconds of importing, opening, encoding first and later, and a digest of the results."""
    import torch

    torch.zeros(1, device=place())  # what a process has that runs an engine
    started = time.perf_counter()
    open_encoder = OPENERS[kind, opener]()
    seconds = {"import": time.perf_counter() - started}
    started = time.perf_counter()
    encode = open_encoder(Path(folder) / name, Path(folder) / "tokenizer")
    if place() == "cuda":
        torch.cuda.synchronize()
    seconds["open"] = time.perf_counter() - started
    for column in ("first", "later"):
        started = time.perf_counter()
        encode(0)
        seconds[column] = time.perf_counter() - started
    found = [encode(i) for i in range(len(PROMPTS))]
    digest = hashlib.md5(b"".join(one.tobytes() for one in found)).hexdigest()
    finite = all(np.isfinite(one).all() for one in found)
    return {"seconds": seconds, "digest": digest, "finite": finite}


Encode = Callable[[int], np.ndarray]  # the result for one of PROMPTS, or of the pictures
OpenEncoder = Callable[[Path, Path], Encode]


def ours_text() -> OpenEncoder:
    from wanexport.runtime.parts import umt5_files  # noqa: F401
    from wanexport.runtime.parts.text_encoder import clean_prompt, open_text_encoder

    def open_encoder(weights: Path, tokenizer: Path) -> Encode:
        encoder = open_text_encoder(weights, tokenizer, device=place())
        return lambda i: encoder([clean_prompt(PROMPTS[i])])[0]

    return open_encoder


def moved_text() -> OpenEncoder:
    import torch

    from wanexport.runtime.parts.fill_model import fill_model
    from wanexport.runtime.parts.text_encoder import UMT5TextEncoder, _open_tokenizer, clean_prompt
    from wanexport.runtime.parts.umt5_files import find_umt5

    def open_encoder(weights: Path, tokenizer: Path) -> Encode:
        model, tensors = find_umt5(weights)
        fill_model(model, tensors, torch.device("cpu"), torch.bfloat16)
        encoder = UMT5TextEncoder(model.to(place()), _open_tokenizer(tokenizer))
        return lambda i: encoder([clean_prompt(PROMPTS[i])])[0]

    return open_encoder


def transformers_text() -> OpenEncoder:
    import torch
    from transformers import UMT5EncoderModel

    from tests.oracles.transformers_encoders import umt5_embedding
    from wanexport.runtime.parts.text_encoder import _open_tokenizer, clean_prompt

    def open_encoder(weights: Path, tokenizer: Path) -> Encode:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
        model = UMT5EncoderModel.from_pretrained(weights, **options).to(place()).eval()
        words = _open_tokenizer(tokenizer)

        def encode(i: int) -> np.ndarray:
            ids = words.encode(clean_prompt(PROMPTS[i])).ids
            return np.asarray(umt5_embedding(model, ids).float().cpu().numpy())

        return encode

    return open_encoder


def pictures() -> list[np.ndarray]:
    """Pictures [3, H, W] in [-1, 1], one for each of PROMPTS."""
    return [official.pseudo_random(f"picture {i}", (3, 480, 832)) for i in range(len(PROMPTS))]


def ours_image() -> OpenEncoder:
    from wanexport.runtime.parts import vit_files  # noqa: F401
    from wanexport.runtime.parts.image_encoder import open_image_encoder

    shown = pictures()

    def open_encoder(weights: Path, tokenizer: Path) -> Encode:
        encoder = open_image_encoder(weights, device=place())
        return lambda i: encoder([shown[i]])[0]

    return open_encoder


def transformers_image() -> OpenEncoder:
    import torch
    from transformers import CLIPVisionModel

    from tests.oracles.transformers_encoders import clip_features
    from wanexport.runtime.parts.image_encoder import prepared

    shown, dtype = pictures(), torch.float32 if place() == "cpu" else torch.float16

    def open_encoder(weights: Path, tokenizer: Path) -> Encode:
        model = CLIPVisionModel.from_pretrained(weights, dtype=dtype).to(place()).eval()
        return lambda i: (
            clip_features(model, prepared(shown[i], 224, dtype, place()))[0].float().cpu().numpy()
        )

    return open_encoder


OPENERS: dict[tuple[str, str], Callable[[], OpenEncoder]] = {
    ("text", "ours"): ours_text,
    ("text", "moved"): moved_text,
    ("text", "transformers"): transformers_text,
    ("image", "ours"): ours_image,
    ("image", "transformers"): transformers_image,
}


def in_a_fresh_process(folder: Path, arm: tuple[str, str, str]) -> dict[str, Any]:
    """What `measure` tells there."""
    arguments = ", ".join(map(repr, (str(folder), *arm)))
    code = (
        "import json; from tests.tables.encoders import measure; "
        f"print(json.dumps(measure({arguments})))"
    )
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    told: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return told


def gigabytes(path: Path) -> float:
    """The size of a file, or of the tensors' files in a folder."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) / 1e9


def row(name: str, size: float, runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    cells = []
    for column in COLUMNS:
        times = [run["seconds"][column] for run in runs]
        cells.append(f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})")
    speed = size / statistics.median(run["seconds"]["open"] for run in runs)
    digests = " ".join(sorted({run["digest"][:8] for run in runs}))
    wrong = "" if all(run["finite"] for run in runs) else " NOT FINITE"
    return f"| {name} | {size:.2f} | {' | '.join(cells)} | {speed:.2f} | {digests}{wrong} |"


def main(folder: Path, size: str) -> None:
    """Write the checkpoints where they are not, run the rows in turns, and print the table."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        write_checkpoints(folder, size)
    rounds = [
        {n: in_a_fresh_process(folder, arm) for n, arm in ARMS.items()} for _ in range(ROUNDS)
    ]
    where = torch.cuda.get_device_name() if place() == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}; seconds, and GB/s of opening\n")
    print(f"| encoder | GB | {' | '.join(COLUMNS)} | GB/s | digest |\n{'|---' * 8}|")
    for name, (_, _, path) in ARMS.items():
        print(row(name, gigabytes(folder / path), [one[name] for one in rounds]))
    for kind in ("umT5", "CLIP"):
        digests = {one[n]["digest"] for one in rounds for n in ARMS if n.startswith(kind)}
        print(f"{kind}: results of all processes {'same' if len(digests) == 1 else 'DIFFER'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "full")
