"""diffusers' own pipelines with a compiled transformer, against the same pipelines untouched."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # before transformers 5 it was the only one, without a suffix
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from tests.oracles.wan_reference import diffusers_model, small_config, write_diffusers
from tests.quick import slow_but
from tests.runtime.test_denoiser import EchoEngine, record
from wanexport.exporter.backends.onnx import backend as onnx_backend
from wanexport.exporter.build import build
from wanexport.graphs.config import PRESETS
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.drop_in.diffusers import CompiledWanTransformer, compiled_experts
from wanexport.runtime.drop_in.experts import per_frame
from wanexport.runtime.errors import BadRequest, BundleError
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import WanConfig

STEPS, BOUNDARY = 3, 0.9
TOLERANCE = 1e-4
WORDS = ["<pad>", "<unk>", "a", "red", "circle", "moves", "left", "blurred"]


@dataclass(frozen=True)
class Family:
    """A small model of one family, its bundle, and how diffusers runs it."""

    config: WanConfig
    geometry: Geometry
    models: tuple[WanTransformer3DModel, ...]
    bundle: Path

    def pipeline(self, **changes: Any) -> Any:
        """diffusers' pipeline with the family's own models and small random other parts."""
        parts: dict[str, Any] = {
            "tokenizer": tokenizer(),
            "text_encoder": text_encoder(),
            "vae": vae(self.config),
            "scheduler": scheduler(),
            "transformer": self.models[0],
            **changes,
        }
        if len(self.models) == 2:
            parts |= {"transformer_2": self.models[1], "boundary_ratio": BOUNDARY}
        if self.config.image_tokens:
            parts |= {"image_encoder": image_encoder(), "image_processor": CLIPImageProcessorPil()}
        kind = WanImageToVideoPipeline if self.config.condition_channels else WanPipeline
        return silent(parts.pop("kind", kind)(**parts))


def silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


@cache
def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=4096, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return UMT5EncoderModel(config).eval()


def vae(config: WanConfig) -> AutoencoderKLWan:
    """A VAE of the model's latent channels and stride; the 5B's patches its pixels by two."""
    torch.manual_seed(2)
    channels = config.out_channels
    small: dict[str, Any] = {
        "base_dim": 4,
        "z_dim": channels,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1] * channels,
        "latents_std": [2.0] * channels,
    }
    if family_of(config).blends_first_frame:
        small |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        small |= {"scale_factor_spatial": 16}
    return AutoencoderKLWan(**small).eval()


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


@cache
def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval()


def picture(family: Family, seed: int = 0) -> Image.Image:
    size = (family.geometry.height, family.geometry.width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8))


def run(pipeline: Any, family: Family, **options: Any) -> list[Tensor]:
    """The latent after every step, the last one being the result."""
    latents: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return tensors

    settings: dict[str, Any] = {
        "prompt": "a red circle moves left",
        "negative_prompt": "blurred",
        "height": family.geometry.height,
        "width": family.geometry.width,
        "num_frames": family.geometry.frames,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(0),
        "callback_on_step_end": keep,
        "output_type": "latent",
    }
    result = pipeline(**{**settings, **options}).frames
    return [*latents, result]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs) == STEPS + 1
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, theirs))
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


def assert_the_same(family: Family, pipeline: Any, **options: Any) -> None:
    """The pipeline with the compiled model against diffusers' own, of which it has the config."""
    theirs = run(pipeline, family, **options)
    config = pipeline.transformer.config
    engines = compiled_experts(family.bundle) if len(family.models) == 2 else None
    pipeline.transformer = engines[0] if engines else CompiledWanTransformer(family.bundle)
    if engines:
        pipeline.transformer_2 = engines[1]
    ours = run(pipeline, family, **options)
    assert dict(pipeline.transformer.config).items() <= dict(config).items()
    assert (theirs[0] - theirs[-1]).abs().max() > 0.1
    assert largest_difference(ours, theirs) <= TOLERANCE


def call(model: CompiledWanTransformer, **changes: Any) -> Any:
    """The model called as a pipeline does, with some arguments changed."""
    arguments: dict[str, Any] = {
        "hidden_states": torch.ones(model.denoiser.inputs["latent"].shape),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.ones(1, 512, 4096),
        "return_dict": False,
    }
    return model(**{**arguments, **changes})


def make_family(preset: str, folder: Path) -> Family:
    """A checkpoint in diffusers' layout and its bundle, spared the proof, which this is."""
    config = small_config(preset, num_layers=1)
    stride = family_of(config).vae.spatial_stride
    side = 2 * stride
    geometry = Geometry(2 * side, 3 * side, 9, stride)
    experts = PRESETS[preset].experts
    models = tuple(diffusers_model(config, seed) for seed in range(len(experts) or 1))
    write_diffusers(folder / "model", models[0])
    if experts:
        models[1].save_pretrained(folder / "model" / "transformer_2")
    size = f"{geometry.height}x{geometry.width}"
    bundle = folder / "bundle"
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(onnx_backend, "prove_lowering", lambda *args, **options: {"verify": "none"})
        build(folder / "model", resolution=size, frames=9, dtype="fp32", output=bundle)
    return Family(config, geometry, models, bundle)


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("t2v-1.3b", tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Image-to-video without CLIP."""
    return make_family("i2v-a14b", tmp_path_factory.mktemp("i2v-a14b"))


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("ti2v-5b", tmp_path_factory.mktemp("ti2v"))


@pytest.fixture(scope="module")
def compiled(t2v: Family) -> CompiledWanTransformer:
    return CompiledWanTransformer(t2v.bundle)


def test_text_to_video(t2v: Family) -> None:
    assert_the_same(t2v, t2v.pipeline())


@pytest.mark.parametrize(
    ("preset", "pictures"), slow_but([("i2v-14b", 1), ("flf2v-14b", 2)], "i2v-14b")
)
def test_image_to_video_with_clip(preset: str, pictures: int, tmp_path: Path) -> None:
    family = make_family(preset, tmp_path)
    images = {name: picture(family, i) for i, name in enumerate(("image", "last_image")[:pictures])}
    assert_the_same(family, family.pipeline(), **images)


def test_two_experts_and_an_image_without_clip(two_experts: Family) -> None:
    timesteps = scheduler()
    timesteps.set_timesteps(STEPS)
    high = timesteps.timesteps >= 1000 * BOUNDARY
    assert high.any() and not high.all()
    assert_the_same(two_experts, two_experts.pipeline(), image=picture(two_experts))


def test_the_pipeline_and_not_the_bundle_sets_the_boundary(two_experts: Family) -> None:
    pipeline = two_experts.pipeline()
    pipeline.register_to_config(boundary_ratio=0.5)
    assert_the_same(two_experts, pipeline, image=picture(two_experts), guidance_scale_2=1.5)


def test_text_to_video_with_expanded_timesteps(ti2v: Family) -> None:
    assert_the_same(ti2v, ti2v.pipeline(expand_timesteps=True))


def test_image_to_video_with_expanded_timesteps(ti2v: Family) -> None:
    pipeline = ti2v.pipeline(kind=WanImageToVideoPipeline, expand_timesteps=True)
    assert_the_same(ti2v, pipeline, image=picture(ti2v))


def test_a_batch_runs_one_after_the_other(t2v: Family) -> None:
    prompts = ["a red circle", "a circle moves left"]
    assert_the_same(t2v, t2v.pipeline(), prompt=prompts, negative_prompt=["blurred", "a"])


def test_a_pipeline_opened_without_its_transformer_takes_ours(
    t2v: Family, compiled: CompiledWanTransformer, tmp_path: Path
) -> None:
    whole = t2v.pipeline()
    whole.save_pretrained(tmp_path)
    pipeline = silent(WanPipeline.from_pretrained(tmp_path, transformer=None))
    pipeline.transformer = compiled
    pipeline.to("cpu")
    assert pipeline.to(torch.float32).transformer is compiled
    assert largest_difference(run(pipeline, t2v), run(whole, t2v)) <= TOLERANCE
    video = run(pipeline, t2v, output_type="np")[-1]
    assert video.shape == (1, 9, t2v.geometry.height, t2v.geometry.width, 3)


def test_both_kinds_of_result(compiled: CompiledWanTransformer) -> None:
    (as_tuple,) = call(compiled)
    assert torch.equal(call(compiled, return_dict=True).sample, as_tuple)
    assert as_tuple.dtype == compiled.dtype == torch.float32
    assert compiled.device == torch.device("cpu")
    assert compiled.to("cuda", torch.bfloat16) is compiled


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "another size": (
        {"hidden_states": torch.ones(1, 16, 5, 4, 8)},
        "latent has shape [1, 16, 5, 4, 8], engine 32x48x9/onnx-fp32 takes [1, 16, 3, 4, 6]: "
        "build an engine with --resolution 32x64 --frames 17",
    ),
    "another family": (
        {"hidden_states": torch.ones(1, 36, 3, 4, 6)},
        "hidden_states has shape [1, 36, 3, 4, 6], engine 32x48x9/onnx-fp32 takes "
        "[B, 16, F, h, w]: use the pipeline and the bundle of one model",
    ),
    "a short text": (
        {"encoder_hidden_states": torch.ones(1, 226, 4096)},
        "encoder_hidden_states has shape [1, 226, 4096], the engine takes [B, 512, 4096]: "
        "encode prompts with max_sequence_length=512",
    ),
    "fewer texts than videos": (
        {
            "hidden_states": torch.ones(3, 16, 3, 4, 6),
            "timestep": torch.tensor([9, 9, 9]),
            "encoder_hidden_states": torch.ones(2, 512, 4096),
        },
        "encoder_hidden_states has 2 entries for 3 videos: pass one for each, or one for all",
    ),
    "fewer timesteps than videos": (
        {"hidden_states": torch.ones(2, 16, 3, 4, 6)},
        "timestep has 1 entries for 2 videos: pass one for each",
    ),
    "an image": (
        {"encoder_hidden_states_image": torch.ones(1, 257, 1280)},
        "engine 32x48x9/onnx-fp32 takes latent, timestep, text: image not expected",
    ),
    "images that two videos cannot share": (
        {
            "hidden_states": torch.ones(2, 16, 3, 4, 6),
            "timestep": torch.tensor([1, 1]),
            "encoder_hidden_states": torch.ones(2, 512, 4096),
            "encoder_hidden_states_image": torch.ones(1, 257, 1280),
        },
        "encoder_hidden_states_image has shape [1, 257, 1280] for 2 videos: "
        "expected [n * 2, tokens, width], as many images for each",
    ),
    "timesteps within a frame": (
        {"timestep": torch.arange(18.0)[None]},
        "timestep differs among the tokens of latent frame 0: "
        "the engine takes one for each frame, use the same for all of its tokens",
    ),
    "a LoRA's scale": (
        {"attention_kwargs": {"scale": 0.5}},
        "a compiled transformer cannot honour scale=0.5: leave it out, or use diffusers' own",
    ),
    "an option of another model": (
        {"return_attention": True},
        "a compiled transformer cannot honour return_attention=True: leave it out, or use "
        "diffusers' own",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_the_engine_cannot_do_is_refused(compiled: CompiledWanTransformer, what: str) -> None:
    arguments, message = REFUSALS[what]
    with pytest.raises(BadRequest) as refusal:
        call(compiled, **arguments)
    assert str(refusal.value) == message


def test_a_scale_without_a_lora_changes_nothing(compiled: CompiledWanTransformer) -> None:
    scaled = call(compiled, attention_kwargs={"scale": 1.0})
    assert torch.equal(scaled[0], call(compiled)[0])


def test_what_changes_a_model_says_that_it_is_compiled(compiled: CompiledWanTransformer) -> None:
    with pytest.raises(AttributeError, match=r"no 'load_lora_adapter': .* before wanexport build"):
        compiled.load_lora_adapter({})
    assert not hasattr(compiled, "enable_cache")


def test_each_bundle_names_its_own_way_in(t2v: Family, two_experts: Family) -> None:
    with pytest.raises(BadRequest, match=r"two experts: .*compiled_experts\(bundle\)$"):
        CompiledWanTransformer(two_experts.bundle)
    with pytest.raises(BadRequest, match=r"one model, not two: use CompiledWanTransformer$"):
        compiled_experts(t2v.bundle)


def test_an_open_engine_takes_no_options(compiled: CompiledWanTransformer, t2v: Family) -> None:
    with pytest.raises(BadRequest, match="open already: pass dtype where you open it"):
        CompiledWanTransformer(t2v.bundle, denoiser=compiled.denoiser, dtype="fp32")


def test_the_options_of_load_are_passed_on(t2v: Family) -> None:
    with pytest.raises(BadRequest, match="has no such engine"):
        CompiledWanTransformer(t2v.bundle, frames=81)


def test_a_manifest_without_the_model_is_refused(t2v: Family, tmp_path: Path) -> None:
    manifest = (t2v.bundle / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace('"ffn_dim"', '"size"'))
    with pytest.raises(BundleError, match=r"config has no ffn_dim.*build again"):
        CompiledWanTransformer(tmp_path)


def test_tokens_become_frames() -> None:
    geometry = Geometry(32, 48, 9)  # 3 frames of 2 x 3 tokens
    by_token = np.repeat(np.array([0, 7, 7], np.float32), 6)
    assert per_frame(by_token, geometry).tolist() == [0, 7, 7]
    assert per_frame(np.full(18, 7, np.float32), geometry).tolist() == [7]
    for other in (np.array(7, np.float32), np.array([1, 2, 3], np.float32)):
        assert per_frame(other, geometry) is other


def test_the_engine_runs_outside_autocast(t2v: Family) -> None:
    seen: list[bool] = []

    class Engine(EchoEngine):
        def __call__(
            self, inputs: Any, weights: Any = None, memory: Any = None, moment: str = "step"
        ) -> np.ndarray:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(inputs, weights, memory)

    denoiser = Denoiser(record(t2v.config), {"": Engine()})
    model = CompiledWanTransformer(t2v.bundle, denoiser=denoiser)
    with torch.autocast("cpu", torch.bfloat16):
        call(model)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_diffusers_is_not_imported_with_the_runtime() -> None:
    code = "import sys, wanexport.runtime.drop_in.diffusers, wanexport.runtime.drop_in.official; "
    code += "sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_diffusers_the_install_is_named(
    t2v: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "diffusers.configuration_utils")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BundleError, match=r"needs diffusers; .*pip install '.\[diffusers\]'$"):
        CompiledWanTransformer(t2v.bundle)
