"""AOTInductor engines of a VAE: their packages, and their proof.

On a GPU the proof runs the packages as they are. On a CPU, where a frame of full size would take
minutes, it opens them, and compares packages of a small picture: their programs are the same but
for integers of the picture's sides.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.aoti.compile import compile_regions
from wanexport.exporter.backends.aoti.same import compare_programs
from wanexport.exporter.backends.aoti.vae_proof_process import VaeJob
from wanexport.exporter.backends.backend import Compiled, Options, Progress, VaeRequest
from wanexport.exporter.backends.proof import run_in_fresh_process
from wanexport.exporter.child.child import temporary_folder
from wanexport.runtime.bundle.details import VaeDetails
from wanexport.runtime.bundle.manifest import EngineRecord
from wanexport.runtime.engines.device_name import device_kind
from wanexport.runtime.geometry import Geometry

BACKEND = "aoti"
OPTIONS: Options = None
_MOST_TOKENS = 12  # of the picture that a proof on a CPU decodes
_KERNELS = {"cpu": "sdpa", "cuda": "products"}  # of attention; a head is wider than PyTorch's are


def compile_vae(folder: Path, request: VaeRequest, progress: Progress) -> Compiled:
    """Write the packages of the calls. Raises WanExportError when a compiler fails."""
    files, lint, seconds = compile_regions(
        request.graph, request.vae, request.geometry, request.dtype, request.device, folder,
        progress,
    )  # fmt: skip
    kernel = _KERNELS[device_kind(request.device)]
    return Compiled(
        files=files,
        program=request.program,
        details=VaeDetails(request.vae, dict.fromkeys(request.program.attention, kernel)),
        lint=lint,
        build={"compile_seconds": seconds},
    )


def prove_vae(
    request: VaeRequest, engine: EngineRecord, bundle: Path, weights: Sequence[Path], verify: str
) -> dict[str, Any]:
    """The figures of the proof, which runs all layers. Raises WanExportError when it fails."""
    started = time.monotonic()
    files = {role: str((bundle / file.path).resolve()) for role, file in engine.files.items()}
    compared, geometry = files, request.geometry
    differing: Mapping[str, int] = {}
    (file,) = weights
    with temporary_folder() as scratch:
        if request.device == "cpu" and geometry.num_tokens > _MOST_TOKENS:
            geometry = _small(geometry)
            differing = compare_programs(
                request.graph, request.vae, request.dtype, request.geometry, geometry
            )
            packages = compile_regions(
                request.graph, request.vae, geometry, request.dtype, request.device, scratch
            )
            compared = {call: str(path) for call, path in packages.files.items()}
        job = VaeJob(
            config=asdict(request.vae),
            geometry=asdict(geometry),
            dtype=request.dtype,
            device=request.device,
            weights=str(file.resolve()),
            engine=files,
            compared=compared,
            attention=dict(engine.details.attention),
        )
        figures = run_in_fresh_process("aoti.vae_proof_process", job, scratch)
    return {
        **figures,
        "verify": verify,
        "seconds": round(time.monotonic() - started, 2),
        "integers_of_the_grid": differing,
    }


def _small(geometry: Geometry) -> Geometry:
    return geometry.reduced(_MOST_TOKENS)
