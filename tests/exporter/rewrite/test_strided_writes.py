"""Writes of slices become a stack or a cat where they make up a tensor, and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_helios import apply_rotary_emb_transposed
from torch import Tensor

from tests.exporter.rewrite.programs import FORMS, exported, operators, reasons, rewritten
from tests.graphs.test_rope import strided
from wanexport.exporter.lint.program import count, lint_program
from wanexport.exporter.rewrite.proof import Proof
from wanexport.exporter.rewrite.record import STRIDED_WRITES
from wanexport.exporter.rewrite.rewrite import rewrite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
HALF, OTHER = X[..., :3].contiguous(), X[..., 3:].contiguous()


def assigned(
    make: Callable[[Any, Tensor], Tensor], *writes: tuple[Any, Callable[[Tensor], Any]]
) -> Callable[..., Tensor]:
    """A function that makes a buffer, writes values to places of it, and returns it."""

    def function(module: Any, x: Tensor) -> Tensor:
        buffer = make(module, x)
        for index, value in writes:
            buffer[index] = value(x)
        return buffer

    return function


def fresh(_: Any, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def first(x: Tensor) -> Tensor:
    return x[..., :3] * 2


def second(x: Tensor) -> Tensor:
    return x[..., 3:] + 1


EVEN, ODD = (..., slice(0, None, 2)), (..., slice(1, None, 2))


def on_itself(_: Any, x: Tensor) -> Tensor:
    q = x * 3
    even, odd = q[EVEN] - q[ODD], q[EVEN] + q[ODD]
    q[EVEN] = even
    q[ODD] = odd
    return q


def reads_before(_: Any, x: Tensor) -> Tensor:
    out = x.clone()
    total = out.sum()
    out[EVEN], out[ODD] = first(x), second(x)
    return out + total


def interleaved(_: Any, x: Tensor) -> Tensor:
    q, k = torch.empty_like(x), torch.empty_like(x)
    q[EVEN] = first(x)
    k[EVEN] = second(x)
    q[ODD] = second(x)
    k[ODD] = first(x)
    return torch.stack([q, k])


def views_after(_: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[EVEN], out[ODD] = first(x), second(x)
    view = out.transpose(1, 2)
    view.add_(1)
    return out.unflatten(-1, (3, 2))


def heads_first(_: Any, x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 3)).transpose(1, 2)
    out = torch.empty_like(q)
    out[:, :, 0::2] = q[:, :, 1::2] * 2
    out[:, :, 1::2] = q[:, :, 0::2]
    return out


def channels_last(_: Any, x: Tensor) -> Tensor:
    image = x[None].contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(image)
    out[EVEN], out[ODD] = first(image), second(image)
    return out


def narrowed(_: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out.narrow(-1, 0, 3).copy_(first(x))
    out.narrow(-1, -3, 3).copy_(second(x))
    return out


FITTING: dict[str, Callable[..., Tensor]] = {
    "empty_like": assigned(fresh, (EVEN, first), (ODD, second)),
    "zeros_like": assigned(lambda _, x: torch.zeros_like(x), (ODD, first), (EVEN, second)),
    "clone": assigned(lambda _, x: x.clone(), (EVEN, first), (ODD, second)),
    "empty in bf16": assigned(
        lambda _, x: torch.empty(2, 4, 6, dtype=torch.bfloat16), (EVEN, first), (ODD, second)
    ),
    "in place on itself": on_itself,
    "halves": assigned(fresh, ((..., slice(3)), first), ((..., slice(3, None)), second)),
    "halves from the back": assigned(
        fresh, ((..., slice(-3, None)), first), ((..., slice(-6, -3)), second)
    ),
    "uneven pieces": assigned(
        fresh,
        ((..., slice(4, None)), lambda x: x[..., :2]),
        ((..., slice(4)), lambda x: x[..., 2:]),
    ),
    "three by three": assigned(
        fresh, *(((..., slice(i, None, 3)), lambda x, i=i: x[..., i : i + 2]) for i in (0, 2, 1))
    ),
    "the axis of tokens": assigned(
        fresh,
        ((slice(None), slice(0, None, 2)), lambda x: x[:, 2:]),
        ((slice(None), slice(1, None, 2)), lambda x: x[:, :2] * 2),
    ),
    "broadcast": assigned(fresh, (EVEN, lambda x: x[0, 0, :3]), (ODD, lambda x: x[:, :1, 3:])),
    "a number": assigned(fresh, (EVEN, first), (ODD, lambda x: 0.5)),
    "read before": reads_before,
    "two at once": interleaved,
    "views and writes after": views_after,
    "heads before tokens": heads_first,
    "channels last": channels_last,
    "narrowed": narrowed,
}  # fmt: skip


@pytest.mark.parametrize("name", FITTING)
def test_writes_that_make_up_a_tensor_are_assembled(name: str) -> None:
    found, program = rewritten(FITTING[name], X)
    assert found.counts[STRIDED_WRITES] == (2 if name == "two at once" else 1)
    assert not found.left
    assert count(lint_program(program))["strided_write"] == 0


def test_they_are_assembled_in_a_program_without_mutation() -> None:
    """All in one program, for its export takes the time."""

    def every(module: Any, x: Tensor) -> list[Tensor]:
        return [function(module, x) for function in FITTING.values()]

    found, program = rewritten(every, X, form="decomposed")
    assert found.counts[STRIDED_WRITES] == len(FITTING) + 1
    assert not found.left
    assert count(lint_program(program))["strided_write"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_functions_of_diffusers_keep_every_bit(form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 8, 2, 12, generator=generator)
    cos, sin = torch.randn(2, 1, 8, 1, 6, generator=generator)
    table = torch.randn(1, 8, 24, generator=generator)

    def both(_: Any, *given: Tensor) -> list[Tensor]:
        *queries, c, s, t = given
        turned = [strided(one, c, s) for one in queries]
        return turned + [apply_rotary_emb_transposed(one, t) for one in queries]

    queries = [q.to(dtype) for dtype in DTYPES]
    found, _ = rewritten(both, *queries, cos, sin, table, form=form)
    assert found.counts[STRIDED_WRITES] == 2 * len(DTYPES)


def test_indices_of_an_axis_are_written_too() -> None:
    pair = assigned(
        lambda _, x: x.new_empty(2, 4, 2),
        ((..., 0), lambda x: x[..., 0]),
        ((..., -1), lambda x: x[..., 1]),
    )
    found, _ = rewritten(pair, X)
    assert found.counts[STRIDED_WRITES] == 1


def sums_between(_: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[EVEN] = first(x)
    total = out.sum()
    out[ODD] = second(x)
    return out + total


def reads_what_it_wrote(_: Any, x: Tensor) -> Tensor:
    q = x * 3
    q[EVEN] = q[EVEN] - q[ODD]
    q[ODD] = q[EVEN] + q[ODD]
    return q


def changes_what_it_wrote(_: Any, x: Tensor) -> Tensor:
    out, value = torch.empty_like(x), x[..., :3] * 1
    out[EVEN] = value
    value.mul_(2)
    out[ODD] = value
    return out


def adds_to_a_slice(_: Any, x: Tensor) -> Tensor:
    out = x * 1
    out[EVEN] = first(x)
    out[ODD].add_(1)
    return out


def old_view(_: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    view = out[..., :2]
    out[EVEN], out[ODD] = first(x), second(x)
    return view + 1


def of_the_caller(_: Any, x: Tensor) -> Tensor:
    x[EVEN], x[ODD] = first(x), second(x)
    return x


def of_the_module(module: Any, x: Tensor) -> Tensor:
    module.state[EVEN], module.state[ODD] = first(x), second(x)
    return module.state + 1


def perhaps_of_the_caller(_: Any, x: Tensor) -> Tensor:
    out = x.reshape(4, 2, 6)
    out[EVEN], out[ODD] = first(out), second(out)
    return out


def slice_of_a_slice(_: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:1][EVEN], out[:1][ODD] = first(x[:1]), second(x[:1])
    return out


def two_axes(_: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[EVEN] = first(x)
    out[:, 1::2] = x[:, :2]
    return out


LOOK_ALIKES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "the even ones twice": (assigned(fresh, (EVEN, first), (EVEN, second)), "overlap"),
    "another stride": (
        assigned(
            lambda _, x: x * 0, (EVEN, first), ((..., slice(1, None, 3)), lambda x: x[..., :2])
        ),
        "overlap",
    ),
    "strides that miss some": (
        assigned(
            lambda _, x: x * 0,
            ((..., slice(0, None, 3)), lambda x: x[..., :2]),
            ((..., slice(1, None, 3)), lambda x: x[..., :2]),
        ),
        "leave 2 of an axis of 6",
    ),
    "half of it": (assigned(lambda _, x: x * 0, (EVEN, first)), "leave 3"),
    "mixed strides": (
        assigned(
            fresh,
            (EVEN, first),
            ((..., slice(1, None, 4)), lambda x: x[..., :2]),
            ((..., slice(3, 4)), lambda x: x[..., :1]),
        ),
        "neither of one stride nor contiguous",
    ),
    "read between": (sums_between, "reads it between"),
    "read by its own second write": (reads_what_it_wrote, "reads it between"),
    "an input": (of_the_caller, "the caller sees"),
    "a buffer": (of_the_module, "the caller sees"),
    "two axes": (two_axes, "axes 1, 2"),
}  # fmt: skip
OF_MUTATION: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a value that changes": (changes_what_it_wrote, "changes mul"),
    "a sum into a slice": (adds_to_a_slice, "no copy"),
    "a view that was taken before": (old_view, "a view of it"),
    "perhaps a view of an input": (perhaps_of_the_caller, "may be a view"),
    "a slice of a slice": (slice_of_a_slice, "a slice of a slice"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_with_the_reason(name: str) -> None:
    function, reason = LOOK_ALIKES[name]
    program = exported(function, X)
    before = operators(program)
    found = rewrite(program)
    assert found.counts[STRIDED_WRITES] == 0
    assert reason in reasons(found)
    assert operators(program) == before


def test_they_are_left_in_a_program_without_mutation() -> None:
    """All in one program, the one that changes its input last."""
    last = [function for function, reason in LOOK_ALIKES.values() if function is of_the_caller]
    others = [function for function, _ in LOOK_ALIKES.values() if function is not of_the_caller]

    def every(module: Any, x: Tensor) -> list[Tensor]:
        return [function(module, x) for function in others + last]

    program = exported(every, X, form="decomposed")
    before = operators(program)
    found = rewrite(program)
    assert found.counts[STRIDED_WRITES] == 0
    assert len(found.left) == len(LOOK_ALIKES)
    assert all(reason in reasons(found) for _, reason in LOOK_ALIKES.values())
    assert operators(program) == before


@pytest.mark.parametrize("name", OF_MUTATION)
def test_what_mutation_makes_uncertain_is_left_with_the_reason(name: str) -> None:
    function, reason = OF_MUTATION[name]
    found, _ = rewritten(function, X)
    assert found.counts[STRIDED_WRITES] == 0
    assert reason in reasons(found)
    assert all(left.place.startswith("programs.py:") for left in found.left)


def test_other_ways_to_write_are_named() -> None:
    def by_index(_: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., torch.tensor([0, 2, 4])] = first(x)
        return out

    assert "aten.index_put_ writes it" in reasons(rewrite(exported(by_index, X)))


def test_writes_through_other_views_and_by_out_are_named() -> None:
    def chunks(_: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for half, value in zip(out.chunk(2, -1), (first(x), second(x))):
            half.copy_(value)
        return out

    def by_out(_: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.mul(x[..., :3], 2, out=out[..., :3])
        out[..., 3:] = second(x)
        return out

    assert "aten.copy_ writes it" in reasons(rewritten(chunks, X)[0])
    assert "aten.mul.out changes a slice" in reasons(rewritten(by_out, X)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_of_random_numbers_is_still_drawn(form: str) -> None:
    def function(_: Any, x: Tensor) -> list[Tensor]:
        out = torch.rand_like(x)
        out[EVEN], out[ODD] = first(x), second(x)
        return [out, torch.rand_like(x)]

    program = exported(function, X, form=form)
    proof = Proof(program)
    assert rewrite(program).counts[STRIDED_WRITES] == 1
    proof.check(program, STRIDED_WRITES)


def test_control_flow_is_left_alone_and_named() -> None:
    def branch(_: Any, x: Tensor) -> Tensor:
        fit = FITTING["empty_like"]
        return torch.cond(x.sum() > 0, lambda x: fit(None, x), lambda x: x * 2, (x,))

    found = rewrite(exported(branch, X, form="decomposed"))
    assert found.counts[STRIDED_WRITES] == 0
    assert "inside control flow" in reasons(found)


def test_the_other_axes_may_be_dynamic() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FITTING["empty_like"](None, x)

    shapes = {"x": {1: torch.export.Dim("tokens")}}
    program = torch.export.export(Model(), (X,), dynamic_shapes=shapes)
    before = program.module()(X[:, :3])
    assert rewrite(program).counts[STRIDED_WRITES] == 1
    assert torch.equal(program.module()(X[:, :3]), before)


def test_an_axis_of_a_dynamic_size_is_left() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out, other = torch.empty_like(x), torch.empty_like(x)
            out[:, 0::2], out[:, 1::2] = x[:, 0::2] * 2, x[:, 1::2]
            other[EVEN], other[ODD] = first(x), second(x[:1, :1])
            return out + other

    dim = 2 * torch.export.Dim("half")
    program = torch.export.export(Model(), (X,), dynamic_shapes={"x": {1: dim}})
    longer = torch.cat([X, X], 1)
    before = program.module()(longer)
    found = rewrite(program)
    assert found.counts[STRIDED_WRITES] == 1
    assert "is not a number" in reasons(found)
    assert torch.equal(program.module()(longer), before)
