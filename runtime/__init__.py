"""Run Wan bundles: `load` an engine and `sample` with it, or put prompts to a `Pipeline`.

Importing this needs neither PyTorch nor the exporter.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
)
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import load
from wanexport.runtime.program import TensorSpec
from wanexport.runtime.sample import Step, denoise, sample, seeded_noise

__all__ = [
    "BadRequest",
    "BundleError",
    "Denoiser",
    "EngineFailure",
    "Geometry",
    "Pipeline",
    "Step",
    "TensorSpec",
    "WanExportError",
    "WanExportWarning",
    "denoise",
    "load",
    "sample",
    "seeded_noise",
    "write_video",
]

if TYPE_CHECKING:
    from wanexport.runtime.serving.pipeline import Pipeline
    from wanexport.runtime.serving.video import write_video
else:  # where a type checker would believe that any name is here
    # What an engine alone does not need is imported when it is first asked for.
    _LATER = {
        "Pipeline": "wanexport.runtime.serving.pipeline",
        "write_video": "wanexport.runtime.serving.video",
    }

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_LATER[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})
