"""Record the calls of a model that you trust, and hold an engine against them.

    python samples/03_compare_recorded.py FOLDER

Here that model is diffusers', small and with random weights. With the official repository, record
its `WanModel` likewise: latent is `x[0]`, timestep `t` (for TI2V one for each latent frame: `t` at
the first token of each), text `context[0]`, velocity the first of the list that it returns. Compare
with `--outputs-dtype bf16`, the precision of its autocast.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from wanexport.exporter.build import build
from wanexport.exporter.compare.compare import compare
from wanexport.runtime.bundle.tensorfile import save_arrays


def main(folder: Path) -> None:
    """Write a checkpoint, its recorded calls and its bundle into folder, and compare."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=2, ffn_dim=512, num_layers=2).eval()
    model.save_pretrained(folder / "model" / "transformer")

    latent = torch.randn(3, 16, 3, 8, 12)  # three calls
    timestep = torch.tensor([999.0, 833.0, 500.0])
    text = torch.zeros(1, 512, 4096)  # all calls have the same prompt, padded with zeros
    text[:, :20] = torch.randn(20, 4096)
    with torch.no_grad():
        pairs = zip(latent, timestep, strict=True)
        velocity = torch.cat([model(x[None], t[None], text).sample for x, t in pairs])
    recorded = {"latent": latent, "timestep": timestep, "text": text}
    calls, outputs = folder / "calls.safetensors", folder / "outputs.safetensors"
    save_arrays(calls, {name: np.asarray(tensor) for name, tensor in recorded.items()})
    save_arrays(outputs, {"velocity": velocity.numpy()})

    bundle = folder / "bundle"
    build(str(folder / "model"), resolution="64x96", frames=9, output=bundle)
    result = compare(bundle, calls=calls, outputs=outputs)
    for row in result["steps"]:
        print(f"call {row['step']}: error {row['error']:.1e}, gate {row['gate']:.0e}")
    print("passed" if result["passed"] else "failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
