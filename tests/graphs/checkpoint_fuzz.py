"""Damage a checkpoint's files in every manner, and say what comes out but one-line errors.

`python -m tests.graphs.checkpoint_fuzz COUNT [SEED]` runs longer than the test does.
"""

import json
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.tensorfile import make_header
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.wan_config import WanConfig

CONFIG = WanConfig("t2v", 16, 32, 2, 1, 16, 16, 0, text_dim=8, text_len=16, freq_dim=8)
MODEL = "diffusion_pytorch_model.safetensors"
INDEX = f"{MODEL}.index.json"
STATED = {"_class_name": "WanModel", "model_type": "t2v", "dim": 16, "ffn_dim": 32, "eps": 1e-6,
          "num_heads": 2, "num_layers": 1, "in_dim": 16, "out_dim": 16, "text_dim": 8,
          "text_len": 16, "freq_dim": 8, "patch_size": [1, 2, 2]}  # fmt: skip
PIPELINE = {"_class_name": "WanPipeline", "boundary_ratio": None,
            "transformer_2": [None, None]}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 257, 10**18, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "F32", "F3[", "[/bold]", "\n\x1b[31m", "\0", "x" * 5000, "../x", "/dev/zero", [], {},
    [[]], [0, 8], [1] * 5000, {"a": {"b": 1}}, "LONG NEST", "BIG NUMBER",
]  # fmt: skip
SPELLED = {'"LONG NEST"': "[" * 500 + "]" * 500, '"BIG NUMBER"': "1" + "0" * 6000}


def write_checkpoint(folder: Path) -> dict[str, bytes]:
    """A tiny whole checkpoint; the content of its files."""
    shapes = parameter_shapes(CONFIG)
    header, entries = make_header({name: ("F32", shape) for name, shape in shapes.items()})
    size = max(entry.offset + entry.size for entry in entries.values())
    files = {
        MODEL: header + bytes(size - len(header)),
        "config.json": json.dumps(STATED).encode(),
        "model_index.json": json.dumps(PIPELINE).encode(),
        INDEX: json.dumps({"weight_map": dict.fromkeys(shapes, MODEL)}).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Change, add, drop or double one value or name somewhere in a JSON text."""
    root = {"": json.loads(text)}
    node: Any = root
    key: Any = ""
    while rng.random() < 0.7 and isinstance(node[key], dict | list) and node[key]:
        node = node[key]
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    choice = rng.randrange(4)
    if choice == 0 and node is not root:
        del node[key]
    elif choice == 1 and isinstance(node, dict) and node is not root:
        node[rng.choice(["", "x", "a\n\x1b", "y" * 3000, "__metadata__"])] = node.pop(key)
    else:
        node[key] = rng.choice(VALUES)
    changed = json.dumps(root[""])
    for name, spelling in SPELLED.items():
        changed = changed.replace(name, spelling)
    if choice == 3 and changed.startswith('{"'):
        first = re.match(r'\{("[^"]*": ?[^,{\[]*)', changed)
        changed = f"{{{first[1]},{changed[1:]}" if first else changed
    return changed.encode(errors="surrogatepass")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut a file short, make it longer, or change some bytes of its first part."""
    choice = rng.randrange(4)
    if choice == 0:
        return content[: rng.randrange(len(content))]
    if choice == 1:
        return content + rng.randbytes(rng.randrange(1, 64))
    changed = bytearray(content)
    for _ in range(rng.randrange(1, 9)):
        changed[rng.randrange(min(len(changed), 6000 if choice == 2 else 40))] = rng.randrange(256)
    return bytes(changed)


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, whose length field then fits it."""
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def failures(count: int, seed: int, tell: Callable[[str], None] = lambda line: None) -> list[str]:
    """What `count` damaged checkpoints gave that is neither opened nor a one-line error in 2 s."""
    rng, found, refused = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        files = write_checkpoint(folder)
        open_checkpoint(folder)
        for number in range(count):
            file = rng.choice([MODEL, MODEL, MODEL, "config.json", "model_index.json", INDEX])
            by_name = mutate_header if file == MODEL else mutate_json
            damaged = rng.choice([by_name, by_name, mutate_bytes])(files[file], rng)
            (folder / file).write_bytes(damaged)
            began, problem = time.process_time(), ""
            try:
                open_checkpoint(folder)
            except WanExportError as error:
                refused += 1
                if not str(error).isprintable() or len(str(error)) > 2000:
                    problem = f"an error of {len(str(error))} characters: {str(error)[:300]!r}"
            except BaseException as error:
                problem = f"{type(error).__name__}: {str(error)[:300]}"
            if (seconds := time.process_time() - began) > 2:
                problem = f"{seconds:.1f} s"
            if problem:
                found.append(f"{seed}/{number} {file}: {problem}")
            (folder / file).write_bytes(files[file])
    tell(f"{count} damaged checkpoints, {refused} refused, {len(found)} failures")
    return found


if __name__ == "__main__":
    problems = failures(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]), print)
    print("\n".join(problems))
    sys.exit(bool(problems))
