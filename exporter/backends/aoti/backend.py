"""AOTInductor engines: what `build` asks of this backend."""

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from wanexport.exporter.backends.aoti import attention as attention_rule
from wanexport.exporter.backends.aoti import compile as to_aoti
from wanexport.exporter.backends.aoti import compiler
from wanexport.exporter.backends.aoti.flash_attention import (
    compile_flash_attention,
    flash_attention_versions,
)
from wanexport.exporter.backends.aoti.prove import prove_regions
from wanexport.exporter.backends.aoti.vae import compile_vae, prove_vae
from wanexport.exporter.backends.backend import Compiled, Options, Progress, Request, VaeRequest
from wanexport.exporter.child.process import Lifeline
from wanexport.runtime.bundle.details import AotiDetails
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines import aoti_target
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.engines.kernels import KERNELS, check_kernel, kernel_obstacle
from wanexport.runtime.errors import WanExportError, WanExportWarning

ATTENTION = KERNELS
BINDING = aoti_target.BINDING
OPTIONS = None
COMPILES = True
SOURCES = (
    to_aoti.__name__,
    attention_rule.__name__,
    "wanexport.exporter.backends.aoti.flash_attention",
    "wanexport.runtime.engines.flash_attention",
)
_FLASH = "flash_attention"  # the role of its library, and of the note why there is none


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """The precision that runs best there."""
    return "fp32" if device == "cpu" else "bf16"


def libraries(request: Request) -> dict[str, str]:
    """Versions of what compiles the engine, and how Inductor is set in the environment.

    Raises WanExportError when there is no C++ compiler.
    """
    found = {"torch": version("torch"), "compiler": compiler.compiler_version()}
    found |= compiler.inductor_settings()
    if device_kind(request.device) != "cpu":
        found["triton"] = version("triton")
    if _flash_attention_serves(request):
        with suppress(WanExportError):  # not installed
            found |= flash_attention_versions()
    return found


def targets(device: str, options: Options) -> list[dict[str, str]]:
    """What the engine is bound to. Raises WanExportError for a device that is not there."""
    to_aoti.check_compiler(device)
    return [aoti_target.versions(device)]


def check_attention(attention: str | None, dtype: str, target: Mapping[str, str]) -> None:
    """Raise WanExportError when the kernel that is asked for cannot run there, or be compiled."""
    check_kernel(attention, target, dtype)
    if attention == "fa4":
        flash_attention_versions()


def resolve(request: Request) -> Request:
    """The request as it is: a kernel of attention that is not named is found by measurement."""
    return request


def compile_engine(
    folder: Path, request: Request, weights: Mapping[str, Path], progress: Progress
) -> Compiled:
    """Write the packages of the calls, and the FlashAttention kernel where it serves.

    Raises WanExportError when a compiler fails, or the attention kernel asked for cannot be had.
    """

    def show(stage: str, done: int, total: int) -> None:
        progress(f"{request.label}: {stage}", done, total)

    if isinstance(request, VaeRequest):
        return compile_vae(folder, request, show)
    config, geometry = request.config, request.geometry
    # FlashAttention's compiler runs beside Inductor's, and stops when that fails.
    with ThreadPoolExecutor(1) as pool, Lifeline() as line:
        flash = pool.submit(_flash_attention, folder, request, line)
        files, lint, seconds = to_aoti.compile_regions(
            request.graph, config, geometry, request.dtype, request.device, folder, show
        )
        show("compiling FlashAttention-4", 0, 0)
        library, notes = flash.result()
    show("measuring attention", 0, 0)
    kernels, measured = attention_rule.choose_kernels(
        config, geometry, request.dtype, request.device, library, request.attention
    )
    if library is not None:
        files[_FLASH] = library
    return Compiled(
        files=files,
        program=request.program,
        details=AotiDetails(attention=kernels),
        lint=lint,
        build={"compile_seconds": seconds, "attention_seconds": measured, **notes},
        is_whole=_FLASH not in notes,
    )


def _flash_attention(
    folder: Path, request: Request, lifeline: Lifeline
) -> tuple[Path | None, dict[str, Any]]:
    """The compiled kernel and its versions; why there is none, where it would serve, is said."""
    if not _flash_attention_serves(request):
        return None, {}
    try:
        versions = flash_attention_versions()
        library = compile_flash_attention(
            folder,
            dtype=request.dtype,
            head_dim=request.config.head_dim,
            device=request.device,
            lifeline=lifeline,
        )
    except WanExportError as error:
        if request.attention == "fa4":
            raise
        warnings.warn(f"attention will run on cuDNN: {error}", WanExportWarning, stacklevel=2)
        return None, {_FLASH: str(error)}
    return library, versions


def _flash_attention_serves(request: Request) -> bool:
    is_wanted = request.attention in (None, "fa4")
    return is_wanted and not kernel_obstacle("fa4", request.target, request.dtype)


def prove(
    request: Request, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """The figures of the proof. Raises WanExportError when it fails."""
    if isinstance(request, VaeRequest):
        return prove_vae(request, engine, bundle, weights, verify)
    return prove_regions(request, engine, bundle, weights, verify)
