"""Find a Wan checkpoint's tensors in either layout, and the config that follows from them.

Layouts: the official one (Wan-Video) and diffusers', as single files or shards with an index, in
fp32, bf16 or fp16. One key table maps diffusers' names to the official ones.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.runtime.errors import WanExportError
from wanexport.runtime.signature import parameter_shapes
from wanexport.runtime.tensorfile import TensorEntry, read_header
from wanexport.runtime.wan_config import EXPERTS, WanConfig

HEAD_DIM = 128  # of every published Wan; used when a checkpoint comes without config.json
MAX_TEXT_LEN = 8192
STORED_DTYPES = ("F32", "BF16", "F16")
_PREFIX = "model.diffusion_model."
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SUBFOLDERS = {  # of the two experts, or of diffusers' one model
    ("high_noise_model", "low_noise_model"): EXPERTS,
    ("transformer", "transformer_2"): EXPERTS,
    ("transformer",): ("",),
}

# diffusers name -> official name; {} is the block's number, * is weight or bias.
_KEY_TABLE = {
    "patch_embedding.*": "patch_embedding.*",
    "condition_embedder.text_embedder.linear_1.*": "text_embedding.0.*",
    "condition_embedder.text_embedder.linear_2.*": "text_embedding.2.*",
    "condition_embedder.time_embedder.linear_1.*": "time_embedding.0.*",
    "condition_embedder.time_embedder.linear_2.*": "time_embedding.2.*",
    "condition_embedder.time_proj.*": "time_projection.1.*",
    "condition_embedder.image_embedder.norm1.*": "img_emb.proj.0.*",
    "condition_embedder.image_embedder.ff.net.0.proj.*": "img_emb.proj.1.*",
    "condition_embedder.image_embedder.ff.net.2.*": "img_emb.proj.3.*",
    "condition_embedder.image_embedder.norm2.*": "img_emb.proj.4.*",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "blocks.{}.scale_shift_table": "blocks.{}.modulation",
    "blocks.{}.attn1.to_q.*": "blocks.{}.self_attn.q.*",
    "blocks.{}.attn1.to_k.*": "blocks.{}.self_attn.k.*",
    "blocks.{}.attn1.to_v.*": "blocks.{}.self_attn.v.*",
    "blocks.{}.attn1.to_out.0.*": "blocks.{}.self_attn.o.*",
    "blocks.{}.attn1.norm_q.*": "blocks.{}.self_attn.norm_q.*",
    "blocks.{}.attn1.norm_k.*": "blocks.{}.self_attn.norm_k.*",
    "blocks.{}.attn2.to_q.*": "blocks.{}.cross_attn.q.*",
    "blocks.{}.attn2.to_k.*": "blocks.{}.cross_attn.k.*",
    "blocks.{}.attn2.to_v.*": "blocks.{}.cross_attn.v.*",
    "blocks.{}.attn2.to_out.0.*": "blocks.{}.cross_attn.o.*",
    "blocks.{}.attn2.norm_q.*": "blocks.{}.cross_attn.norm_q.*",
    "blocks.{}.attn2.norm_k.*": "blocks.{}.cross_attn.norm_k.*",
    "blocks.{}.attn2.add_k_proj.*": "blocks.{}.cross_attn.k_img.*",
    "blocks.{}.attn2.add_v_proj.*": "blocks.{}.cross_attn.v_img.*",
    "blocks.{}.attn2.norm_added_k.*": "blocks.{}.cross_attn.norm_k_img.*",
    "blocks.{}.norm2.*": "blocks.{}.norm3.*",
    "blocks.{}.ffn.net.0.proj.*": "blocks.{}.ffn.0.*",
    "blocks.{}.ffn.net.2.*": "blocks.{}.ffn.2.*",
    "scale_shift_table": "head.modulation",
    "proj_out.*": "head.head.*",
}
_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")  # diffusers ignores it too


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor of a checkpoint lies."""

    file: Path
    entry: TensorEntry


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint. `tensors` has, for each expert, the official names."""

    path: Path
    layout: str
    config: WanConfig
    tensors: dict[str, dict[str, SourceTensor]]
    boundary: float | None  # where the checkpoint itself states one

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; empty for a model without."""
        return tuple(expert for expert in self.tensors if expert)


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise a folder (or one safetensors file) as a Wan checkpoint.

    Raises WanExportError when there is none, a shard is missing, tensors are missing, unexpected or
    wrongly shaped, or the two experts differ in size.
    """
    names, experts = next(
        (item for item in _SUBFOLDERS.items() if all((path / name).is_dir() for name in item[0])),
        ((".",), ("",)),
    )
    found = {expert: _open_model(path / name) for name, expert in zip(names, experts, strict=True)}
    configs = {config for config, _, _ in found.values()}
    if len(configs) > 1:
        raise WanExportError(
            f"the two experts in {path} differ in size: expected one config for both"
        )
    boundary = _read_json(path / "model_index.json").get("boundary_ratio")
    if boundary is not None and not (isinstance(boundary, float) and 0 < boundary < 1):
        raise WanExportError(
            f"{path}/model_index.json has boundary_ratio {boundary!r}: expected one from 0 to 1"
        )
    return Checkpoint(
        path=path,
        layout=next(iter(found.values()))[1],
        config=configs.pop(),
        tensors={expert: tensors for expert, (_, _, tensors) in found.items()},
        boundary=boundary,
    )


def _open_model(path: Path) -> tuple[WanConfig, str, dict[str, SourceTensor]]:
    tensors: dict[str, SourceTensor] = {}
    for file in _weight_files(path):
        for stored, entry in read_header(file).items():
            name = stored.removeprefix(_PREFIX)
            if name in tensors:
                raise WanExportError(
                    f"{name} is in {tensors[name].file} and in {file}: "
                    f"pass -m one of the files, or a folder with one model"
                )
            tensors[name] = SourceTensor(file, entry)
    layout = "diffusers" if "condition_embedder.time_proj.weight" in tensors else "official"
    if layout == "diffusers":
        tensors = {official_name(k): t for k, t in tensors.items() if not _UNUSED.fullmatch(k)}
    folder = path.parent if path.is_file() else path
    config = recognise(tensors, _read_json(folder / "config.json"), path)
    _check_tensors(tensors, config, path)
    return config, layout, tensors


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WanExportError(f"{index} has no weight_map: download it again")
        values = list(weight_map.values())
        if not all(isinstance(value, str) and Path(value).name == value for value in values):
            raise WanExportError(f"{index} names what are no files: download it again")
        names = sorted(set(values))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise WanExportError(
                f"{path} lacks {', '.join(missing)}, which its index lists: download again"
            )
        return [path / name for name in names]
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors"))
    files = files or sorted(path.glob("*.safetensors"))
    if not files:
        raise WanExportError(
            f"{path} is no Wan checkpoint: expected *.safetensors in it, in high_noise_model/ and "
            f"low_noise_model/, or in transformer/"
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file. Raises WanExportError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WanExportError(f"cannot read {path} ({error}): download it again") from error
    return data if isinstance(data, dict) else {}


def official_name(name: str) -> str:
    """Translate a diffusers parameter name; a name the table lacks is returned as it is."""
    number = re.match(r"blocks\.(\d+)\.", name)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
    stem, _, last = generic.rpartition(".")
    wild = f"{stem}.*" if last in ("weight", "bias") else generic
    if wild not in _KEY_TABLE:
        return name
    official = _KEY_TABLE[wild].replace("*", last)
    return official.replace("{}", number[1]) if number else official


def recognise(
    tensors: Mapping[str, SourceTensor], stated: Mapping[str, Any], path: Path
) -> WanConfig:
    """The config that follows from the tensors; config.json adds only heads, text_len and eps.

    Raises WanExportError when a tensor that decides the config is missing.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].entry.shape) != rank:
            raise WanExportError(
                f"{path} is no Wan diffusion transformer: it has no {name} of rank {rank}; "
                f"expected the official or the diffusers layout"
            )
        return tensors[name].entry.shape

    dim, in_channels = shape("patch_embedding.weight", 5)[:2]
    matches = (re.match(r"blocks\.(\d{1,6})\.", name) for name in tensors)
    blocks = {int(match[1]) for match in matches if match}
    if blocks != set(range(len(blocks))):
        raise WanExportError(f"{path} has blocks up to {max(blocks)}, but not all: download again")
    heads, text_len, eps = _settings(stated, dim, path)
    image_tokens = 0
    if "img_emb.proj.0.weight" in tensors:
        image_tokens = 514 if "img_emb.emb_pos" in tensors else 257
    return WanConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        num_heads=heads,
        num_layers=len(blocks),
        in_channels=in_channels,
        out_channels=shape("head.head.weight", 2)[0] // 4,
        image_tokens=image_tokens,
        text_dim=shape("text_embedding.0.weight", 2)[1],
        text_len=text_len,
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        eps=eps,
    )


def _settings(stated: Mapping[str, Any], dim: int, path: Path) -> tuple[int, int, float]:
    """num_heads, text_len and eps, which no tensor tells, from config.json or their defaults."""
    heads = stated.get("num_heads", stated.get("num_attention_heads", max(1, dim // HEAD_DIM)))
    text_len, eps = stated.get("text_len", 512), stated.get("eps", 1e-6)
    for name, value, largest in (("num_heads", heads, dim), ("text_len", text_len, MAX_TEXT_LEN)):
        if type(value) is not int or not 1 <= value <= largest:
            raise WanExportError(
                f"config.json of {path} has {name} {value!r:.40}: expected from 1 to {largest}"
            )
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise WanExportError(
            f"config.json of {path} has eps {eps!r:.40}: expected a number from 0 to 1"
        )
    return heads, text_len, eps


def _check_tensors(tensors: Mapping[str, SourceTensor], config: WanConfig, path: Path) -> None:
    expected = parameter_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        entry = tensors[name].entry
        if entry.shape != expected[name]:
            problems.append(f"{name} is {list(entry.shape)}, expected {list(expected[name])}")
        elif entry.dtype not in STORED_DTYPES:
            problems.append(f"{name} is {entry.dtype}, expected F32, BF16 or F16")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WanExportError(
            f"{path} does not fit a Wan of dim {config.dim} and {config.num_layers} blocks: "
            f"{'; '.join(sorted(problems)[:8])}{more}"
        )
