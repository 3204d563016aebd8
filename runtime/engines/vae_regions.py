"""The packages of a VAE that decode, or those that encode: opened, bound to weights, and run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines import convolution  # noqa: F401 - the operator of the packages
from wanexport.runtime.engines.aoti_regions import BoundRegions, Regions
from wanexport.runtime.engines.device import torch_dtype, zero_state
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.engines.operators import Kernel
from wanexport.runtime.engines.vae_clip import Clip, part_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Call
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import vae_program


class VaeRegions:
    """The opened packages of one part, without weights.

    Raises BundleError when a package cannot be opened, or is not what was pinned.
    """

    def __init__(
        self,
        files: Mapping[str, Path | PinnedFile],
        sizes: VaeConfig,
        geometry: Geometry,
        dtype: str,
        part: str,
        kernels: Mapping[str, Kernel],
        device: torch.device,
    ) -> None:
        self.program = part_of(vae_program(sizes, geometry), part)
        self.sizes, self.part = sizes, part
        self.dtype = torch_dtype(dtype)
        self.regions = Regions(files, self.program, kernels, device)

    def bind(self, tensors: Mapping[str, Tensor]) -> "BoundVae":
        """The packages with weights. Raises BundleError when a parameter is not among them."""
        return BoundVae(self, self.regions.bind(tensors))


class BoundVae:
    """One part with its weights; each clip has a state of its own."""

    def __init__(self, opened: VaeRegions, bound: BoundRegions) -> None:
        self.opened, self.bound = opened, bound

    def clip(self) -> Clip:
        """A clip that has not begun."""
        opened = self.opened
        device = opened.regions.device
        memory = Memory(zero_state(opened.program, opened.dtype, device))

        def run(call: Call, frames: Tensor) -> Mapping[str, Tensor]:
            with opened.regions.lock:
                return self.bound.at(call.when, {call.reads[0]: frames}, memory)

        return Clip(opened.program, opened.sizes, opened.part, run)
