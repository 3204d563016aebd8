"""Which of a bundle's engines of its VAE serves a denoiser's engine here; none needs PyTorch."""

import warnings
from pathlib import Path

from wanexport.runtime.bundle.manifest import VAE, EngineRecord, Manifest, read_manifest
from wanexport.runtime.bundle.usable import why_unusable
from wanexport.runtime.engines.choose import machine_refusal
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.errors import WanExportWarning
from wanexport.runtime.machine.memory import physical_bytes
from wanexport.runtime.vae_memory import needed_bytes

_SHARE = 0.75  # of a CPU's memory, more of which the engine may not take
_PREFERRED = ("bf16", "fp16", "fp32")  # on a GPU; on a CPU the last first


def choose_vae_engine(
    bundle: str | Path, denoiser: EngineRecord, device: str
) -> EngineRecord | None:
    """The VAE engine for videos of the denoiser's size on its device; None where there is none.

    It serves any number of frames. Warns when there are such engines, and none can run here. Raises
    BundleError as read_manifest does.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    fitting = [engine for engine in manifest.engines if _serves(engine, denoiser, device)]
    refusals = {}
    for engine in sorted(fitting, key=lambda engine: best_first(engine, denoiser.geometry.frames)):
        reason = why_not(bundle, manifest, engine, device)
        if not reason:
            return engine
        refusals[reason] = engine
    if refusals:
        warnings.warn(
            f"{'; '.join(refusals)}: the VAE runs in eager PyTorch instead, which is slower",
            WanExportWarning,
            stacklevel=2,
        )
    return None


def _serves(engine: EngineRecord, denoiser: EngineRecord, device: str) -> bool:
    own, needed = engine.geometry, denoiser.geometry
    return (
        engine.role == VAE
        and (own.height, own.width) == (needed.height, needed.width)
        and engine.target.get("device") == device_kind(device)
    )


def best_first(engine: EngineRecord, frames: int | None) -> tuple[bool, bool, int]:
    """What sorts first is taken first: on a GPU, and with chunks that suit so many frames."""
    is_gpu = engine.target.get("device") == "cuda"
    order = _PREFERRED if is_gpu else _PREFERRED[::-1]
    precision = order.index(engine.dtype) if engine.dtype in order else len(order)
    return not is_gpu, frames not in (None, engine.geometry.frames), precision


def why_not(bundle: Path, manifest: Manifest, engine: EngineRecord, device: str) -> str:
    """Why an engine of a VAE cannot run on a device here; empty when it can."""
    geometry = engine.geometry
    rebuild = (
        f"wanexport build --parts --resolution {geometry.height}x{geometry.width} "
        f"--frames {geometry.frames} -o {bundle}"
    )
    reason = why_unusable(bundle, manifest, engine) or machine_refusal(engine, device, rebuild)
    return reason or _memory_obstacle(engine, device)


def _memory_obstacle(engine: EngineRecord, device: str) -> str:
    """That this machine can never hold what a call takes, whatever else is in memory."""
    sizes = engine.details.sizes
    needed = needed_bytes(sizes, engine.geometry, engine.dtype, "decode", sizes.decode_chunk)
    room = _room(device)
    if needed <= room:
        return ""
    return (
        f"engine {engine.name} takes {needed / 1e9:.1f} GB to decode, of {room / 1e9:.1f} GB here: "
        f"build it with a smaller --vae-chunk"
    )


def _room(device: str) -> float:
    if device_kind(device) == "cpu":
        return _SHARE * physical_bytes()
    import torch

    total: int = torch.cuda.get_device_properties(torch.device(device)).total_memory
    return total
