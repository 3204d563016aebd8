"""Calls of graphs in eager PyTorch give diffusers' velocity, and are as their Program says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from tests.exporter.families import camera, memory
from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
)
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.exporter.lint.program import attention_operators, lint_program
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.graph import Graph, empty_graph, empty_tensor, load_graph
from wanexport.graphs.regions import trace_calls, written_inputs
from wanexport.graphs.signature import attention_count
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.family import FAMILIES, family_of
from wanexport.runtime.program import Call, of_layer
from wanexport.runtime.wan_config import WanConfig

OWN = {"camera": camera.FAMILY, "memory": memory.FAMILY}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in OWN.items():
        monkeypatch.setitem(FAMILIES, name, family)


def graph_of(name: str, dtype: torch.dtype = torch.float32, num_layers: int = 2) -> Graph:
    """The empty graph of a preset, or of a family of the tests."""
    if name in OWN:
        config = replace(small_config("t2v-1.3b", num_layers), family=name)
    else:
        config = small_config(name, num_layers)
    return empty_graph(family_of(config).graph, config, small_geometry(config), dtype)


def run(exported: ExportedProgram, *arguments: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    module: Any = exported.module()
    with torch.no_grad():
        results: tuple[torch.Tensor, ...] = module(*arguments)
    return results


@pytest.mark.parametrize("preset", slow_but(VARIANTS, *QUICK_PRESETS))
def test_the_calls_give_diffusers_velocity(preset: str) -> None:
    graph = graph_of(preset, num_layers=3)
    config, model = graph.config, diffusers_model(graph.config)
    state = official_state(model)
    exported = trace_calls(graph, "cpu")
    inputs = forward_inputs(config, graph.geometry, 812.0, seed=1)
    values = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for call in graph.program.calls:
        for names, _ in call.layers():
            reads = [values[name] for name in call.reads]
            given: tuple[list[torch.Tensor], ...] = ([state[name] for name in names], reads, [])
            values |= dict(zip(call.writes, run(exported[call.name], *given), strict=True))
    velocity = values["velocity"].numpy()
    assert relative_l2(velocity, diffusers_velocity(model, config, inputs)) <= 1e-5


@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("name", slow_but([*VARIANTS, *OWN], *QUICK_PRESETS, *OWN))
def test_a_call_writes_what_its_program_says(name: str, dtype: torch.dtype) -> None:
    graph = graph_of(name, dtype, num_layers=1)
    program, exported = graph.program, trace_calls(graph, "cpu")
    assert list(exported) == [call.name for call in program.calls]
    specs = {**program.values, **program.outputs}
    for call in program.calls:
        written = outputs_of(exported[call.name])
        for tensor, spec in zip(written, map(specs.__getitem__, call.writes), strict=True):
            expected = empty_tensor(spec, dtype)
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)


def outputs_of(exported: ExportedProgram) -> list[torch.Tensor]:
    (output,) = (node for node in exported.graph_module.graph.nodes if node.op == "output")
    return [node.meta["val"] for node in output.args[0]]


@pytest.mark.parametrize("name", [*VARIANTS, *OWN])
def test_the_calls_share_out_every_parameter_of_the_graph(name: str) -> None:
    graph = graph_of(name)
    names = [n for call in graph.program.calls for own, _ in call.layers() for n in own]
    shapes = {name: tuple(p.shape) for name, p in graph.named_parameters()}
    assert len(set(names)) == len(names)
    assert set(names) == set(shapes)
    assert shapes == dict(parameter_shapes(graph.config))


def test_a_call_holds_no_parameter_and_every_attention() -> None:
    graph = graph_of("flf2v-14b", torch.bfloat16)
    exported = trace_calls(graph, "cpu")
    found = 0
    for call in graph.program.calls:
        own = exported[call.name]
        assert not own.graph_signature.parameters
        held = sum(int(np.prod(t.shape)) for t in own.constants.values())
        assert held < 10_000, call.name
        assert not lint_program(own)
        found += attention_operators(own) * call.repeat
    assert found == attention_count(graph.program) == 6
    assert lint_program(exported["block"], 1)[0].kind == "unfused_attention"


def test_an_attention_says_of_what_kind_it_is() -> None:
    block = trace_calls(graph_of("i2v-14b"), "cpu", ["block"])["block"]
    nodes = block.graph_module.graph.nodes
    kinds = [node.args[3] for node in nodes if "wanexport.attention" in str(node.target)]
    assert kinds == ["self", "text", "image"]


def test_only_the_calls_asked_for_are_traced() -> None:
    assert list(trace_calls(graph_of("t2v-1.3b"), "cpu", ["head"])) == ["head"]


def test_a_call_writes_its_state_in_place_and_nothing_else() -> None:
    graph = graph_of("memory")
    block = trace_calls(graph, "cpu", ["block"])["block"]
    (call,) = (call for call in graph.program.calls if call.name == "block")
    writable = written_inputs(block, len(call.state))
    assert not lint_program(block, writable=writable)
    assert {finding.kind for finding in lint_program(block)} == {"mutation", "strided_write"}
    rng = torch.Generator().manual_seed(0)
    given = [
        [torch.randn(tensor.shape, generator=rng) * 0.1 for tensor in tensors]
        for tensors in arguments_of(graph, call)
    ]
    before = [[tensor.clone() for tensor in tensors] for tensors in given]
    (x,) = run(block, *given)
    for tensors, old in zip(given[:2], before[:2]):
        assert all(map(torch.equal, tensors, old))
    expected = 0.5 * (before[2][0] + x.mean(dim=1))
    torch.testing.assert_close(given[2][0], expected)


def arguments_of(graph: Graph, call: Call) -> tuple[list[torch.Tensor], ...]:
    """Tensors of the shapes that a call of the first layer takes."""
    program = graph.program
    specs = {**program.inputs, **program.values}
    return (
        [graph.get_parameter(name) for name in of_layer(call.parameters, 0)],
        [empty_tensor(specs[name], graph.dtype) for name in call.reads],
        [empty_tensor(program.state[name], graph.dtype) for name in call.state],
    )


def test_a_whole_graph_leaves_the_state_that_it_is_given() -> None:
    config = replace(small_config("t2v-1.3b"), family="memory")
    geometry = small_geometry(config)
    graph = load_graph(memory.FAMILY.graph)(config, geometry, torch.float32)
    torch.manual_seed(0)
    for parameter in graph.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    inputs = forward_inputs(config, geometry, 812.0, seed=1)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    state = {name: torch.ones(spec.shape) for name, spec in graph.program.states().items()}
    velocity, *after = graph(**given, state=list(state.values()))
    assert all(bool((tensor == 1).all()) for tensor in state.values())
    run_in_place = graph.run(given, state)
    assert torch.equal(run_in_place["velocity"], velocity)
    assert all(map(torch.equal, state.values(), after))


def test_an_unknown_kind_of_attention_is_refused_when_it_is_traced() -> None:
    from wanexport.runtime.engines.operators import attention

    class Unkind(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attention(x, x, x, "other")

    with pytest.raises(BadRequest, match="unknown kind of attention 'other'"):
        torch.export.export(Unkind(), (torch.ones(1, 4, 2, 8),))


def test_what_is_no_graph_is_not_taken_for_one() -> None:
    with pytest.raises(TypeError, match="is no Graph"):
        load_graph(f"{WanConfig.__module__}:WanConfig")
