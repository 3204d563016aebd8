"""What the denoiser accepts, and how it says no."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime.arrays import Array, is_torch, to_numpy
from wanexport.runtime.bundle.details import OnnxDetails
from wanexport.runtime.bundle.manifest import DENOISER, EngineRecord
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import CLOSED, Memory
from wanexport.runtime.errors import BadRequest, EngineFailure
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import EXPERTS, WanConfig


def record(config: WanConfig, experts: tuple[str, ...] = ()) -> EngineRecord:
    """An ONNX engine of a model at 3 latent frames of 4 x 6 tokens, or 2 x 3 of the 5B."""
    geometry = Geometry(64, 96, 9, family_of(config).vae.spatial_stride)
    return EngineRecord(
        backend="onnx",
        role=DENOISER,
        family=config.family,
        dtype="fp32",
        geometry=geometry,
        program=program_of(config, geometry).whole(),
        details=OnnxDetails(),
        sampling=sampling_defaults(config, experts, geometry),
        files={},
        layout="",
        key="",
        target={"device": "cpu"},
    )


class EchoEngine:
    """An engine that returns the latent and keeps its inputs."""

    device = "cpu"
    inputs: Mapping[str, np.ndarray]
    is_open = True

    def array(self, value: Array) -> np.ndarray:
        return to_numpy(value)

    def memory(self) -> Memory:
        return Memory()

    def use(self, weights: PinnedFile) -> None: ...

    def close(self) -> None:
        self.is_open = False

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> np.ndarray:
        if not self.is_open:
            raise EngineFailure(CLOSED)
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
    with pytest.raises(BadRequest, match=r"expected from 0 to 1000, a sigma times 1000$"):
        model(**{**inputs_of(model), "timestep": value})


def test_text_without_a_row_is_refused() -> None:
    model, _ = denoiser()
    for text in (np.ones((0, 4096), np.float32), torch.ones(1, 0, 4096)):
        with pytest.raises(BadRequest, match="no row: expected one for each token"):
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
    with pytest.raises(BadRequest, match="condition not expected"):
        model(**inputs_of(model), condition=np.zeros(1))
    model, _ = denoiser("i2v-14b")
    inputs = inputs_of(model)
    with pytest.raises(BadRequest, match="condition, image missing"):
        model(latent=inputs["latent"], timestep=1, text=inputs["text"])


def test_a_text_over_512_rows_is_refused() -> None:
    model, _ = denoiser()
    with pytest.raises(BadRequest, match="513 rows, the model takes at most 512"):
        model(**{**inputs_of(model), "text": np.zeros((513, 4096), np.float32)})


def test_a_text_of_another_width_is_refused() -> None:
    model, _ = denoiser()
    with pytest.raises(BadRequest, match="text has shape"):
        model(**{**inputs_of(model), "text": np.zeros((5, 1024), np.float32)})


def test_wrong_channels_are_not_blamed_on_the_geometry() -> None:
    model, _ = denoiser()
    latent = np.zeros((1, 48, 3, 8, 12), np.float32)
    with pytest.raises(BadRequest, match=r"\[1, 16, 3, 8, 12\]$"):
        model(**{**inputs_of(model), "latent": latent})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["latent", "timestep", "text"])
def test_inputs_that_are_not_finite_are_refused(name: str, value: float) -> None:
    model, _ = denoiser()
    inputs = inputs_of(model)
    bad = np.array(inputs[name], np.float32)
    bad.flat[0] = value
    with pytest.raises(BadRequest, match=f"{name} has 1 values that are NaN or Inf"):
        model(**{**inputs, name: bad})


def test_an_expert_by_itself_serves_all_timesteps() -> None:
    engines = {name: EchoEngine() for name in EXPERTS}
    low = Denoiser(record(PRESETS["t2v-a14b"].config, EXPERTS), engines).only("low_noise")
    for timestep in (1000.0, 875.0, 1.0):
        low(**{**inputs_of(low), "timestep": timestep})
        assert engines["low_noise"].inputs["timestep"] == timestep
    assert not hasattr(engines["high_noise"], "inputs")


def test_a_closed_denoiser_says_so() -> None:
    engines = {name: EchoEngine() for name in EXPERTS}
    model = Denoiser(record(PRESETS["t2v-a14b"].config, EXPERTS), engines)
    model.close()
    for timestep in (900.0, 100.0):
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            model(**{**inputs_of(model), "timestep": timestep})


def test_weights_that_lie_inside_an_engine_cannot_be_changed() -> None:
    model, _ = denoiser()
    assert model.weights == ""
    with pytest.raises(BadRequest, match="holds its weights inside and cannot change them"):
        model.use("style")
