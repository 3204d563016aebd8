"""A damaged or hostile LoRA file ends in a result or in one line, never in another error."""

import json
import random as python_random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.lora.tiny import FFN, SHAPES, Q, base, pair, random, write
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.lora.merge import LoraStack

ROLES = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_mid.weight", "alpha", "dora_scale",
    "lora_magnitude_vector", "diff", "diff_b", "diff_m", "w_norm", "b_norm", "lokr_w1", "lokr_w2",
    "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "weight", "bias", "", "..",
)  # fmt: skip
MODULES = (Q, FFN, "patch_embedding", "blocks.0.norm3", "blocks.0", "head", "", ".", "blocks.0.x")
PREFIXES = ("", "diffusion_model.", "lora_unet_", "lora_unet__", "transformer.")
SIZES = (0, 1, 1, 2, 3, 4, 16, 24)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
METADATA: tuple[Any, ...] = (
    None,
    {},
    {"lora_alpha": 2},
    {"lora_alpha": {}},
    {"lora_alpha": 1e308},
    [],
    "x",
)
SEEDS = range(150)


def use(file: Path) -> None:
    """Merge everything; BadRequest and BundleError are what may be raised."""
    for partial in (False, True):
        try:
            lora = LoraStack([(file, 0.5)], SHAPES, partial=partial)
            lora.describe()
            for name in SHAPES:
                if lora.changes(name):
                    assert lora.merge(name, base(name)).shape == SHAPES[name]
        except WanExportError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000


def damaged(content: bytes, rng: python_random.Random) -> bytes:
    """Some bytes changed, cut off, or put in; the header more often than the rest."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) if rng.random() < 0.2 else min(len(data), 900))
        how = rng.randrange(4)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            data[at] = rng.choice(b'0123456789[]{}",:AFI')
        elif how == 2:
            del data[at : at + rng.choice([1, 2, 100])]
        else:
            data[at:at] = rng.choice([b"0", b"9" * 30, b"-", b"\xff", b'"', b"[" * 40])
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_with_damaged_bytes_is_a_lora_or_refused(seed: int, tmp_path: Path) -> None:
    tensors = pair(Q) | {f"{Q}.alpha": torch.tensor(1.0), f"{FFN}.diff_b": random(24)}
    tensors |= {f"{FFN}.lokr_w1": random(2, 4), f"{FFN}.lokr_w2": random(12, 4)}
    file = write(tmp_path, tensors, lora_adapter_metadata={"lora_alpha": 2})
    file.write_bytes(damaged(file.read_bytes(), python_random.Random(seed)))
    use(file)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_of_any_tensors_is_a_lora_or_refused(seed: int, tmp_path: Path) -> None:
    rng = python_random.Random(seed)
    tensors = pair(FFN)
    for _ in range(rng.randrange(1, 14)):
        shape = [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 5]))]
        key = rng.choice(PREFIXES) + rng.choice(MODULES) + "." + rng.choice(ROLES)
        value = torch.randn(shape) * rng.choice([1, 1, 1e30])
        tensors[key] = value.to(rng.choice(DTYPES[:2] if rng.random() < 0.8 else DTYPES))
    use(write(tmp_path, tensors, lora_adapter_metadata=rng.choice(METADATA)))


def test_a_header_of_many_long_names_takes_no_long_time(tmp_path: Path) -> None:
    names = [f"{'.lora_A' * 60}.{i}" for i in range(5000)]
    fields = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    fields["__metadata__"] = {
        "lora_adapter_metadata": json.dumps(
            {"lora_alpha": 1, "alpha_pattern": {name.replace("_", ""): 1 for name in names}}
        )
    }
    header = json.dumps(fields).encode()
    file = tmp_path / "lora.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    use(file)
