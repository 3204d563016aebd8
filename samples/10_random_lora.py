"""Write a LoRA of random values for the preset `tiny`, as one is trained for a published Wan.

    python samples/10_random_lora.py style.safetensors

The file has what many trainers write: for each linear layer of a block `lora_down`, `lora_up` and
`alpha`, under the official names with the prefix `diffusion_model.`.
"""

import sys
from pathlib import Path

import numpy as np

from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.tensorfile import save_arrays

RANK = 8


def main(path: Path) -> None:
    """Write the file."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in parameter_shapes(PRESETS["tiny"].config).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            down = rng.standard_normal((RANK, shape[1]), np.float32)
            tensors[f"{layer}.lora_down.weight"] = down / np.float32(shape[1] ** 0.5)
            tensors[f"{layer}.lora_up.weight"] = rng.standard_normal((shape[0], RANK), np.float32)
            tensors[f"{layer}.alpha"] = np.array(RANK / 16, np.float32)
    save_arrays(path, tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
