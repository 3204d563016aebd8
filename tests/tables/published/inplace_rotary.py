"""Section `inplace_rotary`: a fused rotation of query and key in place.

    python -m tests.tables.published.inplace_rotary [--device cuda]

On a GPU the kernels are Triton's; on a CPU, which Triton does not compile for, Inductor's.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.tables.published.clock import in_turns, number, ratio, share
from tests.tables.published.machine import copy_rate
from tests.tables.published.rope_forms import both, differing, stacked
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

Given = tuple[Tensor, Tensor, Tensor, Tensor]
Both = Callable[..., tuple[Tensor, Tensor]]

TITLES = {
    "eager": "eager stack + flatten",
    "compiled": "compiled stack + flatten",
    "compiled in place": "compiled, in place",
    "two launches": "Triton, new tensors, two launches",
    "in place": "Triton, in place, one launch",
}
PUBLISHED_SIZE = (1, 176_400, 40, 128)  # of query and of key, fp16


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Stack and flatten, of query and key."""
    return both(stacked)(q, k, cos, sin)


def into_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same, written over query and key."""
    new_q, new_k = eager(q, k, cos, sin)
    return q.copy_(new_q), k.copy_(new_k)


def half(table: Tensor, first: int) -> Tensor:
    """A table with each value once, of one with each twice."""
    return table[..., first::2].contiguous()


def forms(device: str) -> dict[str, Both]:
    """What is measured on a device, by name; each takes diffusers' tables."""
    found: dict[str, Both] = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False, fullgraph=True),
        "compiled in place": torch.compile(into_place, dynamic=False, fullgraph=True),
    }
    return found | (triton_forms() if device == "cuda" else {})


def triton_forms() -> dict[str, Both]:
    """The kernels with the tables halved once, before they are timed."""
    from tests.tables.published.inplace_kernels import rotate_in_place, rotate_new

    halves: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def halved(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        key = (cos.data_ptr(), sin.data_ptr())
        if key not in halves:
            halves[key] = half(cos, 0), half(sin, 1)
        return halves[key]

    def two(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        tables = halved(cos, sin)
        return rotate_new(q, *tables), rotate_new(k, *tables)

    def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_in_place(q, k, *halved(cos, sin))

    return {"two launches": two, "in place": in_place}


def bits(found: dict[str, Both], given: Given) -> str:
    """Each form's query against that of eager code; those in place get copies."""
    q, k, *tables = given
    right = found["eager"](q, k, *tables)[0]
    said = (
        f"{name}: {differing(form(q.clone(), k.clone(), *tables)[0], right)}"
        for name, form in found.items()
        if name != "eager"
    )
    return "; ".join(said)


def alone_cells(found: dict[str, Both], given: Given, device: str) -> Cells:
    """Rows of the rotation by itself. What is in place turns on and on: values do not grow."""
    q, k, *tables = given
    arms = {name: partial(form, q, k, *tables) for name, form in found.items()}
    times = in_turns(arms, device)
    for name, one in times.items():
        yield f"{TITLES[name]}, ms", str(one)
    floor = 4 * q.numel() * q.element_size() / copy_rate(device) * 1e3
    yield "bytes read and written once, ms", number(floor)
    yield "compiled / compiled in place", ratio(times["compiled"], times["compiled in place"])
    if "in place" in times:
        yield "eager / Triton in place", ratio(times["eager"], times["in place"])
        yield "two launches / in place", ratio(times["two launches"], times["in place"])


def published_size_cells() -> Cells:
    """Both kernels at the size that was published."""
    generator = torch.Generator("cuda").manual_seed(2)
    q, k = (
        torch.randn(PUBLISHED_SIZE, generator=generator, device="cuda", dtype=torch.float16)
        for _ in range(2)
    )
    angles = torch.randn((1, PUBLISHED_SIZE[1], 1, 64), generator=generator, device="cuda")
    tables = (angles.cos(), angles.sin())
    from tests.tables.published.inplace_kernels import rotate_in_place, rotate_new

    arms = {
        "new": lambda: (rotate_new(q, *tables), rotate_new(k, *tables)),
        "in place": lambda: rotate_in_place(q, k, *tables),
    }
    times = in_turns(arms, "cuda")
    yield "published size, two launches, ms", str(times["new"])
    yield "published size, in place, ms", str(times["in place"])
    yield "published size, two launches / in place", ratio(times["new"], times["in place"])


def ours_cells(given: Given) -> Cells:
    """The kernel of our engine's block, which norms query and key as well."""
    from wanexport.graphs.kernels import rms_norm_rope

    q, k = (x.flatten(2) for x in given[:2])
    weight = torch.ones(q.shape[-1], device="cuda")
    tables = half(given[2], 0), half(given[3], 1)
    times = in_turns({"ours": lambda: rms_norm_rope(q, k, weight, weight, *tables, 1e-6)}, "cuda")
    yield "our engine's RMSNorm and rotation, ms", str(times["ours"])


def forward_cells(size: Size, device: str, found: dict[str, Both], one: Given) -> Cells:
    """Rows of a forward of diffusers' model with each rotation."""
    (part,) = in_turns({"eager": partial(eager, *one)}, device).values()
    name = "in place" if "in place" in found else "compiled in place"
    kinds = {"eager": found["eager"], "in place": found[name]}
    models = {kind: put(denoiser(size, device), form) for kind, form in kinds.items()}
    given = inputs(size, device)
    arms = {kind: partial(model, **given) for kind, model in models.items()}
    times = in_turns(arms, device, rounds=5, warmups=1)
    yield "forward, stack + flatten, ms", str(times["eager"])
    yield "forward, in place, ms", str(times["in place"])
    yield "rotations in a forward", share(part, times["eager"], size.layers)
    yield "forward, stack + flatten / in place", ratio(*times.values())


def measure(place: Place, size: Size | None = None) -> Cells:
    """The forms alone, the kernels at the published size, and a forward."""
    size = size or SIZES[place.device]
    yield "query and key", f"{size}; {size.layers} blocks"
    with as_served(place.device):
        given = query_and_key(size, place.device)
        found = forms(place.device)
        yield "bits, against eager", bits(found, given)
        steps: list[Callable[[], Cells]] = [partial(alone_cells, found, given, place.device)]
        if place.device == "cuda":
            steps += [published_size_cells, partial(ours_cells, given)]
        yield from each(*steps, partial(forward_cells, size, place.device, found, given))


ROWS = {
    "query and key": "176400 tokens, 40 heads of 128, fp16 (MI355)",
    "bits, against eager": "SSIM of the video 0.866",
    **dict.fromkeys((f"{title}, ms" for title in TITLES.values()), ""),
    "bytes read and written once, ms": "",
    "compiled / compiled in place": "",
    "eager / Triton in place": "",
    "two launches / in place": "",
    "published size, two launches, ms": "2.922",
    "published size, in place, ms": "1.335",
    "published size, two launches / in place": "2.19",
    "our engine's RMSNorm and rotation, ms": "",
    "forward, stack + flatten, ms": "115.14 s, all steps",
    "forward, in place, ms": "114.68 s, all steps",
    "rotations in a forward": "",
    "forward, stack + flatten / in place": "1.004",
}
SECTION = Section("inplace_rotary", ROWS, measure)

if __name__ == "__main__":
    main(SECTION)
