"""The eager engine: streamed or resident, the same velocity; the cut's names."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracles.wan_reference import VARIANTS, small_config, small_geometry
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.checkpoint import SourceTensor
from wanexport.graphs.weights import RandomWeights, bundle_tensors, write_weights
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.wan_config import WanConfig


def tensors_of(config: WanConfig, folder: Path, dtype: str = "fp32") -> dict[str, SourceTensor]:
    path = folder / f"{dtype}.safetensors"
    write_weights(path, config, dtype, RandomWeights(config, 0, ""))
    return bundle_tensors(path, {name: name for name in parameter_shapes(config)})


@pytest.mark.parametrize("preset", VARIANTS)
def test_streamed_is_bit_equal_to_resident(preset: str, tmp_path: Path) -> None:
    config = small_config(preset, num_layers=1)
    geometry = small_geometry(config)
    tensors = tensors_of(config, tmp_path, "bf16")
    inputs = forward_inputs(config, geometry, 812.0, 0)
    resident = EagerEngine(config, geometry, "fp32", tensors)
    streamed = EagerEngine(config, geometry, "fp32", tensors, resident=False)
    for _ in range(2):
        np.testing.assert_array_equal(streamed(inputs), resident(inputs))
    assert {parameter.device.type for parameter in streamed.model.parameters()} == {"meta"}


def test_weights_are_rounded_before_they_are_widened(tmp_path: Path) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    geometry = small_geometry(config)
    inputs = forward_inputs(config, geometry, 812.0, 0)
    tensors = tensors_of(config, tmp_path)
    rounded = EagerEngine(config, geometry, "fp32", tensors, rounded="bf16")(inputs)
    converted = EagerEngine(config, geometry, "fp32", tensors_of(config, tmp_path, "bf16"))(inputs)
    np.testing.assert_array_equal(rounded, converted)
    exact = EagerEngine(config, geometry, "fp32", tensors)(inputs)
    assert 1e-4 < relative_l2(rounded, exact) < 1e-2


def test_policy_dtypes_are_kept(tmp_path: Path) -> None:
    config = small_config("i2v-14b", num_layers=1)
    engine = EagerEngine(config, small_geometry(config), "bf16", tensors_of(config, tmp_path))
    dtypes = {name: parameter.dtype for name, parameter in engine.model.named_parameters()}
    assert dtypes["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.modulation"] == dtypes["head.head.weight"] == torch.float32


@pytest.mark.parametrize("name", ["blocks.0.ffn.2.bias", "head.modulation"])
def test_a_reference_is_not_computed_with_nan_or_what_its_rounding_makes_infinite(
    name: str, tmp_path: Path
) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    geometry = small_geometry(config)
    tensors = tensors_of(config, tmp_path)
    values = np.memmap(tensors[name].file, "<f4", "r+", tensors[name].entry.offset, (8,))
    values[3] = 1e5
    EagerEngine(config, geometry, "fp32", tensors)
    if name == "blocks.0.ffn.2.bias":  # the modulation stays fp32
        with pytest.raises(WanExportError, match=rf"{name} has values beyond fp16's 65504 \(1 of"):
            EagerEngine(config, geometry, "fp32", tensors, rounded="fp16")
        with pytest.raises(WanExportError, match=f"{name} has values beyond fp16"):
            DiffusersEngine(config, geometry, "fp32", tensors, rounded="fp16")
    values[3] = np.nan
    for engine in (EagerEngine, DiffusersEngine):
        with pytest.raises(WanExportError, match=f"{name} has 1 NaN and 0 infinite of"):
            engine(config, geometry, "fp32", tensors)
