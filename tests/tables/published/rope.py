"""Section `rope`: strided writes against stack and flatten, alone and in a forward.

    python -m tests.tables.published.rope [--device cuda]

diffusers' Wan with random weights, the 1.3B at 480x832x81 on a GPU and two of its blocks on a CPU.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.tables.published.clock import Times, in_turns, ratio, share
from tests.tables.published.onnx_forms import ONNX_ROWS, onnx_cells
from tests.tables.published.rope_forms import both, complex_reference, differing, stacked, strided
from tests.tables.published.section import Cells, Place, Section, each, main
from tests.tables.published.wan import (
    SIZES,
    Size,
    as_served,
    denoiser,
    inputs,
    put,
    query_and_key,
)

REQUESTS = "1.25 on an A100, 1.33 on an NPU"
FORMS = {"strided": both(strided), "stack + flatten": both(stacked)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Given = tuple[Tensor, Tensor, Tensor, Tensor]


def bits(given: Given) -> Cells:
    """Whether both forms give the same bits in each dtype, and how far from fp64 they are."""
    equal, errors = [], []
    for dtype in DTYPES:
        x, name = given[0].to(dtype), str(dtype).removeprefix("torch.")
        new, exact = stacked(x, *given[2:]), complex_reference(x, *given[2:])
        equal.append(f"{name}: {differing(new, strided(x, *given[2:]))}")
        errors.append(f"{name}: {((new.double() - exact).norm() / exact.norm()).item():.1e}")
    yield "bits of both forms", "; ".join(equal)
    yield "error against complex fp64, relative L2", "; ".join(errors)


def alone(given: Given, device: str) -> dict[str, Times]:
    """Times of both forms on query and key, eager and compiled."""
    arms: dict[str, Callable[[], object]] = {}
    for name, form in FORMS.items():
        compiled = torch.compile(form, dynamic=False, fullgraph=True)
        arms[name] = partial(form, *given)
        arms[f"{name}, compiled"] = partial(compiled, *given)
    return in_turns(arms, device)


def alone_cells(given: Given, device: str) -> Cells:
    """Rows of the forms by themselves."""
    times = alone(given, device)
    for name, one in times.items():
        yield f"{name}, ms", str(one)
    base, fused = times["strided"], times["stack + flatten, compiled"]
    yield "strided / stack + flatten", ratio(base, times["stack + flatten"])
    yield "the same, both compiled", ratio(times["strided, compiled"], fused)
    yield "strided, eager / stack + flatten, compiled", ratio(base, fused)


def forward_cells(size: Size, device: str, one: Given) -> Cells:
    """Rows of a forward with each form, eager and then with every block compiled."""
    (part,) = in_turns({"strided": partial(FORMS["strided"], *one)}, device).values()
    models = {name: put(denoiser(size, device), form) for name, form in FORMS.items()}
    given = inputs(size, device)
    arms = {name: partial(model, **given) for name, model in models.items()}
    times = in_turns(arms, device, rounds=5, warmups=1)
    yield from ((f"forward, {name}, ms", str(one)) for name, one in times.items())
    yield "strided rotations in a forward", share(part, times["strided"], size.layers)
    yield "forward, strided / stack + flatten", ratio(*times.values())
    for model in models.values():
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    times = in_turns(arms, device, rounds=5)
    yield from ((f"forward, {name}, compiled, ms", str(one)) for name, one in times.items())
    yield "the same, blocks compiled", ratio(*times.values())


def measure(place: Place, size: Size | None = None) -> Cells:
    """The bits, the forms alone, a forward with each, and on a CPU ONNX Runtime."""
    size = size or SIZES[place.device]
    yield "query and key", f"{size}; {size.layers} blocks"
    with as_served(place.device):
        given = query_and_key(size, place.device)
        steps = [
            partial(bits, given),
            partial(alone_cells, given, place.device),
            partial(forward_cells, size, place.device, given),
        ]
        if place.device == "cpu":
            steps.append(partial(onnx_cells, FORMS, size, given, place.folder))
        yield from each(*steps)


ROWS = {
    "query and key": "",
    "bits of both forms": "the same",
    "error against complex fp64, relative L2": "",
    "strided, ms": "",
    "stack + flatten, ms": "",
    "strided / stack + flatten": "",
    "strided, compiled, ms": "",
    "stack + flatten, compiled, ms": "",
    "the same, both compiled": "",
    "strided, eager / stack + flatten, compiled": "",
    "forward, strided, ms": "55 s, 44 s a request",
    "forward, stack + flatten, ms": "44 s, 33 s a request",
    "forward, strided / stack + flatten": REQUESTS,
    "strided rotations in a forward": "",
    "forward, strided, compiled, ms": "",
    "forward, stack + flatten, compiled, ms": "",
    "the same, blocks compiled": "",
} | dict.fromkeys(ONNX_ROWS, "")
SECTION = Section("rope", ROWS, measure)

if __name__ == "__main__":
    main(SECTION)
