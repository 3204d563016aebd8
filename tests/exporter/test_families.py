"""A new family is a row and a graph: built, proven, sampled and compared without another change."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.exporter.families import camera, memory
from tests.oracles import plain_wan64 as oracle
from wanexport.exporter.build import build
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.inspection import inspect
from wanexport.exporter.reference.inputs import seeded_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.config import PRESETS, Preset
from wanexport.runtime import Geometry, load, sample
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.family import FAMILIES, Family
from wanexport.runtime.wan_config import WanConfig

ROOT = Path(__file__).parents[2]
GEOMETRY = Geometry(64, 96, 9)
PLAIN = WanConfig("t2v", 64, 96, 2, 2, 16, 16, 0, text_dim=32, text_len=16, freq_dim=64)
OWN = {"camera": camera.FAMILY, "memory": memory.FAMILY}
TIMESTEPS, GUIDANCE = (900.0, 600.0, 250.0), 3.0
Forward = Callable[[Tensor, float], Tensor]  # latent and timestep -> velocity, both fp64


@pytest.fixture(scope="module", autouse=True)
def rows() -> Iterator[None]:
    """Each family's row, and the preset by which `build` finds a model of it."""
    # A build's processes import the graph by its name: from here, as it is not installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        for name, family in OWN.items():
            patch.setitem(FAMILIES, name, family)
            patch.setitem(PRESETS, name, Preset(replace(PLAIN, family=name)))
        yield


def _case(family: str, backend: str) -> Any:
    """What is slow compiles."""
    marks = pytest.mark.slow if backend == "aoti" else ()
    return pytest.param((family, backend), marks=marks, id=f"{family}-{backend}")


@pytest.fixture(scope="module", params=[_case(f, b) for f in OWN for b in ("onnx", "aoti")])
def built(
    request: pytest.FixtureRequest, rows: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A family, and a bundle of it with an fp32 engine of one backend for the CPU."""
    family, backend = request.param
    bundle = tmp_path_factory.mktemp(family) / "bundle"
    record = build(
        family, random_weights=0, resolution=(64, 96), frames=9, backends=[backend],
        dtype="fp32", device="cpu", output=bundle,
    )  # fmt: skip
    (engine,) = record["engines"]
    assert engine["family"] == family
    assert engine["proof"]["error"] <= engine["proof"]["gate"] == 1e-5
    assert set(engine["lint"].values()) == {0}
    return family, bundle


def weights_of(bundle: Path) -> dict[str, Tensor]:
    (record,) = read_manifest(bundle).weights.values()
    return oracle.as_fp64(load_arrays(bundle / record.file.path))


def forward_of(family: str, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Forward:
    """One session of a family's model: `text` and what else is constant are given here."""
    attended = oracle.context(weights, inputs["text"], PLAIN.text_len)
    kept = [torch.zeros(PLAIN.dim, dtype=torch.float64) for _ in range(PLAIN.num_layers)]

    def remembered(layer: int, x: Tensor) -> Tensor:
        return x + weights[f"blocks.{layer}.memory_gain"] * kept[layer]

    def remember(layer: int, x: Tensor) -> None:
        kept[layer] = (kept[layer] + x.mean(dim=0)) / 2

    def forward(latent: Tensor, timestep: float) -> Tensor:
        x = oracle.patches(weights, "patch_embedding", latent)
        hooks: dict[str, Any] = {}
        if family == "camera":
            x = x + oracle.patches(weights, "camera_embedding", inputs["camera"])
        else:
            hooks = {"before": remembered, "after": remember}
        return oracle.velocity(
            weights, x, timestep, attended,
            grid=GEOMETRY.grid, heads=PLAIN.num_heads, layers=PLAIN.num_layers, **hooks,
        )  # fmt: skip

    return forward


def exact_latents(family: str, weights: dict[str, Tensor], given: dict[str, Any]) -> list[Tensor]:
    """The latent after each of Euler's steps, in fp64, with guidance."""
    inputs = oracle.as_fp64(given)
    constant = {name: value for name, value in inputs.items() if name not in ("noise", "negative")}
    cond, uncond = (
        forward_of(family, weights, {**constant, "text": inputs[name]})
        for name in ("text", "negative")
    )
    latent, latents = inputs["noise"], []
    sigmas = [*(timestep / 1000 for timestep in TIMESTEPS), 0.0]
    for index, timestep in enumerate(TIMESTEPS):
        toward, away = cond(latent, timestep), uncond(latent, timestep)
        velocity = away + GUIDANCE * (toward - away)
        latent = latent + (sigmas[index + 1] - sigmas[index]) * velocity
        latents.append(latent)
    return latents


def test_sampling_gives_the_familys_own_latents(built: tuple[str, Path]) -> None:
    family, bundle = built
    given = seeded_inputs(PRESETS[family].config, GEOMETRY, seed=3)
    expected = exact_latents(family, weights_of(bundle), given)
    steps = sample(load(bundle), **given, timesteps=TIMESTEPS, guidance=GUIDANCE, solver="euler")
    for step, latent in zip(steps, expected, strict=True):
        assert relative_l2(np.asarray(step.latent), latent.numpy()) <= 1e-5


def test_compare_passes(built: tuple[str, Path]) -> None:
    _, bundle = built
    result = compare(bundle, steps=3)
    assert result["passed"] and len(result["steps"]) == 3
    assert max(row["error"] for row in result["steps"]) <= 1e-5


def test_the_manifest_tells_the_familys_program(built: tuple[str, Path]) -> None:
    family, bundle = built
    (engine,) = read_manifest(bundle).engines
    program = OWN[family].program(PRESETS[family].config, GEOMETRY)
    assert engine.program in (program, program.whole())
    assert not inspect(bundle, verify=True)["problems"]


def test_an_input_of_the_family_is_asked_for(built: tuple[str, Path]) -> None:
    family, bundle = built
    given = seeded_inputs(PRESETS[family].config, GEOMETRY, seed=3)
    given.pop("camera", None)
    steps = sample(load(bundle), **given, timesteps=TIMESTEPS[:1], guidance=1.0)
    if family == "camera":
        with pytest.raises(ValueError, match="camera missing"):
            next(steps)
    else:
        assert np.isfinite(np.asarray(next(steps).latent)).all()


def test_each_row_is_all_that_a_family_adds() -> None:
    plain = FAMILIES["t2v"]
    for family in OWN.values():
        changed = {"program", "parameters", "graph"}
        assert isinstance(family, Family)
        same = set(vars(plain)) - changed
        assert all(getattr(family, name) == getattr(plain, name) for name in same)
