"""The lint is silent on our graphs, and catches each thing it forbids in a graph that has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.graphs.test_rope import complex_original, strided
from tests.oracles.wan_reference import VARIANTS, small_config, small_geometry
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.exporter.lint.program import KINDS, attention_operators, count, lint_program
from wanexport.graphs.graph import empty_graph
from wanexport.graphs.regions import trace_calls
from wanexport.graphs.signature import attention_count
from wanexport.runtime.family import family_of


class Wrapped(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.zeros(4))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def exported(function: Callable[..., Tensor], *args: Tensor) -> ExportedProgram:
    return torch.export.export(Wrapped(function), args)


def mutating(module: Wrapped, x: Tensor) -> Tensor:
    assert isinstance(module.state, Tensor)
    module.state.add_(x)
    return module.state * 2


def mutating_a_view(module: Wrapped, x: Tensor) -> Tensor:
    assert isinstance(module.state, Tensor)
    module.state[1:3].add_(1)
    return module.state * x


def attention_by_hand(_: Wrapped, q: Tensor) -> Tensor:
    return torch.softmax(q @ q.mT, -1) @ q


def branch(_: Wrapped, x: Tensor) -> Tensor:
    double = torch.cond(x.sum() > 0, lambda x: x.double() * 2, lambda x: x.double(), (x,))
    return double.float()


def loop(_: Wrapped, x: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    return while_loop(lambda x: x.sum() < 9, lambda x: (x + 1,), (x,))[0]


ROPE = torch.randn(1, 8, 2, 12)
TABLE = torch.randn(1, 8, 1, 6)
FOUR = torch.ones(4)
FAULTS = [
    ("host_sync", lambda _, x: x * x.sum().item(), (FOUR,)),
    ("host_sync", lambda _, x: x[x > 0], (FOUR,)),
    ("host_sync", lambda _, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]), (FOUR,)),
    ("mutation", mutating, (FOUR,)),
    ("mutation", mutating_a_view, (FOUR,)),
    ("fp64", lambda _, x: x.double().sum(), (FOUR,)),
    ("fp64", branch, (FOUR,)),
    ("fp64", lambda _, x: complex_original(x, (2, 2, 2)), (ROPE,)),
    ("complex", lambda _, x: complex_original(x, (2, 2, 2)), (ROPE,)),
    ("strided_write", lambda _, x, c: strided(x, c, c), (ROPE, TABLE)),
    ("strided_write", lambda _, x: x.slice_scatter(x[:2], end=2), (FOUR,)),
    ("strided_write", lambda _, x: x.scatter_add(0, torch.arange(4), x), (FOUR,)),
    ("strided_write", lambda _, x: x.diagonal_scatter(x[0], 0), (torch.ones(3, 3),)),
    ("strided_write", lambda _, x: x.index_copy(0, torch.arange(4), x), (FOUR,)),
    ("sequence", lambda _, x: x.chunk(2)[1], (FOUR,)),
    ("sequence", lambda _, x: x.unsafe_chunk(2)[1], (FOUR,)),
    ("if", branch, (FOUR,)),
    ("loop", loop, (FOUR,)),
    ("einsum", lambda _, x: torch.einsum("i,j->ij", x, x), (FOUR,)),
    ("unfused_attention", attention_by_hand, (ROPE,)),
]


@pytest.mark.parametrize("preset", slow_but(VARIANTS, *QUICK_PRESETS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_graphs_are_clean(preset: str, dtype: torch.dtype) -> None:
    config = small_config(preset)
    graph = empty_graph(family_of(config).graph, config, small_geometry(config), dtype)
    found = 0
    for call in graph.program.calls:
        program = trace_calls(graph, "cpu", [call.name])[call.name]
        operators = [str(node.target) for node in program.graph.nodes]
        own = sum("wanexport" in name for name in operators)
        assert attention_operators(program) == own
        assert lint_program(program, own) == []
        (fewer,) = lint_program(program, own + 1)
        assert fewer.kind == "unfused_attention"
        assert not [name for name in operators if "scaled_dot_product" in name]
        found += call.repeat * own
    assert found == attention_count(graph.program)
    assert found == config.num_layers * (3 if config.image_tokens else 2)


@pytest.mark.parametrize(("kind", "function", "args"), FAULTS)
def test_each_finding_is_caught(
    kind: str, function: Callable[..., Tensor], args: tuple[Tensor, ...]
) -> None:
    assert count(lint_program(exported(function, *args)))[kind] > 0


def test_every_kind_is_tested() -> None:
    assert {kind for kind, _, _ in FAULTS} | {"dynamic_size"} == set(KINDS)


def test_writing_to_a_temporary_is_no_mutation() -> None:
    assert lint_program(exported(lambda _, x: (x * 2).add_(1), FOUR)) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda state, x: state.copy_(x),
        lambda state, x: state[1:3].copy_(x[1:3]),
        lambda state, x: state.mul_(2).add_(x),
        lambda state, x: state.clone().copy_(x),
    ],
)
@pytest.mark.parametrize("decomposed", [False, True])
def test_what_is_declared_as_state_may_be_written_and_nothing_else(
    write: Callable[[Tensor, Tensor], Tensor], decomposed: bool
) -> None:
    program = exported(lambda _, x, state: write(state, x).sum() + x, FOUR, FOUR.clone())
    program = program.run_decompositions() if decomposed else program
    _, state = map(str, program.graph_signature.user_inputs)
    assert lint_program(program, writable=[state]) == []
    other = exported(lambda _, x, state: write(x, state).sum() + x, FOUR, FOUR.clone())
    other = other.run_decompositions() if decomposed else other
    kinds = {finding.kind for finding in lint_program(other)}
    assert kinds <= {"mutation", "strided_write"}
    assert {finding.kind for finding in lint_program(other, writable=[state])} == kinds


class WritesItsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.add_(x)
        return self.weight * 2


def test_mutated_parameters_are_caught_in_either_form() -> None:
    program = torch.export.export(WritesItsParameter(), (FOUR,))
    for form in (program, program.run_decompositions()):
        assert count(lint_program(form))["mutation"] == 1


def test_decomposed_programs_are_linted_too() -> None:
    program = exported(lambda _, x, c: strided(x, c, c), ROPE, TABLE).run_decompositions()
    assert count(lint_program(program))["strided_write"] > 0


def test_a_finding_says_where() -> None:
    findings = lint_program(exported(lambda _, x, c: strided(x, c, c), ROPE, TABLE))
    (write, *_) = (finding for finding in findings if finding.kind == "strided_write")
    assert write.detail.startswith("aten.copy_.default at test_lint.py:")


def test_dynamic_sizes_are_caught() -> None:
    module, x = nn.Linear(4, 4), torch.ones(3, 4)
    sizes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(module, (x,), dynamic_shapes=sizes)
    assert count(lint_program(program))["dynamic_size"] > 0
