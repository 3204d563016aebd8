"""The drop-ins as scripts use a pipeline's model, in diffusers' real pipelines.

The engine is diffusers' own model of the same weights, called for one video at a time.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.oracles.wan_reference import small_config, small_geometry
from tests.quick import slow_but
from tests.runtime.drop_in.test_diffusers_pipeline import Family, picture, run
from tests.runtime.drop_in.test_official import open_denoiser
from tests.runtime.test_denoiser import EchoEngine, inputs_of, record
from wanexport.graphs.config import PRESETS
from wanexport.runtime import arrays
from wanexport.runtime import denoiser as denoiser_module
from wanexport.runtime.arrays import Array
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.drop_in import diffusers as module
from wanexport.runtime.drop_in import experts
from wanexport.runtime.drop_in.diffusers import CompiledWanTransformer
from wanexport.runtime.drop_in.official import CompiledWanModel
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.wan_config import EXPERTS

Open = Callable[[str], tuple[CompiledWanTransformer, Family]]
Model = CompiledWanTransformer | CompiledWanModel


@pytest.fixture
def open_drop_in(monkeypatch: pytest.MonkeyPatch) -> Open:
    """A drop-in, and what runs the diffusers model whose weights it has."""

    def open_one(preset: str) -> tuple[CompiledWanTransformer, Family]:
        denoiser, (model,) = open_denoiser(preset)
        monkeypatch.setattr(module, "transformer_config", lambda bundle: model.config)
        config = small_config(preset, num_layers=1)
        family = Family(config, small_geometry(config), (model,), Path("bundle"))
        return CompiledWanTransformer("bundle", denoiser=denoiser), family

    return open_one


@pytest.fixture(params=["diffusers", "official"])
def model(request: pytest.FixtureRequest, open_drop_in: Open) -> Model:
    if request.param == "official":
        return CompiledWanModel(open_denoiser("t2v-1.3b")[0])
    return open_drop_in("t2v-1.3b")[0]


@pytest.mark.parametrize(
    ("preset", "pictures"),
    slow_but([("t2v-1.3b", 0), ("i2v-14b", 1), ("flf2v-14b", 2)], "t2v-1.3b", "i2v-14b"),
)
def test_one_given_text_serves_all_videos_of_a_prompt(
    preset: str, pictures: int, open_drop_in: Open
) -> None:
    ours, family = open_drop_in(preset)
    rows = torch.randn(2, 1, 512, 4096, generator=torch.Generator().manual_seed(0))
    names = ("image", "last_image")[:pictures]
    options: dict[str, Any] = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": rows[0],
        "negative_prompt_embeds": rows[1],
        "num_videos_per_prompt": 2,
        **{name: picture(family, seed) for seed, name in enumerate(names)},
    }
    theirs = run(family.pipeline(), family, **options)
    latents = run(family.pipeline(transformer=ours), family, **options)
    assert latents[-1].shape[0] == 2 and not torch.equal(*latents[-1])
    for one, other in zip(latents, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_texts_that_videos_cannot_share_are_refused(open_drop_in: Open) -> None:
    ours, family = open_drop_in("t2v-1.3b")
    options = {"prompt": None, "prompt_embeds": torch.ones(2, 512, 4096), "guidance_scale": 1.0}
    said = "encoder_hidden_states has 2 entries for 4 videos: pass one for each, or one for all"
    with pytest.raises(BadRequest, match=said):
        run(family.pipeline(transformer=ours), family, **options, num_videos_per_prompt=2)


def test_what_makes_a_model_ready_finds_it_ready(model: Model) -> None:
    assert model.eval().train(False).requires_grad_(False) is model
    assert model.to("cuda").to(torch.bfloat16).to(device="cpu", dtype=torch.float16) is model
    assert model.cuda().cpu().half().bfloat16().float() is model
    assert not model.training
    for tensor in (next(model.parameters()), dict(model.named_parameters())["engine"]):
        assert (tensor.dtype, tensor.device) == (model.dtype, model.device)
        assert not tensor.requires_grad
    assert sum(tensor.numel() for tensor in model.parameters()) == 0


@pytest.mark.parametrize("train", ["train", "requires_grad_"])
def test_an_engine_cannot_be_trained(train: str, model: Model) -> None:
    with pytest.raises(BadRequest, match=r"no gradients and cannot be trained: train the"):
        getattr(model, train)()


@pytest.mark.parametrize(
    "name",
    [
        "set_attention_backend",
        "enable_gradient_checkpointing",
        "fuse_qkv_projections",
        "enable_layerwise_casting",
        "compile_repeated_blocks",
        "load_state_dict",
        "state_dict",
        "modules",
        "blocks",
    ],
)
def test_what_an_engine_has_not_is_one_line(name: str, model: Model) -> None:
    with pytest.raises(AttributeError) as refusal:
        getattr(model, name)
    assert "\n" not in str(refusal.value)
    assert f"no {name!r}: what changes the model, as a LoRA, comes before" in str(refusal.value)
    assert not hasattr(copy.copy(model), name)


def test_a_pipeline_is_moved_and_offloaded_around_the_engine(open_drop_in: Open) -> None:
    ours, family = open_drop_in("t2v-1.3b")
    expected = run(family.pipeline(transformer=ours), family)[-1]
    for prepare, given in (
        ("to", ("cpu",)),
        ("to", (torch.float32,)),
        ("enable_attention_slicing", ()),
        ("maybe_free_model_hooks", ()),
        ("remove_all_hooks", ()),
    ):
        pipeline = family.pipeline(transformer=ours)
        getattr(pipeline, prepare)(*given)
        assert torch.equal(run(pipeline, family)[-1], expected)
        assert pipeline.transformer is ours and not isinstance(ours, nn.Module)


def call(model: Model, time: Any) -> Tensor:
    """One call in the form of either pipeline."""
    times, latent = torch.as_tensor(time).reshape(1), torch.ones(16, 3, 8, 12)
    if isinstance(model, CompiledWanModel):
        return model([latent], t=times, context=[torch.ones(7, 4096)], seq_len=72)[0]
    text = torch.ones(1, 512, 4096)
    velocity: Tensor = model(latent[None], times, text, return_dict=False)[0]
    return velocity


def test_sigmas_in_the_place_of_timesteps_are_refused(model: Model) -> None:
    for sigma in (1.0, 0.9375):
        with pytest.raises(
            BadRequest, match=f"is {sigma:g}: this is a sigma .*: {1000 * sigma:g}$"
        ):
            call(model, sigma)
    for time in (1000.0, 500, 0.5, 0.5, 1000.0):  # a run may end below 1, with two calls a step
        assert torch.isfinite(call(model, time)).all()
    call(model, 1.0)
    with pytest.raises(BadRequest, match=r"is 0.9375: this is a sigma from 0 to 1"):
        call(model, 0.9375)


def test_a_timestep_of_zero_is_one(model: Model) -> None:
    assert torch.isfinite(call(model, 0)).all()


class Kept(EchoEngine):
    """An engine on a device that keeps tensors as they are."""

    def array(self, value: Array) -> Any:
        return value


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: what asks it for a value fails."""

    def is_far(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_meta

    for module_ in (arrays, denoiser_module, experts):
        monkeypatch.setattr(module_, "is_on_gpu", is_far)


def kept_model(kind: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Kept]:
    """A drop-in around an engine that keeps its inputs."""
    engine, config = Kept(), PRESETS[preset].config
    opened = Denoiser(record(config), {"": engine})
    if kind == "official":
        return CompiledWanModel(opened), engine
    names = module.diffusers_names(config)
    monkeypatch.setattr(module, "transformer_config", lambda bundle: names)
    return CompiledWanTransformer("bundle", denoiser=opened), engine


def call_kept(model: Model, times: Tensor) -> None:
    latent = torch.zeros(len(times), *model.denoiser.inputs["latent"].shape[1:])
    text = torch.zeros(len(times), 512, 4096)
    if isinstance(model, CompiledWanModel):
        model(list(latent), times, list(text), model.denoiser.geometry.num_tokens)
    else:
        model(latent, times, text)


@pytest.mark.parametrize("kind", ["diffusers", "official"])
@pytest.mark.parametrize(("preset", "by_token"), [("tiny", False), ("ti2v-5b", True)])
@pytest.mark.usefixtures("far")
def test_the_host_does_not_wait_for_timesteps_once_it_has_looked_at_some(
    kind: str, preset: str, by_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = kept_model(kind, preset, monkeypatch)
    geometry, shape = model.denoiser.geometry, model.denoiser.inputs["timestep"].shape
    tokens = (geometry.num_tokens,) if by_token else ()
    for videos in (1, 2):
        times = torch.full((videos, *tokens), 900, dtype=torch.int64)
        with pytest.raises(BadRequest, match="Tensor is no array of numbers"):  # it looks
            call_kept(model, times.to("meta"))
        call_kept(model, times)
        near = engine.inputs["timestep"]
        assert np.array_equal(near, np.full(shape, 900, np.float32))
        call_kept(model, times.to("meta"))
        passed: Any = engine.inputs["timestep"]
        assert passed.is_meta and passed.dtype == torch.float32 and passed.shape == shape


@pytest.mark.usefixtures("far")
def test_timesteps_by_token_of_an_engine_that_takes_one_are_always_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = kept_model("diffusers", "tiny", monkeypatch)
    times = torch.full((1, model.denoiser.geometry.num_tokens), 900.0)
    call_kept(model, times)
    with pytest.raises(BadRequest, match="Tensor is no array of numbers"):
        call_kept(model, times.to("meta"))


@pytest.mark.usefixtures("far")
def test_what_was_refused_does_not_count_as_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = kept_model("diffusers", "ti2v-5b", monkeypatch)
    times = torch.arange(model.denoiser.geometry.num_tokens)[None] + 100.0
    for wrong, message in ((times * 0 + 0.5, "a sigma"), (times, "differs among the tokens")):
        with pytest.raises(BadRequest, match=message):
            call_kept(model, wrong)
        with pytest.raises(BadRequest, match="Tensor is no array of numbers"):
            call_kept(model, times.to("meta"))


@pytest.mark.usefixtures("far")
def test_of_two_experts_the_host_waits_for_the_timestep_that_chooses() -> None:
    opened = Denoiser(record(PRESETS["t2v-a14b"].config, EXPERTS), dict.fromkeys(EXPERTS, Kept()))
    given = {**inputs_of(opened), "timestep": torch.full((1,), 900.0, device="meta")}
    with pytest.raises(RuntimeError, match="meta tensors"):
        opened(**given)
    opened.only("high_noise")(**given)
