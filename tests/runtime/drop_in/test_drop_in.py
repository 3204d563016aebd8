"""The drop-ins as scripts use a pipeline's model, in diffusers' real pipelines.

The engine is diffusers' own model of the same weights, called for one video at a time.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracles.wan_reference import small_config, small_geometry
from tests.runtime.drop_in.test_diffusers_pipeline import Family, picture, run
from tests.runtime.drop_in.test_official import open_denoiser
from wanexport.runtime.drop_in import diffusers as module
from wanexport.runtime.drop_in.diffusers import CompiledWanTransformer
from wanexport.runtime.drop_in.official import CompiledWanModel
from wanexport.runtime.errors import BadRequest

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
    ("preset", "pictures"), [("t2v-1.3b", 0), ("i2v-14b", 1), ("flf2v-14b", 2)]
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
