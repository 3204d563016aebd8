"""What the denoiser accepts, and how it says no."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime.arrays import is_torch
from wanexport.runtime.bundle.manifest import EngineRecord, TensorSpec
from wanexport.runtime.bundle.signature import input_shapes
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.machine import memory
from wanexport.runtime.wan_config import EXPERTS, WanConfig


def record(config: WanConfig, experts: tuple[str, ...] = ()) -> EngineRecord:
    geometry = Geometry(64, 96, 9, config.spatial_stride)
    shapes = input_shapes(config, geometry)
    return EngineRecord(
        backend="onnx",
        dtype="fp32",
        geometry=geometry,
        inputs={name: TensorSpec(shape) for name, shape in shapes.items()},
        output=TensorSpec(shapes["latent"]),
        sampling=sampling_defaults(config, experts, geometry),
        files={},
        weights_header_sha256="",
        key="",
        target={},
    )


class EchoEngine:
    """Returns the latent and keeps its inputs."""

    inputs: Mapping[str, np.ndarray]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.inputs = inputs
        return inputs["latent"]


def denoiser(preset: str = "tiny") -> tuple[Denoiser, EchoEngine]:
    engine = EchoEngine()
    return Denoiser(record(PRESETS[preset].config), {"": engine}), engine


def inputs_of(model: Denoiser) -> dict[str, Any]:
    inputs: dict[str, Any] = {n: np.ones(s.shape, np.float32) for n, s in model.inputs.items()}
    return {**inputs, "timestep": 500.0}


def test_text_is_zero_padded_and_may_lack_the_batch() -> None:
    model, engine = denoiser()
    for shape in ((77, 4096), (1, 77, 4096)):
        model(**{**inputs_of(model), "text": np.ones(shape, np.float32)})
        assert engine.inputs["text"].shape == (1, 512, 4096)
        assert engine.inputs["text"][0, :77].all()
        assert not engine.inputs["text"][0, 77:].any()


@pytest.mark.parametrize("value", [500, 500.0, np.float64(500), np.array([500]), torch.tensor(500)])
def test_a_scalar_timestep_is_broadcast(value: Any) -> None:
    model, engine = denoiser("ti2v-5b")
    model(**{**inputs_of(model), "timestep": value})
    np.testing.assert_array_equal(engine.inputs["timestep"], np.full(3, 500, np.float32))


def test_one_timestep_per_frame_is_kept() -> None:
    model, engine = denoiser("ti2v-5b")
    model(**{**inputs_of(model), "timestep": np.array([0, 7, 7])})
    np.testing.assert_array_equal(engine.inputs["timestep"], np.array([0, 7, 7]))


@pytest.mark.parametrize("value", [-1.0, 1000.5, 1e30])
def test_a_timestep_that_no_schedule_has_is_refused(value: float) -> None:
    model, _ = denoiser()
    with pytest.raises(WanExportError, match=r"expected from 0 to 1000, a sigma times 1000$"):
        model(**{**inputs_of(model), "timestep": value})


def test_text_without_a_row_is_refused() -> None:
    model, _ = denoiser()
    for text in (np.ones((0, 4096), np.float32), torch.ones(1, 0, 4096)):
        with pytest.raises(WanExportError, match="no row: expected one for each token"):
            model(**{**inputs_of(model), "text": text})


def test_a_tensor_is_known_by_its_class_and_not_by_where_that_was_written() -> None:
    class Subclass(torch.Tensor):
        """Of a module that is not torch's."""

    assert is_torch(torch.ones(2).as_subclass(Subclass))
    assert not is_torch(torch.ones(2).shape) and not is_torch(torch.float32)
    model, _ = denoiser()
    latent = torch.ones(model.inputs["latent"].shape).as_subclass(Subclass)
    assert torch.equal(model(**{**inputs_of(model), "latent": latent}), torch.ones(latent.shape))


def test_torch_in_torch_out_and_numpy_in_numpy_out() -> None:
    model, engine = denoiser()
    inputs = inputs_of(model)
    assert isinstance(model(**inputs), np.ndarray)
    half = {n: torch.tensor(v).bfloat16() for n, v in inputs.items()}
    velocity = model(**half)
    assert isinstance(velocity, torch.Tensor)
    assert velocity.dtype == torch.float32
    assert all(array.dtype == np.float32 for array in engine.inputs.values())


def test_experts_are_chosen_by_the_boundary() -> None:
    config = PRESETS["t2v-a14b"].config
    engines = {name: EchoEngine() for name in EXPERTS}
    model = Denoiser(record(config, EXPERTS), engines)
    inputs = inputs_of(model)
    model(**{**inputs, "timestep": 875.0, "latent": inputs["latent"] * 1})
    model(**{**inputs, "timestep": 874.0, "latent": inputs["latent"] * 2})
    assert engines["high_noise"].inputs["latent"].max() == 1
    assert engines["low_noise"].inputs["latent"].max() == 2


def test_another_shape_names_both_and_the_build_that_fits() -> None:
    model, _ = denoiser()
    latent = np.zeros((1, 16, 21, 60, 104), np.float32)
    with pytest.raises(ValueError, match=r"\[1, 16, 21, 60, 104\].*\[1, 16, 3, 8, 12\]") as info:
        model(**{**inputs_of(model), "latent": latent})
    assert "--resolution 480x832 --frames 81" in str(info.value)


def test_missing_and_unexpected_inputs_are_named() -> None:
    model, _ = denoiser()
    with pytest.raises(WanExportError, match="condition not expected"):
        model(**inputs_of(model), condition=np.zeros(1))
    model, _ = denoiser("i2v-14b")
    inputs = inputs_of(model)
    with pytest.raises(WanExportError, match="condition, image missing"):
        model(latent=inputs["latent"], timestep=1, text=inputs["text"])


def test_a_text_over_512_rows_is_refused() -> None:
    model, _ = denoiser()
    with pytest.raises(WanExportError, match="513 rows, the model takes at most 512"):
        model(**{**inputs_of(model), "text": np.zeros((513, 4096), np.float32)})


def test_a_text_of_another_width_is_refused() -> None:
    model, _ = denoiser()
    with pytest.raises(WanExportError, match="text has shape"):
        model(**{**inputs_of(model), "text": np.zeros((5, 1024), np.float32)})


def test_wrong_channels_are_not_blamed_on_the_geometry() -> None:
    model, _ = denoiser()
    latent = np.zeros((1, 48, 3, 8, 12), np.float32)
    with pytest.raises(WanExportError, match=r"\[1, 16, 3, 8, 12\]$"):
        model(**{**inputs_of(model), "latent": latent})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["latent", "timestep", "text"])
def test_inputs_that_are_not_finite_are_refused(name: str, value: float) -> None:
    model, _ = denoiser()
    inputs = inputs_of(model)
    bad = np.array(inputs[name], np.float32)
    bad.flat[0] = value
    with pytest.raises(WanExportError, match=f"{name} has 1 values that are NaN or Inf"):
        model(**{**inputs, name: bad})


def test_an_engine_that_needs_more_memory_than_there_is_is_refused() -> None:
    model, _ = denoiser()
    score_bytes = memory.limit_bytes() // 2 + 10**9
    build = {"attention_score_bytes": score_bytes}
    large = Denoiser(replace(model.record, build=build), model.engines)
    with pytest.raises(WanExportError, match=r"needs \d+ GB for attention .* smaller --resolution"):
        large(**inputs_of(model))
