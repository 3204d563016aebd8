"""Record what the official VAE code computes, for test_vae.py: writes official_vae.json beside it.

    python tests/oracles/official_vae.py WAN21 WAN22

WAN21 and WAN22 are clones of Wan-Video/Wan2.1 (recorded at 9737cba9) and Wan-Video/Wan2.2
(42bf4cfa); their code needs einops. The tensors follow from a formula, the same everywhere.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("official_vae.json")
CODE = {"Wan2.1": "wan/modules/vae.py", "Wan2.2": "wan/modules/vae2_2.py"}
WRAPPERS = {"Wan2.1": "WanVAE", "Wan2.2": "Wan2_2_VAE"}
CHANNELS = {"Wan2.1": 16, "Wan2.2": 48}
STRIDES = {"Wan2.1": 8, "Wan2.2": 16}
FULL = {"Wan2.1": {"dim": 96}, "Wan2.2": {"dim": 160, "dec_dim": 256}}
TINY = {"Wan2.1": {"dim": 4}, "Wan2.2": {"dim": 4, "dec_dim": 8}}
SETTINGS = {"num_res_blocks": 2, "temperal_downsample": [False, True, True]}
HEIGHT, WIDTH = 32, 48
FRAMES = (1, 5, 9)
EVERY_LATENT, EVERY_PIXEL = 5, 101  # of so many values one is kept


def uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1) that depend on key and shape alone: the hash splitmix64 of a count."""
    start = int.from_bytes(key.encode()[-8:], "little") * 1000003 + len(key)
    state = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(start % 2**64)
    state *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    values = (state >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return torch.from_numpy(values.reshape(shape)).float()


def weights(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """A tensor for each name, such that every one matters and signals keep their size."""
    tensors = {}
    for name, shape in shapes.items():
        values = uniform(name, tuple(shape))
        if name.endswith("gamma"):
            tensors[name] = 1 + 0.2 * values
        elif len(shape) == 1:
            tensors[name] = 0.1 * values
        else:
            tensors[name] = values * (3 / np.prod(shape[1:])) ** 0.5
    return tensors


def video(frames: int) -> Tensor:
    """A video [3, frames, HEIGHT, WIDTH] in [-1, 1)."""
    return uniform("video", (3, frames, HEIGHT, WIDTH))


def latent(version: str, frames: int) -> Tensor:
    """A normalised latent [C, f, h, w] for that many frames."""
    stride = STRIDES[version]
    shape = (CHANNELS[version], (frames - 1) // 4 + 1, HEIGHT // stride, WIDTH // stride)
    return 2 * uniform("latent", shape)


def _module(version: str, clone: Path) -> ModuleType:
    """The file of the official code alone: its package imports much more."""
    spec = importlib.util.spec_from_file_location(version, clone / CODE[version])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def record(version: str, clone: Path) -> dict[str, Any]:
    """Names and shapes of the published size and of a tiny one, and what the tiny one computes."""
    module = _module(version, clone)
    sizes = {"z_dim": CHANNELS[version], **SETTINGS}
    with torch.device("meta"):
        full = _shapes(module.WanVAE_(**FULL[version], **sizes))
    model = module.WanVAE_(**TINY[version], **sizes)
    tiny = _shapes(model)
    model.load_state_dict(weights(tiny))
    # In the place of the function that reads a file of the published size.
    setattr(module, "_video_vae", lambda *_, **__: model)  # noqa: B010
    vae = getattr(module, WRAPPERS[version])(vae_pth="", device="cpu")
    encoded, decoded = {}, {}
    for frames in FRAMES:
        encoded[frames] = _kept(vae.encode([video(frames)])[0], EVERY_LATENT)
        decoded[frames] = _kept(vae.decode([latent(version, frames)])[0], EVERY_PIXEL)
    return {"full": full, "tiny": tiny, "encoded": encoded, "decoded": decoded}


def _kept(values: Tensor, every: int) -> list[float]:
    return [float(f"{value:.7g}") for value in values.flatten()[::every].tolist()]


def main() -> None:
    """Write the golden values."""
    clones = dict(zip(CODE, map(Path, sys.argv[1:3]), strict=True))
    golden = {version: record(version, clone) for version, clone in clones.items()}
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
