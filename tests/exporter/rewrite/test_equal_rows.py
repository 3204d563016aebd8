"""A product of an expanded row is one of a few rows, and no other product is touched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.exporter.rewrite.programs import FORMS, exported, reasons, rewritten
from wanexport.exporter.rewrite import equal_rows
from wanexport.exporter.rewrite.record import EQUAL_ROWS
from wanexport.exporter.rewrite.rewrite import rewrite
from wanexport.exporter.rewrite.uniform_axes import uniform_axes

ROWS = 96
WEIGHT, BIAS = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)) / 8
TIME = torch.tensor([500.0])


def linear(x: Tensor) -> Tensor:
    return nn.functional.linear(x, WEIGHT.to(x.dtype), BIAS[0].to(x.dtype))


def waves(times: Tensor) -> Tensor:
    angles = torch.outer(times, torch.arange(32) / 32)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_time_mlp_of_one_timestep_multiplies_a_few_rows(dtype: torch.dtype, form: str) -> None:
    def mlp(_: Any, time: Tensor) -> Tensor:
        times = time.expand(1, ROWS).flatten()
        hidden = linear(waves(times).unflatten(0, (1, ROWS)).to(dtype))
        return linear(nn.functional.silu(hidden)).unflatten(2, (2, 32))

    found, program = rewritten(mlp, TIME, form=form)
    assert found.counts[EQUAL_ROWS] + len(found.left) == 2
    products = [n for n in program.graph.nodes
                if str(n.target) in ("aten.linear.default", "aten.addmm.default")]  # fmt: skip
    small = [n for n in products if n.meta["val"].numel() < ROWS * 64]
    assert len(small) == found.counts[EQUAL_ROWS]


def test_rows_that_round_otherwise_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_rows, "_fewest", lambda *_: None)
    found = rewrite(exported(lambda _, t: linear(waves(t.expand(ROWS))), TIME))
    assert found.counts[EQUAL_ROWS] == 0
    assert f"products of 1, 8, 64 rows round otherwise than one of {ROWS}" in reasons(found)


def varied(_: Any, time: Tensor) -> Tensor:
    return linear(waves(time.expand(ROWS) + torch.arange(ROWS)))


def of_an_input(_: Any, times: Tensor) -> Tensor:
    return linear(waves(times.expand(1, ROWS).flatten() * times))


def changed(_: Any, time: Tensor) -> Tensor:
    rows = time.expand(ROWS).clone()
    rows[3] = 7
    return linear(waves(rows))


@pytest.mark.parametrize(
    ("function", "given"), [(varied, TIME), (of_an_input, torch.rand(ROWS)), (changed, TIME)]
)
def test_rows_that_differ_are_multiplied_each(function: Any, given: Tensor) -> None:
    found, _ = rewritten(function, given)
    assert found.counts[EQUAL_ROWS] == 0


def shapes(_: Any, x: Tensor) -> Tensor:
    """Every way in which an axis is followed; x is [1, 6]."""
    rows = x.expand(5, 6)
    parts = [
        rows.unsqueeze(0).transpose(1, 2)[..., :6],
        rows.t()[None].clone().relu(),
        torch.stack([row.expand(5, 3).t() for row in x.split(3, 1)], 0).reshape(1, 6, 5),
        rows.view(5, 2, 3).permute(1, 2, 0).flatten(0, 1)[None],
        rows.select(0, 1).unsqueeze(1).expand(6, 5)[None],
        (torch.cat(rows.chunk(2, 1), 1) * torch.arange(6)).T.unsqueeze(0),
    ]
    return torch.cat(parts, 0).sum(0) + torch.arange(5)


@pytest.mark.parametrize("form", FORMS)
def test_an_axis_said_to_be_uniform_is_so(form: str) -> None:
    """Every node's value, computed, against what is said of it."""
    program = exported(shapes, torch.randn(1, 6), form=form)
    said = uniform_axes(program)

    class Watching(torch.fx.Interpreter):
        checked = 0

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            for axis in said[n] if isinstance(value, Tensor) else ():
                assert torch.equal(value, value.narrow(axis, 0, 1).expand_as(value)), n
                self.checked += 1
            return value

    stored = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    given = [stored.get(spec.target or "", torch.randn(1, 6)) for spec in specs]
    watching = Watching(program.graph_module)
    watching.run(*given)
    assert watching.checked > 10
