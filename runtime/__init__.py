"""Run Wan bundles: `load` an engine, `sample` with it. Needs neither PyTorch nor the exporter."""

from wanexport.runtime.bundle.manifest import TensorSpec
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import load
from wanexport.runtime.sample import Step, sample

__all__ = ["Denoiser", "Geometry", "Step", "TensorSpec", "WanExportError", "load", "sample"]
