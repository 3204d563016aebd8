"""The regions in eager PyTorch give diffusers' velocity, and name their parameters."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
)
from wanexport.exporter.lint.program import lint_program
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.regions import trace_regions
from wanexport.graphs.signature import attention_count
from wanexport.runtime.bundle.signature import REGIONS, parameter_shapes, region_parameters


@pytest.mark.parametrize("preset", VARIANTS)
def test_the_regions_give_diffusers_velocity(preset: str) -> None:
    config = small_config(preset, num_layers=3)
    geometry, model = small_geometry(config), diffusers_model(config)
    state, names = official_state(model), region_parameters(config)
    run: dict[str, Any] = {
        name: program.module()
        for name, program in trace_regions(config, geometry, torch.float32, "cpu").items()
    }
    inputs = forward_inputs(config, geometry, 812.0, seed=1)
    given = [torch.from_numpy(array) for array in inputs.values()]
    embed, head = ([state[name] for name in names[region]] for region in ("embed", "head"))
    x, time, *conditioning = run["embed"](embed, given)
    for number in range(config.num_layers):
        own = [name.replace("blocks.0.", f"blocks.{number}.") for name in names["block"]]
        x = run["block"]([state[name] for name in own], [x, *conditioning])
    velocity = run["head"](head, [x, time])
    assert relative_l2(velocity.numpy(), diffusers_velocity(model, config, inputs)) <= 1e-5


def test_the_regions_share_out_every_parameter() -> None:
    config = small_config("flf2v-14b")
    names = region_parameters(config)
    assert tuple(names) == REGIONS
    one_block = {n for n in parameter_shapes(config) if not n.startswith("blocks.1.")}
    assert sorted(name for own in names.values() for name in own) == sorted(one_block)


def test_a_region_holds_no_parameter_and_every_attention() -> None:
    config = small_config("flf2v-14b")
    programs = trace_regions(config, small_geometry(config), torch.bfloat16, "cpu")
    for name, program in programs.items():
        assert not program.graph_signature.parameters
        held = sum(int(np.prod(t.shape)) for t in program.constants.values())
        assert held < 10_000, name
    assert not lint_program(programs["block"], attention_count(config) // config.num_layers)
    assert lint_program(programs["block"], 1)[0].kind == "unfused_attention"


def test_only_the_regions_asked_for_are_traced() -> None:
    config = small_config("t2v-1.3b")
    programs = trace_regions(config, small_geometry(config), torch.float32, "cpu", regions=["head"])
    assert list(programs) == ["head"]
