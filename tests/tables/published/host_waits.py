"""Section `host_waits`: a causal forward before and after its integers come from the host.

    python -m tests.tables.published.host_waits [--device cuda]

Counts and times are of two chunks: ten forwards, of 40 layers as lingbot-world's model has.
"""

import hashlib
from collections.abc import Mapping
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from tests.tables.published.causal import CausalWan
from tests.tables.published.causal_cache import CausalSize, Host
from tests.tables.published.causal_chunks import Sampler, chunks
from tests.tables.published.clock import Times, clock_of_process, in_turns, number, ratio
from tests.tables.published.section import Cells, Place, Section, each, main
from tests.tables.published.wan import as_served

ITEM, WAIT = "aten::item", "cudaStreamSynchronize"
LAYERS = 40
# A chunk of 3 latent frames: of 128x192 and of 480x832 on a GPU, of 32x48 on a CPU.
SMALL = {
    "cuda": CausalSize(LAYERS, 12, 8960, 3, 8, 12, torch.bfloat16),
    "cpu": CausalSize(LAYERS, 1, 256, 3, 2, 3, torch.float32, text_len=16),
}
LARGE = CausalSize(LAYERS, 12, 8960, 3, 30, 52, torch.bfloat16)


def causal_model(size: CausalSize, device: str) -> CausalWan:
    """A model of seeded random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = CausalWan(size)
    return model.to(size.dtype).eval().requires_grad_(False)


def counted(model: CausalWan, host: Host, device: str) -> dict[str, tuple[int, float]]:
    """Of each operator and call of CUDA in two chunks, how often it ran, and its milliseconds."""
    sampler, kinds = Sampler(host), [ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        chunks(model, sampler, device)
    return {
        event.key: (event.count, event.cpu_time_total / 1e3) for event in profiler.key_averages()
    }


def digest(model: CausalWan, host: Host, device: str) -> str:
    """MD5 of two chunks."""
    made = chunks(model, Sampler(host), device).cpu().numpy()
    return hashlib.md5(made.tobytes()).hexdigest()[:8]


def times_of(model: CausalWan, device: str) -> dict[Host, Times]:
    """Times of two chunks, each way."""
    samplers = {host.name: Sampler(host) for host in Host}
    arms = {n: partial(chunks, model, sampler, device) for n, sampler in samplers.items()}
    times = in_turns(arms, device, rounds=5, warmups=1)
    return {host: times[host.name] for host in Host}


def count_cells(model: CausalWan, device: str) -> Cells:
    """How often each way reads a tensor on the host, and how long that takes."""
    for host in Host:
        found = counted(model, host, device)
        reads, spent = found.get(ITEM, (0, 0.0))
        yield f"`{ITEM}`, {host.value}", f"{reads}"
        yield f"its time, {host.value}, ms", number(spent)
        if device == "cuda":
            yield f"`{WAIT}`, {host.value}", f"{found.get(WAIT, (0, 0.0))[0]}"


def time_cells(times: Mapping[Host, Times], title: str) -> Cells:
    """Times of each way, and what each gains."""
    for host, one in times.items():
        yield f"{title}, {host.value}, ms", str(one)
    yield f"{title}, before / pull request 51", ratio(times[Host.READ], times[Host.PASSED])
    yield f"{title}, before / hoisted", ratio(times[Host.READ], times[Host.HOISTED])


def ours_cell() -> Cells:
    """Reads in a forward of this project's graph, which takes no integer from a tensor."""
    from wanexport.exporter.reference.inputs import forward_inputs
    from wanexport.graphs.config import PRESETS
    from wanexport.graphs.graph import load_graph
    from wanexport.runtime.family import family_of
    from wanexport.runtime.geometry import Geometry

    config, geometry = PRESETS["tiny"].config, Geometry(64, 96, 9)
    graph = load_graph(family_of(config).graph)(config, geometry, torch.float32)
    for parameter in graph.parameters():
        parameter.data.zero_()
    arrays = forward_inputs(config, geometry, 812.0, 0)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        graph(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    reads = sum(e.count for e in profiler.key_averages() if e.key == ITEM)
    yield f"`{ITEM}` in a forward of our graph", f"{reads}"


def first_cells(model: CausalWan, device: str) -> Cells:
    """Rows of the bits, and of what the first chunks of the process take."""
    seconds, digests = [], set()
    for host in (*3 * [Host.READ], Host.PASSED, Host.HOISTED):
        started = clock_of_process(device)()
        digests.add(digest(model, host, device))
        seconds.append(clock_of_process(device)() - started)
    yield "outputs", "the same bits" if len(digests) == 1 else f"differ: {digests}"
    yield "the first two of the process / later ones", f"{seconds[0] / min(seconds[1:3]):.2f}"


def small_cells(model: CausalWan, device: str) -> Cells:
    """Rows of the times where launching bounds."""
    yield from time_cells(times_of(model, device), "two chunks")


def large_cells() -> Cells:
    """Rows of the times at a full size, for a GPU."""
    yield from time_cells(times_of(causal_model(LARGE, "cuda"), "cuda"), "480x832")


def measure(place: Place, small: CausalSize | None = None) -> Cells:
    """Bits, counts and times of a small size; on a GPU times of a full one too."""
    size, device = small or SMALL[place.device], place.device
    yield "model", str(size)
    with as_served(device):
        model = causal_model(size, device)
        steps = [partial(step, model, device) for step in (first_cells, count_cells, small_cells)]
        yield from each(*steps, ours_cell, *([large_cells] if device == "cuda" else []))


def _rows() -> dict[str, str]:
    published = {Host.READ: ("6044", "506"), Host.PASSED: ("434", "1.3"), Host.HOISTED: ("", "")}
    rows = {"model": "40 layers of 5120, 4680 tokens a chunk", "outputs": "the same bits"}
    for host, (reads, spent) in published.items():
        rows |= {f"`{ITEM}`, {host.value}": reads, f"its time, {host.value}, ms": spent}
        rows[f"`{WAIT}`, {host.value}"] = ""
    for title, gained in (("two chunks", "1.119 of a request"), ("480x832", "")):
        rows |= {f"{title}, {host.value}, ms": "" for host in Host}
        rows[f"{title}, before / pull request 51"] = gained
        rows[f"{title}, before / hoisted"] = ""
    rows["the first two of the process / later ones"] = "1.42 of a request (prewarm)"
    return rows | {f"`{ITEM}` in a forward of our graph": ""}


SECTION = Section("host_waits", _rows(), measure)

if __name__ == "__main__":
    main(SECTION)
