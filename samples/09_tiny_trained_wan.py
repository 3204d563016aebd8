"""Make clips with a tiny trained Wan: a model whose pictures a person can judge, on any CPU.

    python samples/09_tiny_trained_wan.py FOLDER ["a red circle moves left"]

Writes clip.mp4 of the caption, and contact_sheet.png of every shape in every colour. The model in
tiny_wan/ is a Wan of 4 layers that tiny_wan/train.py trained on drawn clips; a table of word
vectors and a small pixel codec stand in for umT5 and the VAE. It takes `pip install av pillow`.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from samples.tiny_wan.clips import CAPTIONS, FRAMES, SIDE, TWELVE
from samples.tiny_wan.codec import PixelCodec
from samples.tiny_wan.contact_sheet import contact_sheet
from samples.tiny_wan.words import WordEmbeddings
from wanexport.exporter.build import build
from wanexport.runtime import Step, WanExportError
from wanexport.runtime.bundle.durable import write_durably
from wanexport.runtime.serving.pipeline import Pipeline
from wanexport.runtime.serving.video import write_video

MODEL = Path(__file__).parent / "tiny_wan"
STEPS = 8
ENLARGED, FPS = 4, 8  # of the clip: each pixel 4x4, and slow, or it would be over in a second


def generate(pipeline: Pipeline, caption: str, seed: int) -> np.ndarray:
    """The frames [F, H, W, 3] of one clip; prints its caption, and a dot for each step."""
    print(caption, end=" ", flush=True)

    def show(step: Step, steps: int) -> None:
        print(".", end="", flush=True)

    made = pipeline.generate(caption, seed=seed, steps=STEPS, guidance=1, on_step=show)
    print(f" {made.seconds['sampling']:.1f} s")
    assert made.video is not None  # which it is with decode=False
    return made.video


def write_clips(folder: Path, caption: str) -> None:
    """Build into folder/bundle, unless it is there, and write the clip and the contact sheet."""
    embeddings = WordEmbeddings()
    embeddings.tokens(caption)  # refuses an unknown word before the work
    bundle = folder / "bundle"
    build(MODEL, resolution=f"{SIDE}x{SIDE}", frames=FRAMES, dtype="fp32", output=bundle)
    codec = PixelCodec(MODEL / "codec.safetensors")
    with Pipeline(bundle, text_encoder=embeddings, vae=codec, dtype="fp32") as pipeline:
        prompts = enumerate([caption, *TWELVE])
        clip, *clips = [generate(pipeline, prompt, seed) for seed, prompt in prompts]
    large = clip.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
    write_video(folder / "clip.mp4", large, FPS)
    write_durably(folder / "contact_sheet.png", contact_sheet(clips, TWELVE))
    print(f"wrote {folder / 'clip.mp4'} and {folder / 'contact_sheet.png'}")


if __name__ == "__main__":
    try:
        write_clips(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else CAPTIONS[0])
    except WanExportError as error:
        sys.exit(str(error))
