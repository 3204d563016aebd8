"""Section `helios`: the eleven cases of vLLM-Omni's pull request 2474, with the real function.

    python -m tests.tables.published.helios [--device cuda]

The function with strided writes is diffusers' own, of 0.37 or newer; in an older one a copy of its
maths stands in, which the first row says. The pull request compared two copies.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from tests.tables.published.rope_forms import differing, stacked_helios, strided_helios
from tests.tables.published.section import Cells, Place, Section, main

Function = Callable[[Tensor, Tensor], Tensor]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = ((1, 8, 1, 32), (2, 16, 8, 64), (1, 8192, 4, 64), (4, 32, 16, 128))
TYPICAL = (2, 16, 8, 64)
SEED = 42


def function() -> tuple[str, Function]:
    """Whose function writes with a stride, and the function."""
    name = f"diffusers {version('diffusers')}"
    try:
        from diffusers.models.transformers.transformer_helios import apply_rotary_emb_transposed
    except ImportError:
        return f"a copy of its maths: {name} has no Helios, 0.37 has", strided_helios
    return name, apply_rotary_emb_transposed


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x [B, S, H, D] and a table [B, S, 2 D] of random numbers, both of the dtype."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(shape, generator=generator)
    table = torch.randn((*shape[:2], 2 * shape[3]), generator=generator)
    return x.to(device, dtype), table.to(device, dtype)


def each_dtype(check: Callable[[torch.dtype], str]) -> str:
    """What a check says in fp32, fp16 and bf16; once where it says the same."""
    said = {name: check(dtype) for name, dtype in DTYPES.items()}
    if len(set(said.values())) == 1:
        return f"{said['fp32']} in {', '.join(said)}"
    return "; ".join(f"{name}: {one}" for name, one in said.items())


def refuses(call: Callable[[], object]) -> str:
    """The name of the error that a call raises, or `no error`."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "no error"


def cases(old: Function, device: str) -> Cells:
    """The eleven cases, each that says no dtype in all three."""

    def compared(shape: tuple[int, ...], dtype: torch.dtype) -> str:
        given = random(shape, dtype, device)
        return differing(stacked_helios(*given), old(*given))

    def holds(fact: Callable[[Tensor, Tensor], bool]) -> str:
        def check(dtype: torch.dtype) -> str:
            x, table = random(TYPICAL, dtype, device)
            return "yes" if fact(x, stacked_helios(x, table)) else "no"

        return each_dtype(check)

    for number, (name, dtype) in enumerate(DTYPES.items(), 1):
        yield f"{number}: {name}, {_named(TYPICAL)}", compared(TYPICAL, dtype)
    for number, shape in enumerate(SHAPES, 4):
        yield f"{number}: {_named(shape)}", each_dtype(partial(compared, shape))
    yield "8: the output is contiguous", holds(lambda x, out: out.is_contiguous())
    yield "9: it has the shape of x", holds(lambda x, out: out.shape == x.shape)
    yield "10: it has the dtype of x", holds(lambda x, out: out.dtype == x.dtype)
    odd = (*TYPICAL[:3], 63)

    def refused(dtype: torch.dtype) -> str:
        given = random(odd, dtype, device)
        return f"{refuses(lambda: stacked_helios(*given))}, {refuses(lambda: old(*given))}"

    yield "11: an odd head_dim, new and old", each_dtype(refused)


def beyond(old: Function, device: str) -> Cells:
    """What the eleven leave out: the tables of the model, which are fp32, and compiled code."""

    def with_real_tables(dtype: torch.dtype) -> str:
        x, table = random(SHAPES[2], torch.float32, device)
        return differing(stacked_helios(x.to(dtype), table), old(x.to(dtype), table))

    yield "fp32 tables, as the model has", each_dtype(with_real_tables)
    compiled = torch.compile(stacked_helios, dynamic=False, fullgraph=True)

    def by_inductor(dtype: torch.dtype) -> str:
        x, table = random(SHAPES[2], torch.float32, device)
        return differing(compiled(x.to(dtype), table), old(x.to(dtype), table))

    yield "the new form compiled, fp32 tables", each_dtype(by_inductor)


def measure(place: Place) -> Cells:
    """Whose function it is, the eleven cases, and two more."""
    name, old = function()
    yield "function with strided writes", name
    yield from cases(old, place.device)
    yield from beyond(old, place.device)


def _named(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


EQUAL = [f"{n}: {name}, {_named(TYPICAL)}" for n, name in enumerate(DTYPES, 1)]
EQUAL += [f"{n}: {_named(shape)}" for n, shape in enumerate(SHAPES, 4)]
ROWS = {
    "function with strided writes": "a copy in the test",
    **dict.fromkeys(EQUAL, "the same bits"),
    "8: the output is contiguous": "yes",
    "9: it has the shape of x": "yes",
    "10: it has the dtype of x": "yes",
    "11: an odd head_dim, new and old": "RuntimeError",
    "fp32 tables, as the model has": "",
    "the new form compiled, fp32 tables": "",
}
SECTION = Section("helios", ROWS, measure)

if __name__ == "__main__":
    main(SECTION)
