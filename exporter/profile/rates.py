"""The rates of this machine that a digest's floors are made of, measured in the same run."""

from functools import partial

from wanexport.exporter.bench.process import product_rates, steady_seconds
from wanexport.exporter.trace.rates import Rates

_COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes: beyond any cache


def rates_here(device: str, dtype: str | None) -> Rates:
    """The best rates of matrix products in a precision, None for no such figure, and of copies.

    On a CPU only products in fp32 are measured.
    """
    import torch

    count = _COPIED[device.partition(":")[0]] // 4
    source, copied = (torch.zeros(count, device=device) for _ in range(2))
    seconds = steady_seconds(partial(copied.copy_, source), device)
    del source, copied
    moved = 2 * 4 * count / seconds  # each byte is read and written
    if dtype is None or (device == "cpu" and dtype != "fp32"):
        return Rates(flops=None, bytes=moved, dtype=None)
    return Rates(flops=max(product_rates(device, dtype).values()), bytes=moved, dtype=dtype)
