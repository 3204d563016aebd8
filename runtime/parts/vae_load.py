"""Open a bundle's VAE engine by itself: for latents that another program denoises."""

from pathlib import Path

from wanexport.runtime.bundle.manifest import VAE, EngineRecord, Manifest, read_manifest
from wanexport.runtime.engines.device_name import check_device, device_kind
from wanexport.runtime.errors import BadRequest, BundleError, refuse_empty
from wanexport.runtime.geometry import Resolution, parse_resolution
from wanexport.runtime.parts.vae_choice import best_first, why_not
from wanexport.runtime.parts.vae_engine import VaeEngine, open_vae_engine


def load_vae(
    bundle: str | Path,
    *,
    device: str | None = None,
    resolution: Resolution | None = None,
    frames: int | None = None,
) -> VaeEngine:
    """Open the VAE engine of a bundle that fits; what is None is free.

    device is `cpu`, `cuda` or `cuda:1`, by default a GPU where an engine is for one; frames only
    chooses between engines: each serves any number. Raises BadRequest when none or several sizes
    fit, BundleError when none runs here, EngineFailure when the device has too little memory.
    """
    refuse_empty(bundle=bundle)
    bundle, manifest = Path(bundle), read_manifest(Path(bundle))
    kind = None if device is None else device_kind(check_device(device))
    size = None if resolution is None else parse_resolution(resolution)
    fitting = [
        engine
        for engine in manifest.engines
        if engine.role == VAE
        and kind in (None, engine.target.get("device"))
        and size in (None, (engine.geometry.height, engine.geometry.width))
    ]
    _check_one_size(bundle, manifest, fitting)
    refusals = []
    for engine in sorted(fitting, key=lambda engine: best_first(engine, frames)):
        place = device or engine.target.get("device", "")
        reason = why_not(bundle, manifest, engine, place)
        if not reason:
            return open_vae_engine(bundle, engine, place)
        refusals.append(reason)
    raise BundleError("; ".join(refusals))


def _check_one_size(bundle: Path, manifest: Manifest, fitting: list[EngineRecord]) -> None:
    """Raise BadRequest unless there are engines, all for one size of picture."""
    held = ", ".join(e.name for e in manifest.engines if e.role == VAE) or "none"
    if not fitting:
        raise BadRequest(
            f"{bundle} has no such engine of a VAE; it holds {held}: add one with wanexport build "
            f"--parts"
        )
    if len({(e.geometry.height, e.geometry.width) for e in fitting}) > 1:
        raise BadRequest(f"{bundle} holds several sizes ({held}): name the resolution")
