"""Put a compiled engine in the place of the transformer of diffusers' WanPipeline.

    python samples/05_drop_into_diffusers.py FOLDER

The model here is small and random. With a published one, `wanexport build -m MODEL` makes the
bundle, and `drop_in` below opens the pipeline: without its own transformer, whose weights stay
unread. It takes `pip install '.[cpu,build,diffusers]'` in a clone.
"""

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanexport.exporter.build import build
from wanexport.runtime.drop_in.diffusers import CompiledWanTransformer

WORDS = ["<pad>", "<unk>", "a", "red", "circle", "moves", "left", "blurred"]
HEIGHT, WIDTH, FRAMES = 64, 96, 9


def drop_in(model: Path, bundle: Path) -> WanPipeline:
    """The model's pipeline with the bundle's engine; with two experts, see `compiled_experts`."""
    pipeline = WanPipeline.from_pretrained(model, transformer=None)
    pipeline.transformer = CompiledWanTransformer(bundle)
    return pipeline


def small_pipeline() -> WanPipeline:
    """A pipeline of the real classes, of a few megabytes."""
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    text = UMT5Config(vocab_size=8, d_model=4096, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=WanTransformer3DModel(num_attention_heads=2, ffn_dim=512, num_layers=2),
    )


def generate(pipeline: WanPipeline) -> torch.Tensor:
    """The latent before the VAE; without `output_type` a pipeline gives the video."""
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt="a red circle moves left",
        negative_prompt="blurred",
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return result.frames


def main(folder: Path) -> None:
    """Write a model and its bundle into folder, and run the pipeline with its own and ours."""
    model, bundle = folder / "model", folder / "bundle"
    small_pipeline().save_pretrained(model)
    build(model, resolution=f"{HEIGHT}x{WIDTH}", frames=FRAMES, dtype="fp32", output=bundle)

    theirs = generate(WanPipeline.from_pretrained(model))
    ours = generate(drop_in(model, bundle))
    difference = (ours - theirs).abs().max().item()
    print(f"latent {list(ours.shape)}, largest value {theirs.abs().max():.2f}")
    print(
        f"{'same' if difference <= 1e-4 else 'another'} latent: largest difference {difference:.1e}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
