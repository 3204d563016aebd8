"""Eager PyTorch as an engine: what every compiled engine is compared with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wanexport.graphs.config import WanConfig
from wanexport.graphs.model import WanModel
from wanexport.graphs.signature import parameter_shapes
from wanexport.graphs.weights import DTYPES, load_weights
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.load import WEIGHTS_FILE
from wanexport.runtime.tensorfile import read_header


class EagerEngine:
    """The graph in eager PyTorch on the CPU, with the weights of a folder; fp32 arrays in and out.

    Weights of another dtype than the graph's are cast: a reference in fp32 upcasts bf16 weights.
    `tensors` maps the model's parameter names to names in the file.
    """

    def __init__(
        self,
        config: WanConfig,
        geometry: Geometry,
        dtype: str,
        weights_folder: Path,
        tensors: Mapping[str, str],
    ) -> None:
        with torch.device("meta"):
            self.model = WanModel(config, geometry, DTYPES[dtype])
        wanted = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        file = weights_folder / WEIGHTS_FILE
        state = load_weights(file, read_header(file), tensors)
        self.model.load_state_dict(
            {name: tensor.to(wanted[name]) for name, tensor in state}, assign=True
        )

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run the model and return its velocity."""
        with torch.no_grad():
            output: np.ndarray = self.model(
                **{name: torch.from_numpy(array) for name, array in inputs.items()}
            ).numpy()
        return output


def cut_to_ends(config: WanConfig) -> WanConfig:
    """The config with only the first and the last block."""
    return replace(config, num_layers=min(2, config.num_layers))


def tensors_of_cut(cut: WanConfig, full: WanConfig) -> dict[str, str]:
    """The full model's name for each parameter of the cut, whose last block is the last there."""
    last = (f"blocks.{cut.num_layers - 1}.", f"blocks.{full.num_layers - 1}.")
    return {name: name.replace(*last) for name in parameter_shapes(cut)}
