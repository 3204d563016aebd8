"""What the official text and image encoder give for small models, whose tensors follow a formula.

    python -m tests.oracles.official_encoders CLONE

computes the values with the official code and writes official_encoders.json. CLONE is a clone of
Wan-Video/Wan2.1; the values here are of commit 9737cba9 and transformers 4.51.0, of the versions
that it asks for (4.49 to 4.51.3). It takes numpy, PyTorch, ftfy, regex and transformers.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

VALUES = Path(__file__).with_suffix(".json")
ROWS = (0, 150, -1)  # of a prompt's embedding, those it has: the first, one far from it, the last
PLACES = (0, 7, 10, 19)  # of the features of two images: class token and a patch of each
TEXT_SIZES = {
    "vocab": 64,
    "dim": 24,
    "heads": 3,
    "head_dim": 4,
    "ffn": 40,
    "layers": 2,
    "buckets": 16,
}
UMT5_XXL = {
    "vocab": 256384,
    "dim": 4096,
    "heads": 64,
    "head_dim": 64,
    "ffn": 10240,
    "layers": 24,
    "buckets": 32,
}
IMAGE_SIZES = {"dim": 32, "ffn": 128, "layers": 3, "patch": 14, "image": 42}
VIT_H = {"dim": 1280, "ffn": 5120, "layers": 32, "patch": 14, "image": 224}
PROMPTS = (
    "a red circle moves left",
    "  a red \t\n circle\u3000moves   left ",
    "a <red> circle &amp;amp; a &amp;lt;cafe&#769;",
    "it\u00e2\u20ac\u2122s a red circle",  # an apostrophe, decoded as the wrong code page
    "\uff32ed \u2460 circle\u200b moves",  # wide letters, a number in a circle, an invisible space
    "",
    "a red circle moves left and then right, " * 60,  # more than 512 tokens
)
_WORDS = ("a", "red", "circle", "moves", "left", "and", "then", "right")


def pseudo_random(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """fp32 numbers from -scale to scale, the same everywhere: splitmix64 of the place and name."""
    with np.errstate(over="ignore"):
        z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(crc32(name.encode()) << 32)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(11)).astype(np.float64) / 2**52 - 1
    return (scale * unit).astype(np.float32).reshape(shape)


def text_shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official T5Encoder's tensors."""
    dim, ffn, inner = sizes["dim"], sizes["ffn"], sizes["heads"] * sizes["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (sizes["vocab"], dim),
        "norm.weight": (dim,),
    }
    for i in range(sizes["layers"]):
        block = {
            "norm1.weight": (dim,),
            "attn.q.weight": (inner, dim),
            "attn.k.weight": (inner, dim),
            "attn.v.weight": (inner, dim),
            "attn.o.weight": (dim, inner),
            "norm2.weight": (dim,),
            "ffn.gate.0.weight": (ffn, dim),
            "ffn.fc1.weight": (ffn, dim),
            "ffn.fc2.weight": (dim, ffn),
            "pos_embedding.embedding.weight": (sizes["buckets"], sizes["heads"]),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def image_shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official VisionTransformer's tensors, in the file of the pair."""
    dim, ffn, patch = sizes["dim"], sizes["ffn"], sizes["patch"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding": (1, 1, dim),
        "pos_embedding": (1, 1 + (sizes["image"] // patch) ** 2, dim),
        "patch_embedding.weight": (dim, 3, patch, patch),
        "head": (dim, 1024),
    }
    layers = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    layers |= {"mlp.0": (ffn, dim), "mlp.2": (dim, ffn)}
    for i in range(sizes["layers"]):
        for name, shape in layers.items():
            shapes[f"transformer.{i}.{name}.weight"] = shape
            shapes[f"transformer.{i}.{name}.bias"] = shape[:1]
    norms = [f"transformer.{i}.norm{n}" for i in range(sizes["layers"]) for n in (1, 2)]
    for name in (*norms, "pre_norm", "post_norm"):
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors for these names and shapes; norms are near 1, all others large enough to tell."""
    tensors = {}
    for name, shape in shapes.items():
        values = pseudo_random(name, shape, 0.5)
        if "norm" in name and name.endswith("weight"):
            values = values + 1
        tensors[name] = torch.from_numpy(values)
    return tensors


def images() -> list[np.ndarray]:
    """A tall and a wide image, [3, H, W] in [-1, 1]."""
    return [pseudo_random("tall", (3, 90, 40)), pseudo_random("wide", (3, 20, 70))]


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of umT5's kind: unigrams after NFKC, and </s> at the end of a text."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    letters = [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz1&<>',\u00e9\u201c"]
    words = [(f"\u2581{word}", -2.0) for word in _WORDS]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -3.0)]
    tokenizer = Tokenizer(Unigram([*special, *letters, *words], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special_tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main(clone: Path) -> None:
    """Write the values of the official code in `clone`."""
    t5, tokenizers, clip = _import_official(clone)
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "prompts": _official_text(t5, tokenizers, Path(folder) / "umt5"),
            "features": _rounded(_official_features(clip)[list(PLACES)]),
        }
    # A line for each prompt and each place.
    rows = {name: ",\n".join(json.dumps(row) for row in found) for name, found in values.items()}
    text = ",\n".join(f'"{name}": [\n{lines}\n]' for name, lines in rows.items())
    VALUES.write_text(f"{{\n{text}\n}}\n")


def _import_official(clone: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules t5, tokenizers and clip: without a GPU, FlashAttention or torchvision."""
    for name, folder in (("wan", "wan"), ("wan.modules", "wan/modules")):
        package = ModuleType(name)
        package.__path__ = [str(clone / folder)]
        sys.modules[name] = package
    attention: Any = ModuleType("wan.modules.attention")
    attention.flash_attention = _attention
    transforms: Any = ModuleType("torchvision.transforms")
    transforms.Compose = lambda steps: SimpleNamespace(transforms=steps)
    transforms.Resize = transforms.ToTensor = lambda *_, **__: None
    transforms.InterpolationMode = SimpleNamespace(BICUBIC=None)
    transforms.Normalize = lambda mean, std: (
        lambda x: (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    )
    torchvision: Any = ModuleType("torchvision")
    torchvision.transforms = transforms
    torch.cuda.current_device = lambda: 0  # a default argument of the text encoder
    t5 = importlib.import_module("wan.modules.t5")
    stand_ins = {"torchvision": torchvision, "torchvision.transforms": transforms}
    with patch.dict(sys.modules, stand_ins | {"wan.modules.attention": attention}):
        clip = importlib.import_module("wan.modules.clip")
    return t5, importlib.import_module("wan.modules.tokenizers"), clip


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """softmax(q k / sqrt(d)) v of [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _official_text(t5: Any, tokenizers: Any, folder: Path) -> list[dict[str, Any]]:
    """For each prompt: its cleaned text, how many tokens it has, and rows of its embedding."""
    sizes = TEXT_SIZES
    model = t5.T5Encoder(
        vocab=sizes["vocab"],
        dim=sizes["dim"],
        dim_attn=sizes["heads"] * sizes["head_dim"],
        dim_ffn=sizes["ffn"],
        num_heads=sizes["heads"],
        num_layers=sizes["layers"],
        num_buckets=sizes["buckets"],
        shared_pos=False,
    )
    model.load_state_dict(state(text_shapes(sizes)))
    write_tokenizer(folder)
    encoder = t5.T5EncoderModel.__new__(t5.T5EncoderModel)
    encoder.model = model.double().eval().requires_grad_(False)
    encoder.tokenizer = tokenizers.HuggingfaceTokenizer(
        name=str(folder), seq_len=512, clean="whitespace"
    )
    found = []
    for prompt in PROMPTS:
        (embedding,) = encoder([prompt], torch.device("cpu"))
        rows = {str(row): _rounded(embedding[row]) for row in ROWS if row < len(embedding)}
        cleaned = encoder.tokenizer._clean(prompt)
        found.append({"cleaned": cleaned, "tokens": len(embedding), "rows": rows})
    return found


def _official_features(clip: Any) -> Tensor:
    """Features [2 * tokens, dim] of both images."""
    sizes = IMAGE_SIZES
    model, transforms = clip.clip_xlm_roberta_vit_h_14(
        return_transforms=True,
        image_size=sizes["image"],
        vision_dim=sizes["dim"],
        vision_layers=sizes["layers"],
        text_dim=2,
        text_heads=1,
        text_layers=1,
        vocab_size=2,
    )
    model.load_state_dict({**model.state_dict(), **state(image_shapes(sizes))})
    encoder = clip.CLIPModel.__new__(clip.CLIPModel)
    encoder.dtype = torch.float16
    encoder.model = model.eval().requires_grad_(False)
    encoder.transforms = transforms
    videos = [torch.from_numpy(image)[:, None] for image in images()]
    features: Tensor = encoder.visual(videos).flatten(0, 1)
    return features


def _rounded(values: Tensor) -> Any:
    return np.round(values.double().numpy(), 5).tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
