"""The lint is silent on our graphs, and catches each thing it forbids in a graph that has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.test_rope import complex_original, strided
from tests.wan_reference import VARIANTS, small_config, small_geometry
from wanexport.exporter.trace import trace
from wanexport.graphs.lint import lint_program
from wanexport.graphs.signature import attention_count


class Wrapped(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.zeros(4))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def counts_of(function: Callable[..., Tensor], *args: Tensor) -> dict[str, int]:
    return lint_program(torch.export.export(Wrapped(function), args))


def mutating(module: Wrapped, x: Tensor) -> Tensor:
    assert isinstance(module.state, Tensor)
    module.state.add_(x)
    return module.state * 2


def host_sync(module: Wrapped, x: Tensor) -> Tensor:
    return x * x.sum().item()


ROPE = torch.randn(1, 8, 2, 12)
TABLE = torch.randn(1, 8, 1, 6)


@pytest.mark.parametrize("preset", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_graphs_are_clean(preset: str, dtype: torch.dtype) -> None:
    config = small_config(preset)
    program = trace(config, small_geometry(config), dtype)
    assert set(lint_program(program).values()) == {0}
    calls = [node for node in program.graph.nodes if "wanexport" in str(node.target)]
    assert len(calls) == attention_count(config)
    assert not [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]


@pytest.mark.parametrize(
    ("finding", "function", "args"),
    [
        ("host_sync", host_sync, (torch.ones(4),)),
        ("mutation", mutating, (torch.ones(4),)),
        ("fp64", lambda _, x: x.double().sum(), (torch.ones(4),)),
        ("strided_write", lambda _, x, c: strided(x, c, c), (ROPE, TABLE)),
        ("complex", lambda _, x: complex_original(x, (2, 2, 2)), (ROPE,)),
        ("fp64", lambda _, x: complex_original(x, (2, 2, 2)), (ROPE,)),
    ],
)
def test_each_finding_is_caught(
    finding: str, function: Callable[..., Tensor], args: tuple[Tensor, ...]
) -> None:
    assert counts_of(function, *args)[finding] > 0


def test_dynamic_sizes_are_caught() -> None:
    module, x = nn.Linear(4, 4), torch.ones(3, 4)
    sizes = ({0: torch.export.Dim("n")},)
    assert lint_program(torch.export.export(module, (x,), dynamic_shapes=sizes))["dynamic_size"] > 0
