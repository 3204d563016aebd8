"""What is derived from a config is what the graph has and a build writes."""

from dataclasses import replace

import pytest
import torch

from wanexport.graphs.config import PRESETS
from wanexport.graphs.wan import WanModel
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

ODD = WanConfig(24, 40, 2, 3, 36, 16, 514, text_dim=20, text_len=7, freq_dim=10)


@pytest.mark.parametrize("name", [*PRESETS, "odd"])
def test_parameters_are_those_of_the_model_in_its_order(name: str) -> None:
    config = ODD if name == "odd" else replace(PRESETS[name].config, num_layers=3)
    side = 2 * config.spatial_stride
    with torch.device("meta"):
        model = WanModel(config, Geometry(side, side, 1, config.spatial_stride), torch.bfloat16)
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    own = [(name, tuple(p.shape), names[p.dtype]) for name, p in model.named_parameters()]
    _, entries = weights_layout(config, "bf16")
    derived = parameter_shapes(config).items()
    assert [(name, shape, entries[name].dtype) for name, shape in derived] == own
