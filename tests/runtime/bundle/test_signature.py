"""What is derived from a config is what the graph has and a build writes."""

from dataclasses import replace

import pytest
import torch

from tests.runtime.bundle.first_schema import FAMILIES as OFFICIAL
from tests.runtime.bundle.first_schema import parameters
from wanexport.graphs.config import PRESETS
from wanexport.graphs.graph import load_graph
from wanexport.runtime.bundle.signature import (
    layout_sha256,
    parameter_shapes,
    program_of,
    weights_layout,
)
from wanexport.runtime.errors import BundleError
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Attention, Program
from wanexport.runtime.wan_config import WanConfig

ODD = WanConfig("flf2v", 24, 40, 2, 3, 36, 16, 514, text_dim=20, text_len=7, freq_dim=10)


def config_of(name: str) -> WanConfig:
    return ODD if name == "odd" else replace(PRESETS[name].config, num_layers=3)


def program_at(config: WanConfig, rows: int, columns: int, frames: int) -> Program:
    """The Program at so many tokens a latent frame."""
    stride = family_of(config).vae.spatial_stride
    side = 2 * stride
    return program_of(config, of_family(config, rows * side, columns * side, frames, stride))


def of_family(config: WanConfig, *sizes: int) -> Geometry:
    """A geometry of these sizes, in chunks where the model is causal."""
    chunks = {"chunk": 1, "cache": 2} if family_of(config).is_causal else {}
    return Geometry(*sizes, **chunks)


@pytest.mark.parametrize("name", [*PRESETS, "odd"])
def test_parameters_are_those_of_the_model_in_its_order(name: str) -> None:
    config = config_of(name)
    stride = family_of(config).vae.spatial_stride
    geometry = of_family(config, 2 * stride, 2 * stride, 1, stride)
    with torch.device("meta"):
        model = load_graph(family_of(config).graph)(config, geometry, torch.bfloat16)
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    own = [(name, tuple(p.shape), names[p.dtype]) for name, p in model.named_parameters()]
    _, entries = weights_layout(config, "bf16")
    derived = parameter_shapes(config).items()
    assert [(name, shape, entries[name].dtype) for name, shape in derived] == own


@pytest.mark.parametrize("name", [*PRESETS, "odd"])
def test_every_parameter_is_taken_by_one_call_at_one_layer(name: str) -> None:
    config = config_of(name)
    taken = [
        parameter
        for call in program_at(config, 1, 1, 1).calls
        if call.when != "commit"  # which runs calls of a step again
        for names, state in call.layers()
        for parameter in names
    ]
    assert sorted(taken) == sorted(parameter_shapes(config)) and len(set(taken)) == len(taken)


@pytest.mark.parametrize("family", OFFICIAL)
def test_the_calls_of_each_family_take_what_its_regions_took(family: str) -> None:
    inputs, outputs, tokens, _, timesteps, *_ = OFFICIAL[family]
    config = WanConfig(family, 64, 128, 2, 2, inputs, outputs, tokens)
    program = program_at(config, 4, 6, 9)
    known = {call.name: [n.replace("{i}", "0") for n in call.parameters] for call in program.calls}
    assert known == parameters(tokens)
    assert [call.repeat for call in program.calls] == [1, 2, 1]
    shapes = {name: list(spec.shape) for name, spec in program.inputs.items()}
    assert shapes.pop("latent") == [1, outputs, 3, 8, 12] and shapes.pop("timestep") == [timesteps]
    assert shapes.pop("text") == [1, 512, 4096]
    assert shapes.pop("condition", None) == ([1, 20, 3, 8, 12] if inputs == 36 else None)
    assert shapes.pop("image", None) == ([1, tokens, 1280] if tokens else None)
    assert not shapes and program.output.shape == (1, outputs, 3, 8, 12)
    draws = {"latent": "normal", "timestep": "normal", "text": "rows", "image": "normal"}
    draws["condition"] = "masked"
    assert all(spec.draw == draws[name] for name, spec in program.inputs.items())
    keys = {"self": 72, "text": 512, **({"image": tokens} if tokens else {})}
    assert program.attention == {kind: Attention(2, 72, count) for kind, count in keys.items()}


@pytest.mark.parametrize("family", OFFICIAL)
def test_a_derived_program_is_whole_and_familiar(family: str) -> None:
    inputs, outputs, tokens, *_ = OFFICIAL[family]
    config = WanConfig(family, 64, 128, 2, 2, inputs, outputs, tokens)
    for program in (program_at(config, 4, 6, 9), program_at(config, 1, 1, 1).whole()):
        assert program.fault() == "" and program.unfamiliar == "" and program.is_plain


def test_a_family_that_is_not_known_has_no_program() -> None:
    config = WanConfig("helios", 64, 128, 2, 2, 16, 16, 0)
    for derive in (parameter_shapes, lambda config: program_of(config, Geometry(64, 96, 9))):
        with pytest.raises(BundleError, match=r"family 'helios' is not known .* t2v, i2v, flf2v"):
            derive(config)


def test_a_layout_differs_by_dtype_and_by_size() -> None:
    small = WanConfig("t2v", 64, 128, 2, 2, 16, 16, 0)
    configs = (small, replace(small, ffn_dim=64), replace(small, num_layers=3))
    layouts = {layout_sha256(config, d) for config in configs for d in ("fp32", "bf16", "fp16")}
    assert len(layouts) == 9
