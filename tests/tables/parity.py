"""Print the parity table: every family at dim 256, four blocks, 72 tokens, t = 812.

python -m tests.tables.parity
"""

import tempfile
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from wanexport.exporter.build import build
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime import load
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.signature import parameter_shapes


def errors(preset: str, folder: Path) -> tuple[float, float, float]:
    """fp32 engine, our bf16 graph and diffusers in bf16, all against diffusers in fp32."""
    config = small_config(preset, num_layers=4)
    geometry = small_geometry(config)
    model = diffusers_model(config)
    inputs = forward_inputs(config, geometry, 812.0, seed=1)
    exact = diffusers_velocity(model, config, inputs)
    # A two-expert family's graph is proven on one of its experts: the tensors are the same.
    model_folder = write_official(folder / "official", official_state(model), config)
    size = f"{geometry.height}x{geometry.width}"
    build(str(model_folder), resolution=size, frames=geometry.frames, output=folder / "bundle")
    (weights,) = (folder / "bundle" / "weights").iterdir()
    names = {name: name for name in parameter_shapes(config)}
    tensors = bundle_tensors(weights / WEIGHTS_FILE, names)
    model.save_pretrained(folder / "diffusers")
    half = WanTransformer3DModel.from_pretrained(folder / "diffusers", torch_dtype=torch.bfloat16)
    return (
        relative_l2(load(folder / "bundle")(**inputs), exact),
        relative_l2(EagerEngine(config, geometry, "bf16", tensors)(inputs), exact),
        relative_l2(diffusers_velocity(half, config, inputs), exact),
    )


def main() -> None:
    """Print the table in Markdown."""
    print("| family | fp32 engine | our graph, bf16 | diffusers, bf16 |\n|---|---|---|---|")
    for preset in VARIANTS:
        if preset != "t2v-a14b":  # the tensors and the graph of t2v
            with tempfile.TemporaryDirectory() as folder:
                figures = " | ".join(f"{error:.1e}" for error in errors(preset, Path(folder)))
            print(f"| {preset} | {figures} |")


if __name__ == "__main__":
    main()
