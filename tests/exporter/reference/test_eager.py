"""The eager engine: streamed or resident the same velocity; an engine to a denoiser, with state."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exporter.families import memory
from tests.oracles.wan_reference import VARIANTS, small_config, small_geometry
from wanexport.exporter.reference.diffusers import DiffusersEngine
from wanexport.exporter.reference.eager import EagerEngine
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.weights import RandomWeights, bundle_tensors, write_weights
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.errors import EngineFailure, WanExportError
from wanexport.runtime.family import FAMILIES
from wanexport.runtime.wan_config import WanConfig


def tensors_of(
    config: WanConfig, folder: Path, dtype: str = "fp32", seed: int = 0
) -> dict[str, SourceTensor]:
    path = folder / f"{dtype}-{seed}.safetensors"
    write_weights(path, config, dtype, RandomWeights(config, seed, ""))
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


@pytest.mark.parametrize("engine", [EagerEngine, DiffusersEngine])
def test_another_weights_file_replaces_the_first(engine: Any, tmp_path: Path) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    geometry = small_geometry(config)
    inputs = forward_inputs(config, geometry, 812.0, 0)
    first, second = (tensors_of(config, tmp_path, seed=seed) for seed in (0, 1))
    expected = engine(config, geometry, "fp32", second)(inputs)
    opened = engine(config, geometry, "fp32", first)
    own = opened(inputs)
    file = pin(second["head.modulation"].file)
    np.testing.assert_array_equal(opened(inputs, file), expected)
    np.testing.assert_array_equal(opened(inputs), expected)  # what it has then
    opened.use(pin(first["head.modulation"].file))
    np.testing.assert_array_equal(opened(inputs), own)
    opened.close()
    with pytest.raises(EngineFailure, match="closed"):
        opened(inputs)


def test_tensors_give_a_tensor_on_the_device(tmp_path: Path) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    geometry = small_geometry(config)
    inputs = forward_inputs(config, geometry, 812.0, 0)
    engine = EagerEngine(config, geometry, "fp32", tensors_of(config, tmp_path))
    velocity = engine({name: engine.array(value) for name, value in inputs.items()})
    assert isinstance(velocity, torch.Tensor) and velocity.device.type == engine.device == "cpu"
    np.testing.assert_array_equal(velocity.numpy(), engine(inputs))


class Remembering:
    """An eager engine of the family with state, and how often its text was read."""

    def __init__(self, folder: Path, *, resident: bool = True) -> None:
        self.config = replace(small_config("t2v-1.3b"), family="memory")
        geometry = small_geometry(self.config)
        self.inputs = forward_inputs(self.config, geometry, 812.0, 0)
        self.tensors = tensors_of(self.config, folder)
        self.engine = EagerEngine(self.config, geometry, "fp32", self.tensors, resident=resident)
        self.reads = 0
        graph: Any = self.engine.model
        read_text = graph.read_text

        def counted(**given: torch.Tensor) -> Mapping[str, torch.Tensor]:
            self.reads += 1
            found: Mapping[str, torch.Tensor] = read_text(**given)
            return found

        graph.read_text = counted


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Remembering:
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    return Remembering(tmp_path)


def test_a_session_keeps_its_state_and_reads_its_text_once(remembering: Remembering) -> None:
    engine, inputs = remembering.engine, remembering.inputs
    kept, other = engine.memory(), engine.memory()
    assert {name: tuple(t.shape) for name, t in kept.state.items()} == {
        "memory.0": (1, 256), "memory.1": (1, 256),
    }  # fmt: skip
    first, second = (engine(inputs, memory=kept) for _ in range(2))
    assert remembering.reads == 1
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(engine(inputs, memory=other), first)  # it begins anew
    np.testing.assert_array_equal(engine(inputs), first)  # without a session all runs
    assert remembering.reads == 3


def test_other_weights_have_the_text_read_again(remembering: Remembering, tmp_path: Path) -> None:
    engine, kept = remembering.engine, remembering.engine.memory()
    engine(remembering.inputs, memory=kept)
    other = pin(tensors_of(remembering.config, tmp_path, seed=1)["head.modulation"].file)
    for _ in range(2):
        engine(remembering.inputs, other, kept)
    assert remembering.reads == 2


def test_a_streamed_engine_keeps_state_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FAMILIES, "memory", memory.FAMILY)
    streamed, resident = (Remembering(tmp_path, resident=r) for r in (False, True))
    memories = [own.engine.memory() for own in (streamed, resident)]
    for _ in range(2):
        one, other = (
            own.engine(own.inputs, memory=kept) for own, kept in zip((streamed, resident), memories)
        )
        np.testing.assert_array_equal(one, other)
