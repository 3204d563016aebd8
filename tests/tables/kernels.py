"""Print the table of one block's kernels: time, what bounds it, and how near it comes.

    python -m tests.tables.kernels BUNDLE

The bundle's AOTInductor engine runs on a GPU. A kernel's floor is its bytes (each operand once) at
the rate of a large copy, or its FLOPs at that of an 8192 x 8192 product, both of the same run. The
block is called back to back, as in a forward; times are medians of 9 calls.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.weights import DTYPES
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import EngineRecord, read_manifest
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.engines.device import to_device
from wanexport.runtime.engines.operators import attention_kernels
from wanexport.runtime.wan_config import WanConfig

CALLS = 9


class Work(NamedTuple):
    """One kernel of the block: its kind, and FLOPs, or bytes where they bound it."""

    name: str
    kind: str
    flops: float = 0
    bytes: float = 0


def expected(config: WanConfig, record: EngineRecord) -> Iterator[Work]:
    """The kernels of `graphs/fused_block.py`, for a model without image branch."""
    tokens, dim, ffn = record.geometry.num_tokens, config.dim, config.ffn_dim
    n, low = tokens * dim, DTYPES[record.dtype].itemsize
    tables = 2 * tokens * config.head_dim // 2 * 4
    square = 2 * tokens * dim**2
    yield Work("modulation", "inductor", bytes=3 * 6 * dim * 4)
    yield Work("LayerNorm, modulation", "norm", bytes=n * (4 + low))
    yield from (Work(f"product {name}", "product", flops=square) for name in ("q", "k", "v"))
    yield Work("RMSNorm and RoPE of q and k", "rope", bytes=4 * n * low + tables)
    yield Work("self-attention", "attention", flops=4 * tokens**2 * dim)
    yield Work("product o", "product", flops=square)
    yield Work("gate, residual, LayerNorm", "norm", bytes=n * (8 + 2 * low))
    yield Work("product q, cross", "product", flops=square)
    yield Work("RMSNorm of q, cross", "rms", bytes=2 * n * low)
    text = 2 * config.text_len * dim**2
    yield Work("product k, text", "product", flops=text)
    yield Work("RMSNorm of k, text", "inductor", bytes=2 * config.text_len * dim * low)
    yield Work("product v, text", "product", flops=text)
    yield Work("cross-attention", "attention", flops=4 * tokens * config.text_len * dim)
    yield Work("product o, cross", "product", flops=square)
    yield Work("residual, LayerNorm, modulation", "norm", bytes=n * (8 + 2 * low))
    yield Work("product up, GELU", "gelu", flops=2 * tokens * dim * ffn)
    yield Work("product down", "product", flops=2 * tokens * dim * ffn)
    yield Work("gate, residual", "norm", bytes=n * (8 + low))


def kinds(name: str) -> str:
    """What a kernel is, from the name that the profiler gives it."""
    for part, kind in (
        ("gelubias", "gelu"), ("flash_attn", "attention"), ("sdpa", "attention"),
        ("rms_rope", "rope"), ("_rms_kernel", "rms"), ("_norm_kernel", "norm"),
        ("triton_", "inductor"), ("nvjet", "product"), ("gemm", "product"),
    ):  # fmt: skip
        if part in name.lower():
            return kind
    return ""  # memsets and copies of a few bytes


def block_calls(engine: AotiEngine, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A function that calls the compiled block once for every timed call."""
    embed, block, _ = engine.regions.program.calls
    assert engine.weights is not None
    run, tensors = engine.regions.runners, engine.weights.tensors
    with attention_kernels(engine.regions.kernels), torch.no_grad():
        arguments = [tensors[name] for name in embed.parameters]
        arguments += [inputs[name] for name in embed.reads]
        written = dict(zip(embed.writes, run[embed.name].run(arguments)))
    conditioning = [written[name] for name in block.reads[1:]]
    layers = [[tensors[name] for name in names] for names, _ in block.layers()]

    def calls() -> None:
        x = written["x"]
        with attention_kernels(engine.regions.kernels), torch.no_grad():
            for parameters in layers[:CALLS]:
                (x,) = run[block.name].run([*parameters, x, *conditioning])
        torch.cuda.synchronize()

    return calls


def kernel_times(calls: Callable[[], None]) -> list[tuple[str, float]]:
    """Kind and median milliseconds of each kernel of a block, in order."""
    calls()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        calls()
    events = sorted(
        (e for e in profiler.events() or () if e.device_type.name == "CUDA" and kinds(e.name)),
        key=lambda event: event.time_range.start,
    )
    count = len(events) // CALLS
    assert len(events) == count * CALLS, [event.name for event in events]
    rows = [events[i::count] for i in range(count)]
    return [
        (kinds(row[0].name), statistics.median(e.time_range.elapsed_us() for e in row) / 1e3)
        for row in rows
    ]


def milliseconds(call: Callable[[], Any]) -> float:
    """Median GPU time of a call."""
    times = []
    for _ in range(CALLS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def main(bundle: Path) -> None:
    """Print the table in Markdown."""
    config = read_manifest(bundle).config
    denoiser = load(bundle, backend="aoti", device="cuda", cuda_graph=False)
    (engine,) = denoiser.engines.values()
    assert isinstance(engine, AotiEngine)
    arrays = forward_inputs(config, denoiser.geometry, 812.0, 0)
    inputs = {n: to_device(array, engine.regions.device) for n, array in arrays.items()}
    times = kernel_times(block_calls(engine, inputs))
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(torch.bfloat16)
    peak = 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3
    large = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * (1 << 30) / milliseconds(lambda: large[0].copy_(large[1])) * 1e3
    works = list(expected(config, denoiser.record))
    if sorted(kind for kind, _ in times) != sorted(work.kind for work in works):
        sys.exit(f"other kernels than the {len(works)} that were expected: {times}")
    queues = {kind: [w for w in works if w.kind == kind] for kind, _ in times}
    print("| kernel | ms | floor, ms | bound by | time / floor |\n" + "|---" * 5 + "|")
    floors = 0.0
    for kind, taken in times:
        work = queues[kind].pop(0)  # Inductor keeps the order within a kind
        floor = (work.flops / peak if work.flops else work.bytes / bandwidth) * 1e3
        floors += floor
        bound = "FLOPs" if work.flops else "bytes"
        print(f"| {work.name} | {taken:.3f} | {floor:.3f} | {bound} | {taken / floor:.2f} |")
    total = sum(taken for _, taken in times)
    print(f"| all | {total:.3f} | {floors:.3f} | | {total / floors:.2f} |")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: product of 8192 x 8192")
    print(f"at {peak / 1e12:.0f} TFLOP/s, copy at {bandwidth / 1e12:.2f} TB/s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
