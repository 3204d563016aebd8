"""Section `compiled_norms`: diffusers' Wan with its three norm and element-wise functions compiled.

    python -m tests.tables.published.compiled_norms [--device cuda] [--folder FOLDER]

The 1.3B at 480x832 with 33 frames on a GPU, two of its blocks on a CPU. Beside it, the same model
with whole blocks compiled, and the AOTInductor engine of the same geometry, which is built into
FOLDER where it is not there yet.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.tables.published import norms, wan
from tests.tables.published.bundle import engine_bundle, wan_config
from tests.tables.published.clock import Call, in_turns, ratio
from tests.tables.published.section import Cells, Place, Section, each, main
from tests.tables.published.wan import Size, as_served, denoiser, inputs

SIZES = {
    "cuda": Size(30, 9, 30, 52, torch.bfloat16),
    "cpu": wan.SIZES["cpu"],
}
ARMS = {
    "eager": "0.3381 s a step",
    "the three compiled": "0.3206 s a step",
    "blocks compiled": "",
    "our engine": "",
}


def engine_call(size: Size, place: Place) -> Call:
    """A forward of the engine, with its inputs where it computes."""
    from wanexport.exporter.reference.inputs import forward_inputs
    from wanexport.runtime import load

    opened = load(engine_bundle(size, place), backend="aoti", device=place.device)
    arrays = forward_inputs(wan_config(size), opened.geometry, 812.0, 0)
    given = {name: _placed(array, name, place.device) for name, array in arrays.items()}
    return lambda: opened(**given)


def _placed(array: Any, name: str, device: str) -> Any:
    """An input on the device; the timestep stays on the host."""
    return array if name == "timestep" else torch.from_numpy(array).to(device)


def forwards(size: Size, device: str) -> dict[str, Call]:
    """A forward of each arm of diffusers' model, as an arm of a table."""
    functions = norms.Functions()
    models = {
        "eager": norms.put(denoiser(size, device), functions),
        "the three compiled": norms.put(denoiser(size, device), functions.compiled()),
        "blocks compiled": denoiser(size, device),
    }
    models["blocks compiled"].compile_repeated_blocks(fullgraph=True, dynamic=False)
    given = inputs(size, device)
    return {name: partial(_velocity, model, given) for name, model in models.items()}


def _velocity(model: Any, given: dict[str, Any]) -> Tensor:
    velocity: Tensor = model(**given)[0]
    return velocity


def error(call: Callable[[], object], right: object) -> str:
    """Relative L2 of a forward's velocity against another one."""
    made = call()
    assert isinstance(made, Tensor) and isinstance(right, Tensor)
    return f"{((made.float() - right.float()).norm() / right.float().norm()).item():.1e}"


def diffusers_cells(arms: dict[str, Call], device: str) -> Cells:
    """Rows of diffusers' model in its three arms."""
    right = arms["eager"]()
    for name in ("the three compiled", "blocks compiled"):
        yield f"{name}, against eager, relative L2", error(arms[name], right)
    times = in_turns(arms, device)
    for name, one in times.items():
        yield f"forward, {name}, ms", str(one)
    for name in ("the three compiled", "blocks compiled"):
        yield f"eager / {name}", ratio(times["eager"], times[name])


def engine_cells(eager: Call, size: Size, place: Place) -> Cells:
    """Rows of our engine, in turns with the eager arm."""
    beside = {"eager": eager, "our engine": engine_call(size, place)}
    times = in_turns(beside, place.device)
    yield "forward, our engine, ms", str(times["our engine"])
    yield "eager / our engine", ratio(times["eager"], times["our engine"])


def measure(place: Place, size: Size | None = None) -> Cells:
    """diffusers' three arms in turns; then the engine, beside the eager arm again."""
    size = size or SIZES[place.device]
    yield "model", f"{size}; {size.layers} blocks"
    with as_served(place.device):
        arms = forwards(size, place.device)
        yield from each(
            partial(diffusers_cells, arms, place.device),
            partial(engine_cells, arms["eager"], size, place),
        )


ROWS = {
    "model": "the 1.3B on an H200, size not stated",
    **{f"forward, {name}, ms": step for name, step in ARMS.items()},
    "eager / the three compiled": "1.05",
    "eager / blocks compiled": "",
    "eager / our engine": "",
    "the three compiled, against eager, relative L2": "",
    "blocks compiled, against eager, relative L2": "",
}
SECTION = Section("compiled_norms", ROWS, measure)

if __name__ == "__main__":
    main(SECTION)
