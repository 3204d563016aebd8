"""What a TensorRT engine will take, estimated before the work: GPU, host memory and disk.

The host's and the disk's figures are measured on TensorRT for RTX 1.7 and rounded up.
"""

import shutil
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from wanexport.exporter.backends.backend import Request
from wanexport.runtime.bundle.signature import weights_layout
from wanexport.runtime.dtypes import DTYPES
from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.machine.memory import available_bytes

_HOST_BASE, _HOST_PER_BLOCK = 400_000_000, 25_000_000
_PLAN_BASE, _PLAN_PER_BLOCK = 5_000_000, 2_000_000  # with the list of layers
_BAKED_COPIES = 3  # of the weights, in the memory of a build that puts them into the plan


@dataclass(frozen=True)
class Estimate:
    """Bytes that building and running an engine take; gpu holds one expert's weights."""

    gpu: int
    host: int
    disk: int


def estimate(request: Request) -> Estimate:
    """What the request's engine will take."""
    config, itemsize = request.config, DTYPES[request.dtype].itemsize
    _, entries = weights_layout(config, request.dtype)
    weights = sum(entry.size for entry in entries.values())
    # The residual stream and its norm in fp32; then queries, keys, values and output, or the FFN.
    widest = max(4 * config.dim, config.dim + config.ffn_dim)
    activations = request.geometry.num_tokens * (8 * config.dim + itemsize * widest)
    activations += _state_bytes(request, itemsize)
    host = _HOST_BASE + _HOST_PER_BLOCK * config.num_layers
    plans = len(request.program.whole().calls)
    disk = plans * (_PLAN_BASE + _PLAN_PER_BLOCK * config.num_layers)
    return Estimate(
        gpu=weights + activations,
        host=host + (_BAKED_COPIES * weights if request.baked else 0),
        disk=disk + len(request.baked) * weights,
    )


def _state_bytes(request: Request, itemsize: int) -> int:
    """What a session keeps, one layer's as a plan makes it anew, and the new rows of the caches."""
    specs, geometry = request.program.states().values(), request.geometry
    states = [itemsize * prod(spec.shape) for spec in specs]
    kept = geometry.slots * geometry.frame_tokens
    caches = sum(spec.shape[1] == kept for spec in specs)  # the others are of the text
    rows = caches * itemsize * geometry.num_tokens * request.config.dim
    return sum(states) + 2 * max(states, default=0) + rows


def check_room(request: Request, folder: Path, gpu: int | None) -> dict[str, int]:
    """The estimate, for the record. gpu is the memory of the GPU that is the target, if it is here.

    Raises EngineFailure with the figures when memory or disk cannot suffice.
    """
    needed = estimate(request)
    less = "--cache" if request.geometry.chunk else "fewer --frames"
    rooms = {
        "GPU memory": (needed.gpu, gpu, f"choose a smaller --resolution or {less}"),
        "host memory": (needed.host, available_bytes(), "close what else uses it"),
        "disk": (needed.disk, shutil.disk_usage(folder).free, "name a folder elsewhere with -o"),
    }
    for name, (bytes_needed, room, advice) in rooms.items():
        if room is not None and bytes_needed > room:
            raise EngineFailure(
                f"{request.label} needs about {bytes_needed / 1e9:.2f} GB of {name}, there are "
                f"{room / 1e9:.2f} GB: {advice}"
            )
    return asdict(needed)
