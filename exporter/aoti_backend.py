"""AOTInductor engines: what `build` asks of this backend."""

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from wanexport.exporter import attention_rule, to_aoti
from wanexport.exporter.aoti_proof import prove_regions
from wanexport.exporter.flash_attention import compile_flash_attention, flash_attention_versions
from wanexport.exporter.request import Compiled, Progress, Request, TensorRtOptions
from wanexport.graphs import regions
from wanexport.runtime import aoti_engine
from wanexport.runtime.errors import WanExportError, WanExportWarning
from wanexport.runtime.load import KERNELS
from wanexport.runtime.manifest import EngineRecord
from wanexport.runtime.signature import region_parameters

ATTENTION = KERNELS
BINDING = aoti_engine.BINDING


def code(device: str) -> tuple[ModuleType, ...]:
    """What decides an engine's bytes, beside the graph's own code."""
    if device == "cpu":
        return to_aoti, regions
    from wanexport.graphs import fused_block, kernels  # needs Triton

    return to_aoti, regions, fused_block, kernels


def libraries(request: Request) -> dict[str, str]:
    """Versions of what compiles the engine; another kernel of attention makes another engine."""
    found = {"torch": version("torch")}
    if _flash_attention_serves(request):
        with suppress(WanExportError):  # not installed
            found |= flash_attention_versions()
    return found


def targets(device: str, options: TensorRtOptions) -> list[dict[str, str]]:
    """What the engine is bound to. Raises WanExportError for a device that is not there."""
    to_aoti.check_compiler(device)
    return [aoti_engine.versions(device)]


def compile_engine(
    folder: Path, request: Request, weights: Mapping[str, Path], progress: Progress
) -> Compiled:
    """Write the three packages, and the FlashAttention kernel where it serves.

    Raises WanExportError when a compiler fails, or the attention kernel asked for cannot be had.
    """

    def show(stage: str, done: int, total: int) -> None:
        progress(f"{request.label}: {stage}", done, total)

    config, geometry = request.config, request.geometry
    with ThreadPoolExecutor(1) as pool:  # its compiler runs beside Inductor's
        flash = pool.submit(_flash_attention, folder, request)
        files, lint, seconds = to_aoti.compile_regions(
            config, geometry, request.dtype, request.device, folder, show
        )
        show("compiling FlashAttention-4", 0, 0)
        library, notes = flash.result()
    show("measuring attention", 0, 0)
    kernels, measured = attention_rule.choose_kernels(
        config, geometry, request.dtype, request.device, library
    )
    if request.attention:
        kernels[str(geometry.num_tokens)] = request.attention
    if library is not None:
        files["flash_attention"] = library
    return Compiled(
        files=files,
        lint=lint,
        build={"compile_seconds": seconds, "attention_seconds": measured, **notes},
        parameters=region_parameters(config),
        attention=kernels,
    )


def _flash_attention(folder: Path, request: Request) -> tuple[Path | None, dict[str, Any]]:
    """The compiled kernel and its versions; why there is none, where it would serve, is said."""
    wanted = request.attention == "fa4"
    if not _flash_attention_serves(request):
        if wanted:
            raise WanExportError(
                f"FlashAttention-4 is compiled for bf16 or fp16 on Hopper, not {request.dtype} on "
                f"{request.target['arch']}: leave out --attention"
            )
        return None, {}
    try:
        versions = flash_attention_versions()
        library = compile_flash_attention(
            folder, dtype=request.dtype, head_dim=request.config.head_dim
        )
    except WanExportError as error:
        if wanted:
            raise
        warnings.warn(f"attention will run on cuDNN: {error}", WanExportWarning, stacklevel=2)
        return None, {"flash_attention": str(error)}
    return library, versions


def _flash_attention_serves(request: Request) -> bool:
    is_hopper = request.target["arch"].startswith("sm9")
    return is_hopper and request.dtype != "fp32" and request.attention in (None, "fa4")


def prove(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """The figures of the proof. Raises WanExportError when it fails."""
    return prove_regions(request, engine, bundle, weights, verify)
