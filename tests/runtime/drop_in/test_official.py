"""The official pipelines' protocol: doubles that call their models as the official loops do.

The official repositories need a GPU and flash-attn and cannot be installed here. What their
`generate` does with a model is written down below, around a model that is diffusers'.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from tests.oracles.wan_reference import (
    diffusers_model,
    diffusers_velocity,
    official_state,
    small_config,
    write_official,
)
from tests.quick import slow_but
from tests.runtime.test_denoiser import EchoEngine, record
from wanexport.exporter.build import build
from wanexport.graphs.config import PRESETS
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.drop_in import experts as drop_in
from wanexport.runtime.drop_in.official import CompiledWanModel, patch
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.wan_config import WanConfig

TIMESTEPS = (999, 900, 500, 100)
BOUNDARY = 900  # served by the high-noise expert


class WanModelDouble(torch.nn.Module):
    """The official `WanModel`'s call form around diffusers' model; records where it was moved."""

    def __init__(self, model: WanTransformer3DModel) -> None:
        super().__init__()
        self.model = model
        self.moves: list[str] = []

    def to(self, *place: Any, **options: Any) -> "WanModelDouble":
        self.moves.append(str(place[0]))
        return self

    def cpu(self) -> "WanModelDouble":
        return self.to("cpu")

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        context: Sequence[Tensor],
        seq_len: int,
        clip_fea: Tensor | None = None,
        y: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        assert all(seq_len == latent[0].numel() // 4 for latent in x)
        inputs = list(x) if y is None else [torch.cat(pair) for pair in zip(x, y, strict=True)]
        texts = [torch.cat([c, c.new_zeros(512 - len(c), c.shape[1])]) for c in context]
        velocity = self.model(torch.stack(inputs), t, torch.stack(texts), clip_fea).sample
        return list(velocity.float())


class OneModelPipeline:
    """WanT2V, WanI2V and WanFLF2V of Wan2.1, and WanTI2V of Wan2.2."""

    def __init__(self, model: Any) -> None:
        self.device, self.sp_size = torch.device("cpu"), 1
        self.model = model
        self.model.eval().requires_grad_(False)

    def generate(
        self,
        noise: Tensor,
        context: list[Tensor],
        context_null: list[Tensor],
        *,
        first_frame: Tensor | None = None,
        per_token: bool = False,
        offload_model: bool = True,
        **extras: Any,
    ) -> Tensor:
        """Denoise [C, F, h, w]; extras are `y` and `clip_fea` of image-to-video."""
        seq_len = noise[0].numel() // 4
        mask = torch.ones_like(noise)
        latent = noise
        if first_frame is not None:
            mask[:, 0] = 0
            latent = (1 - mask) * first_frame + mask * latent
        cond = {"context": context, "seq_len": seq_len, **extras}
        uncond = {"context": context_null, "seq_len": seq_len, **extras}
        with torch.no_grad(), synchronization(self.model)():
            for step, timestep in enumerate(torch.tensor(TIMESTEPS)):
                t = torch.stack([timestep])
                if per_token:
                    t = (mask[0][:, ::2, ::2] * t).flatten()[None]
                self.model.to(self.device)
                place = torch.device("cpu") if offload_model else self.device
                positive = self.model([latent.to(self.device)], t=t, **cond)[0].to(place)
                negative = self.model([latent.to(self.device)], t=t, **uncond)[0].to(place)
                latent = euler(latent, negative + 4.0 * (positive - negative), step)
                if first_frame is not None:
                    latent = (1 - mask) * first_frame + mask * latent
            if offload_model:
                self.model.cpu()
        return latent


class TwoModelsPipeline:
    """WanT2V and WanI2V of Wan2.2, which move one model out when the other takes over."""

    def __init__(self, high_noise_model: Any, low_noise_model: Any) -> None:
        self.device, self.sp_size, self.init_on_cpu = torch.device("cpu"), 1, True
        self.high_noise_model = high_noise_model.eval().requires_grad_(False)
        self.low_noise_model = low_noise_model.eval().requires_grad_(False)

    def prepare(self, t: Tensor, offload_model: bool) -> Any:
        names = ["high_noise_model", "low_noise_model"]
        required, other = names if t.item() >= BOUNDARY else reversed(names)
        if offload_model or self.init_on_cpu:
            if next(getattr(self, other).parameters()).device.type == "cuda":
                getattr(self, other).to("cpu")
            if next(getattr(self, required).parameters()).device.type == "cpu":
                getattr(self, required).to(self.device)
        return getattr(self, required)

    def generate(
        self,
        noise: Tensor,
        context: list[Tensor],
        context_null: list[Tensor],
        *,
        offload_model: bool = True,
        **extras: Any,
    ) -> Tensor:
        latents, seq_len = [noise], noise[0].numel() // 4
        cond = {"context": [context[0]], "seq_len": seq_len, **extras}
        uncond = {"context": context_null, "seq_len": seq_len, **extras}
        waits = [synchronization(m) for m in (self.low_noise_model, self.high_noise_model)]
        with torch.no_grad(), waits[0](), waits[1]():
            for step, timestep in enumerate(torch.tensor(TIMESTEPS)):
                t = torch.stack([timestep])
                model = self.prepare(timestep, offload_model)
                positive = model(latents, t=t, **cond)[0]
                negative = model(latents, t=t, **uncond)[0]
                latents = [euler(latents[0], negative + 4.0 * (positive - negative), step)]
            if offload_model:
                self.low_noise_model.cpu()
                self.high_noise_model.cpu()
        return latents[0]


def synchronization(model: Any) -> Any:
    """How the official loops ask for FSDP's context, which other models need not have."""

    def nothing() -> AbstractContextManager[None]:
        return nullcontext()

    return getattr(model, "no_sync", nothing)


def euler(latent: Tensor, velocity: Tensor, step: int) -> Tensor:
    """The schedulers are the pipeline's own; any will do."""
    sigmas = [*(t / 1000 for t in TIMESTEPS), 0.0]
    return latent + (sigmas[step + 1] - sigmas[step]) * velocity


def pipeline_of(models: Sequence[WanTransformer3DModel]) -> Any:
    doubles = [WanModelDouble(model) for model in models]
    return OneModelPipeline(*doubles) if len(doubles) == 1 else TwoModelsPipeline(*doubles)


class DiffusersModel(EchoEngine):
    """An engine that is diffusers' model."""

    def __init__(self, model: WanTransformer3DModel, config: WanConfig) -> None:
        self.model, self.config = model, config

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray],
        weights: Any = None,
        memory: Any = None,
        moment: str = "step",
    ) -> np.ndarray:
        return diffusers_velocity(self.model, self.config, dict(inputs))


def open_denoiser(preset: str) -> tuple[Denoiser, list[WanTransformer3DModel]]:
    """A denoiser of a small model whose engines are diffusers', and these."""
    config = small_config(preset, num_layers=1)
    experts = PRESETS[preset].experts or ("",)
    models = [diffusers_model(config, seed) for seed in range(len(experts))]
    engines = {
        expert: DiffusersModel(model, config) for expert, model in zip(experts, models, strict=True)
    }
    return Denoiser(record(config, PRESETS[preset].experts), engines), models


def inputs_of(denoiser: Denoiser, rng: np.random.Generator) -> dict[str, Any]:
    """What the parts before the loop give it: noise, texts of their own lengths, image latents."""

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    shapes = {name: spec.shape for name, spec in denoiser.inputs.items()}
    given: dict[str, Any] = {
        "noise": normal(*shapes["latent"][1:]),
        "context": [normal(7, 4096)],
        "context_null": [normal(126, 4096)],
    }
    if "condition" in shapes:
        given["y"] = [normal(*shapes["condition"][1:])]
    if "image" in shapes:
        given["clip_fea"] = normal(shapes["image"][1] // 257, 257, 1280)
    return given


@pytest.fixture
def bundles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Denoiser]:
    """The denoisers that `load` gives, by the bundle's name."""
    opened: dict[str, Denoiser] = {}
    monkeypatch.setattr(drop_in, "load", lambda bundle, **options: opened[bundle])
    return opened


@pytest.mark.parametrize(
    "preset",
    slow_but(["t2v-1.3b", "i2v-14b", "flf2v-14b", "t2v-a14b", "i2v-a14b"], "flf2v-14b", "i2v-a14b"),
)
def test_a_patched_pipeline_gives_what_its_own_models_gave(
    preset: str, bundles: dict[str, Denoiser], rng: np.random.Generator
) -> None:
    bundles["bundle"], models = open_denoiser(preset)
    inputs = inputs_of(bundles["bundle"], rng)
    pipeline = pipeline_of(models)
    theirs = pipeline.generate(**inputs)
    assert patch(pipeline, "bundle") is pipeline
    ours = pipeline.generate(**inputs)
    assert (theirs - inputs["noise"]).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("with_image", [False, True])
def test_ti2v_gives_a_timestep_for_each_token(
    with_image: bool, bundles: dict[str, Denoiser], rng: np.random.Generator
) -> None:
    bundles["bundle"], models = open_denoiser("ti2v-5b")
    inputs = inputs_of(bundles["bundle"], rng)
    if with_image:
        inputs["first_frame"] = torch.ones_like(inputs["noise"][:, :1])
    pipeline = pipeline_of(models)
    theirs = pipeline.generate(**inputs, per_token=True)
    ours = patch(pipeline, "bundle").generate(**inputs, per_token=True)
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_engine_of_a_bundle_takes_the_models_place(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    config: WanConfig = small_config("t2v-1.3b", num_layers=1)
    model = diffusers_model(config)
    write_official(tmp_path / "model", official_state(model), config)
    bundle = tmp_path / "bundle"
    build(tmp_path / "model", resolution="64x96", frames=9, dtype="fp32", output=bundle)
    pipeline = pipeline_of([model])
    denoiser = drop_in.open_experts(bundle)[""]
    inputs = inputs_of(denoiser, rng)
    theirs = pipeline.generate(**inputs)
    ours = patch(pipeline, bundle, backend="onnx").generate(**inputs)
    assert isinstance(pipeline.model, CompiledWanModel)
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_pipelines_own_models_leave_the_gpu_before_the_engine_comes(
    bundles: dict[str, Denoiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles["bundle"], models = open_denoiser("t2v-a14b")
    pipeline = pipeline_of(models)
    doubles = [pipeline.high_noise_model, pipeline.low_noise_model]
    seen: list[list[str]] = []

    def load(bundle: Any, **options: Any) -> Denoiser:
        seen.extend(list(double.moves) for double in doubles)
        return bundles[bundle]

    monkeypatch.setattr(drop_in, "load", load)
    patch(pipeline, "bundle")
    assert seen == [["cpu"], ["cpu"]]


@pytest.fixture
def compiled() -> CompiledWanModel:
    return CompiledWanModel(open_denoiser("t2v-1.3b")[0])


def test_every_video_of_a_list_has_its_own_timestep_and_text(
    compiled: CompiledWanModel, rng: np.random.Generator
) -> None:
    one, other = (inputs_of(compiled.denoiser, rng) for _ in range(2))
    first = {"context": one["context"], "t": torch.tensor([999]), "seq_len": 72}
    second = {"context": other["context_null"], "t": torch.tensor([100]), "seq_len": 72}
    alone = [compiled([one["noise"]], **first)[0], compiled([other["noise"]], **second)[0]]
    together = compiled(
        [one["noise"], other["noise"]],
        t=torch.tensor([999, 100]),
        context=[*one["context"], *other["context_null"]],
        seq_len=72,
    )
    assert [v.dtype for v in together] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "padding": (
        {"seq_len": 80},
        "seq_len is 80, engine 64x96x9/onnx-fp32 has 72 tokens: "
        "run without sequence parallelism, which pads them",
    ),
    "another size": (
        {"x": [torch.ones(16, 3, 58, 104)], "seq_len": 4524},
        "latent has shape [1, 16, 3, 58, 104], engine 64x96x9/onnx-fp32 takes [1, 16, 3, 8, 12]: "
        "build an engine with --resolution 464x832 --frames 9",
    ),
    "an image": (
        {"y": [torch.ones(20, 3, 8, 12)], "clip_fea": torch.ones(1, 257, 1280)},
        "engine 64x96x9/onnx-fp32 takes latent, timestep, text: condition, image not expected",
    ),
    "two texts": (
        {"context": [torch.ones(7, 4096)] * 2},
        "context has 2 entries for 1 videos: pass one for each",
    ),
    "two conditions": (
        {"y": [torch.ones(20, 3, 8, 12)] * 2},
        "y has 2 entries for 1 videos: pass one for each",
    ),
    "no video": ({"x": []}, "t has 1 entries for 0 videos: pass one for each"),
    "no image features": (
        {"clip_fea": torch.ones(257, 1280)},
        "clip_fea has shape [257, 1280] for 1 videos: "
        "expected [n * 1, tokens, width], as many images for each",
    ),
    "VACE's control": (
        {"vace_context": [], "vace_context_scale": 1.0},
        "the engine takes no vace_context, vace_context_scale: leave it out",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_the_engine_does_not_take_is_refused(compiled: CompiledWanModel, what: str) -> None:
    changes, message = REFUSALS[what]
    arguments: dict[str, Any] = {
        "x": [torch.ones(16, 3, 8, 12)],
        "t": torch.tensor([500]),
        "context": [torch.ones(7, 4096)],
        "seq_len": 72,
    }
    with pytest.raises(BadRequest) as refusal:
        compiled(**{**arguments, **changes})
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("own", "bundle", "message"),
    [
        (
            "t2v-1.3b",
            "t2v-a14b",
            "OneModelPipeline has model, bundle is for high_noise_model, low_noise_model: "
            "use the pipeline and the bundle of one Wan",
        ),
        (
            "t2v-a14b",
            "t2v-1.3b",
            "TwoModelsPipeline has high_noise_model, low_noise_model, bundle is for model: "
            "use the pipeline and the bundle of one Wan",
        ),
    ],
)
def test_another_number_of_models_is_refused_and_changes_nothing(
    own: str, bundle: str, message: str, bundles: dict[str, Denoiser]
) -> None:
    bundles["bundle"], _ = open_denoiser(bundle)
    pipeline = pipeline_of(open_denoiser(own)[1])
    before = dict(vars(pipeline))
    with pytest.raises(BadRequest) as refusal:
        patch(pipeline, "bundle")
    assert str(refusal.value) == message
    assert vars(pipeline) == before


def test_what_is_no_pipeline_is_refused(bundles: dict[str, Denoiser]) -> None:
    bundles["bundle"], _ = open_denoiser("t2v-1.3b")
    with pytest.raises(BadRequest, match=r"^object has no model, bundle is for model: "):
        patch(object(), "bundle")


def test_sequence_parallelism_is_refused(bundles: dict[str, Denoiser]) -> None:
    bundles["bundle"], models = open_denoiser("t2v-1.3b")
    pipeline = pipeline_of(models)
    pipeline.sp_size = 4
    with pytest.raises(BadRequest, match="one GPU: make the pipeline without sequence"):
        patch(pipeline, "bundle")
    assert isinstance(pipeline.model, WanModelDouble)
