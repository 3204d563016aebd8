"""Run Wan bundles: `load` an engine, `sample` with it. Needs neither PyTorch nor the exporter."""

from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import load
from wanexport.runtime.program import TensorSpec
from wanexport.runtime.sample import Step, denoise, sample

__all__ = [
    "Denoiser",
    "Geometry",
    "Step",
    "TensorSpec",
    "WanExportError",
    "denoise",
    "load",
    "sample",
]
