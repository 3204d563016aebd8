"""The graph against diffusers' model: fp32 parity, and bf16 error no larger than diffusers' own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.oracles.wan_reference import (
    VARIANTS,
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    small_geometry,
)
from tests.quick import QUICK_PRESETS, slow_but
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.config import PRESETS
from wanexport.graphs.graph import parameter_dtype
from wanexport.graphs.signature import attention_count, forward_flops
from wanexport.graphs.wan import TimeFeatures, WanModel
from wanexport.runtime.bundle.signature import parameter_shapes, program_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig


def our_velocity(
    model: WanTransformer3DModel,
    config: WanConfig,
    dtype: torch.dtype,
    inputs: dict[str, np.ndarray],
    device: str = "cpu",
) -> np.ndarray:
    ours = WanModel(config, small_geometry(config), dtype)
    ours.load_state_dict(official_state(model))
    ours.to(device)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    with torch.no_grad():
        return ours(**tensors).cpu().numpy()


@pytest.mark.parametrize("timestep", slow_but([999.0, 812.0, 92.0], 999.0))
@pytest.mark.parametrize("preset", VARIANTS)
def test_fp32_velocity_is_diffusers(preset: str, timestep: float) -> None:
    config = small_config(preset)
    model = diffusers_model(config)
    inputs = forward_inputs(config, small_geometry(config), timestep, seed=1)
    ours = our_velocity(model, config, torch.float32, inputs)
    assert relative_l2(ours, diffusers_velocity(model, config, inputs)) <= 1e-5


@pytest.mark.parametrize("preset", VARIANTS)
def test_only_the_sinusoid_differs_from_diffusers(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_fp32(_: TimeFeatures, timestep: torch.Tensor) -> torch.Tensor:
        exponents = -np.log(10000) * torch.arange(128, dtype=torch.float32) / 128
        angles = timestep[:, None] * exponents.exp()
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(TimeFeatures, "forward", in_fp32)
    config = small_config(preset)
    model = diffusers_model(config)
    inputs = forward_inputs(config, small_geometry(config), 999.0, seed=1)
    ours = our_velocity(model, config, torch.float32, inputs)
    assert relative_l2(ours, diffusers_velocity(model, config, inputs)) <= 1e-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("preset", slow_but(VARIANTS, *QUICK_PRESETS))
def test_bf16_error_is_no_larger_than_diffusers(preset: str, device: str, tmp_path: Path) -> None:
    config = small_config(preset, num_layers=4)
    model = diffusers_model(config)
    inputs = forward_inputs(config, small_geometry(config), 812.0, seed=1)
    reference = diffusers_velocity(model, config, inputs)
    ours = relative_l2(our_velocity(model, config, torch.bfloat16, inputs, device), reference)
    model.save_pretrained(tmp_path)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    theirs = relative_l2(diffusers_velocity(half.to(device), config, inputs), reference)
    assert 0 < ours <= theirs


@pytest.mark.parametrize("timestep", [999.0, 937.5, 833.333, 500.0, 0.5, 0.0])
def test_time_features_match_fp64(timestep: float) -> None:
    features = TimeFeatures(256)(torch.tensor([timestep]))[0].double()
    exact_timestep = torch.tensor(timestep, dtype=torch.float32).double()
    angles = exact_timestep * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    exact = torch.cat([angles.cos(), angles.sin()])
    assert (features - exact).abs().max() < 3e-7


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [
        ("t2v-1.3b", 1_418_996_800, 825),
        ("t2v-14b", 14_288_491_584, 1095),
        ("i2v-14b", 16_394_878_784, 1303),
        ("flf2v-14b", 16_395_536_704, 1304),
        ("i2v-a14b", 14_288_901_184, 1095),
        ("ti2v-5b", 4_999_787_712, 825),
    ],
)
def test_parameter_counts_are_the_published_models(
    preset: str, parameters: int, tensors: int
) -> None:
    shapes = parameter_shapes(PRESETS[preset].config)
    assert len(shapes) == tensors
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_precision_policy_is_the_official_one() -> None:
    names = parameter_shapes(small_config("flf2v-14b"))
    fp32 = {n for n in names if parameter_dtype(n, torch.bfloat16) == torch.float32}
    for name in names:
        stays = (
            name.startswith(("time_embedding.", "time_projection.", "head."))
            or name.endswith("modulation")
            or "norm" in name
            or name in ("img_emb.emb_pos", "img_emb.proj.0.weight", "img_emb.proj.0.bias")
            or name in ("img_emb.proj.4.weight", "img_emb.proj.4.bias")
        )
        assert (name in fp32) == stays, name


def test_flops_and_attention_counts() -> None:
    config, geometry = PRESETS["t2v-1.3b"].config, Geometry(480, 832, 81)
    assert forward_flops(config, geometry) == pytest.approx(283e12, rel=0.01)
    assert attention_count(program_of(config, geometry)) == 60
    assert attention_count(program_of(PRESETS["i2v-14b"].config, geometry)) == 120


def test_frames_with_one_timestep_equal_the_scalar_model() -> None:
    config = small_config("ti2v-5b")
    model = diffusers_model(config)
    inputs = forward_inputs(config, small_geometry(config), 700.0, seed=1)
    inputs["timestep"][:] = 700.0
    per_frame = our_velocity(model, config, torch.float32, inputs)
    scalar = diffusers_velocity(model, config, inputs)
    assert relative_l2(per_frame, scalar) <= 1e-5
