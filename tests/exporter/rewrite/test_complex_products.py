"""Complex products become real ones where PyTorch computes them so, and their tables go."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exporter.rewrite.programs import FORMS, exported, operators, reasons, rewritten
from tests.graphs.test_rope import complex_original
from wanexport.exporter.lint.program import count, lint_program
from wanexport.exporter.rewrite import complex_products
from wanexport.exporter.rewrite.record import COMPLEX_PRODUCTS
from wanexport.exporter.rewrite.rewrite import rewrite
from wanexport.exporter.rewrite.trial import product_is_exact

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD = 128  # 64 complex numbers: whole vectors of every instruction set


def numbers(*shape: int, dtype: torch.dtype = torch.complex64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    real = turns.real.dtype
    pairs = torch.view_as_complex(x.to(real).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", [torch.complex64, torch.complex128])
def test_a_table_becomes_two_real_ones(precision: torch.dtype, form: str) -> None:
    x = torch.randn(1, 8, 2, HEAD)
    turns = numbers(1, 8, 1, HEAD // 2, dtype=precision)

    def three(module: Any, x: Tensor) -> list[Tensor]:
        return [rotated(x.to(dtype), module.table) for dtype in DTYPES]

    found, program = rewritten(three, x, form=form, table=turns)
    assert found.counts[COMPLEX_PRODUCTS] == 3
    assert count(lint_program(program))["complex"] == 0
    tables = [v for v in program.constants.values() if isinstance(v, Tensor)]
    assert len(tables) == 2
    assert all(torch.equal(a, b) for a, b in zip(tables, (turns.real, turns.imag)))
    assert not any(value.is_complex() for value in program.state_dict.values())


@pytest.mark.parametrize("form", FORMS)
def test_tables_that_the_forward_computes_become_constants(form: str) -> None:
    x = torch.randn(1, 24, 2, HEAD)
    found, program = rewritten(lambda _, x: complex_original(x, (2, 3, 4)), x, form=form)
    assert found.counts[COMPLEX_PRODUCTS] == 1
    assert not [name for name in operators(program) if "polar" in name or "arange" in name]


def test_turns_that_depend_on_an_input_are_read_as_real() -> None:
    x, cos, sin = torch.randn(1, 8, 2, HEAD), *torch.randn(2, 1, 8, 1, HEAD // 2)
    found, program = rewritten(lambda _, x, c, s: rotated(x, torch.complex(c, s)), x, cos, sin)
    assert found.counts[COMPLEX_PRODUCTS] == 1
    assert count(lint_program(program))["complex"] == 0
    found, program = rewritten(lambda _, x, t: rotated(x, t), x, torch.complex(cos, sin))
    assert found.counts[COMPLEX_PRODUCTS] == 1
    assert not [name for name in operators(program) if "view_as_complex" in name]


def test_conjugates_are_real_too() -> None:
    def turned_back(_: Any, x: Tensor, t: Tensor) -> list[Tensor]:
        return [rotated(x, t.conj()), rotated(x, t.conj()[:, :1])]

    x, turns = torch.randn(1, 8, 2, HEAD), numbers(1, 8, 1, HEAD // 2)
    assert rewritten(turned_back, x, turns)[0].counts[COMPLEX_PRODUCTS] == 2


def test_a_conjugate_that_changes_is_left() -> None:
    def function(_: Any, x: Tensor, t: Tensor) -> Tensor:
        own = t.clone()
        back = own.conj()
        torch.view_as_real(own).mul_(2)
        return rotated(x, back)

    x, turns = torch.randn(1, 8, 2, HEAD), numbers(1, 8, 1, HEAD // 2)
    found, _ = rewritten(function, x, turns)
    assert "a conjugate, is changed in place" in reasons(found)


def test_a_table_that_changes_after_it_is_made_is_read_as_it_is_then() -> None:
    def function(_: Any, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        turns = torch.complex(c, s)
        torch.view_as_real(turns).mul_(2)
        return rotated(x, turns)

    x, cos, sin = torch.randn(1, 8, 2, HEAD), *torch.randn(2, 1, 8, 1, HEAD // 2)
    assert rewritten(function, x, cos, sin)[0].counts[COMPLEX_PRODUCTS] == 1


def test_a_product_that_rounds_once_less_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "PyTorch's product rounds otherwise"
    monkeypatch.setattr(complex_products, "product_is_exact", lambda *_: said)
    x, turns = torch.randn(1, 8, 2, HEAD), numbers(1, 8, 1, HEAD // 2)
    program = exported(lambda module, x: rotated(x, module.table), x, table=turns)
    before = operators(program)
    found = rewrite(program)
    assert found.counts[COMPLEX_PRODUCTS] == 0
    assert said in reasons(found)
    assert operators(program) == before


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("width", [1, 3, 6, 21, 22, 63, 64, 128])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_trial_tells_what_the_product_does_here(
    dtype: torch.dtype, width: int, rows: int
) -> None:
    """On numbers that the trial has not seen."""
    x, y = (
        numbers(rows, 2, width, dtype=dtype, seed=5),
        numbers(rows, 1, width, dtype=dtype, seed=6),
    )
    (a, b), (c, d) = (torch.view_as_real(one).unbind(-1) for one in (x, y))
    real = torch.stack([a * c - b * d, a * d + b * c], dim=-1)
    reason = product_is_exact(x, y)
    if reason is None:
        assert torch.equal(torch.view_as_real(x * y), real)
    else:
        assert f"rows of {width} rounds otherwise" in reason


def read_as_complex(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.view_as_real((x * y).exp())


def times_real(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.view_as_real(x * y.real)


def changed_in_place(_: Any, x: Tensor, y: Tensor) -> Tensor:
    product = x * y
    pairs = torch.view_as_real(product)
    torch.view_as_real(product).add_(1)
    return pairs


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_as_complex, "takes the product as complex"),
        (times_real, "no complex tensor"),
        (changed_in_place, "changed in place"),
    ],
)
def test_other_products_are_left_with_the_reason(function: Any, reason: str) -> None:
    found, _ = rewritten(function, numbers(8, 64), numbers(8, 64, seed=1))
    assert found.counts[COMPLEX_PRODUCTS] == 0
    assert reason in reasons(found)


def test_a_use_that_is_no_product_is_named() -> None:
    found, _ = rewritten(lambda _, x: torch.view_as_complex(x).abs(), torch.randn(8, 2))
    assert "aten.abs.default takes it as complex" in reasons(found)


def test_a_table_that_the_program_changes_stays() -> None:
    def turning(module: Any, x: Tensor) -> Tensor:
        module.state.add_(1)
        turns = torch.view_as_complex(module.state.reshape(24, 2).clone())
        return rotated(x, turns.repeat(8)[:64])

    found, program = rewritten(turning, torch.randn(1, 8, 2, HEAD))
    assert not [name for name in program.constants if name.startswith("real_table")]
    assert found.counts[COMPLEX_PRODUCTS] == 1
