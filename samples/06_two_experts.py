"""Build and sample a model of two experts, as Wan2.2's A14B: one for high noise, one for low.

    python samples/06_two_experts.py FOLDER

The model here is small and random; a published one is built with
`wanexport build -m Wan-AI/Wan2.2-T2V-A14B`. Both experts run in one engine, each with its own
weights. On a GPU that has no room for both, `load(bundle, offload="experts")` keeps one there and
brings in the other's weights at the switch.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from wanexport.exporter.build import build
from wanexport.runtime import load, sample
from wanexport.runtime.sample import make_plan
from wanexport.runtime.settings import Settings

STEPS = 8


def write_model(folder: Path) -> None:
    """A checkpoint in diffusers' layout, whose second transformer is for low noise."""
    for seed, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        expert = WanTransformer3DModel(num_attention_heads=2, ffn_dim=512, num_layers=2)
        expert.save_pretrained(folder / name)
    # Where the experts meet, of 1000 timesteps; without it, the official one for such a model.
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875}))


def main(folder: Path) -> None:
    """Build into folder/bundle, and print which expert serves which step."""
    bundle = folder / "bundle"
    write_model(folder / "model")
    record = build(folder / "model", resolution="64x96", frames=9, dtype="fp32", output=bundle)
    print(f"{len(record['engines'])} engine, weights of {', '.join(record['weights'])}")

    denoiser = load(bundle)
    plan = make_plan(denoiser.sampling, Settings(steps=STEPS))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(denoiser.inputs["latent"].shape, np.float32)
    text, negative = rng.standard_normal((2, 77, 4096), np.float32)
    served: Counter[str] = Counter()
    for step in sample(denoiser, noise=noise, text=text, negative=negative, steps=STEPS):
        expert = denoiser.expert(step.timestep)
        served[expert] += 1
        scale = plan.guidance[step.index]
        print(f"step {step.index}: timestep {step.timestep:g}, {expert}, guidance {scale:g}")
    print(" and ".join(f"{count} steps by {expert}" for expert, count in served.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
