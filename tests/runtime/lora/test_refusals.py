"""What does not fit, or is not read, is named in one line; nothing is dropped in silence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.lora.tiny import (
    CONFIG,
    FFN,
    IMAGE_CONFIG,
    SHAPES,
    Q,
    base,
    is_close,
    pair,
    random,
    stack,
    wide,
    write,
)
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.lora.merge import LoraStack

ONE = torch.tensor(1.0)
GOOD = pair(FFN)


def refusal(folder: Path, tensors: dict[str, Tensor], **options: Any) -> str:
    with pytest.raises(BadRequest) as error:
        stack(folder, tensors, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"blocks.2.self_attn.q.lora_A.weight": random(4, 16)}, "is of a module that this model"),
        ({"vae.decoder.lora_A.weight": random(4, 16)}, "is of a module that this model lacks"),
        ({f"{Q}.lora_A.weight": random(4, 16)}, "has no up beside it"),
        ({f"{Q}.lora_B.weight": random(16, 4)}, "has no down beside it"),
        ({f"{Q}.lora_mid.weight": random(4, 4)}, "has no down and up beside it"),
        (
            {f"{Q}.alpha": ONE, f"{Q}.lora_A.weight": random(4, 16)},
            "is an alpha without fitting factors",
        ),
        ({f"{Q}.lora_B.bias": random(16)}, "is a bias without fitting factors"),
        ({f"{Q}.dora_scale": random(16, 1)}, "is a magnitude (DoRA) without one adapter"),
        (pair(Q) | {f"{Q}.dora_scale": random(4, 4)}, "has [4, 4] magnitudes for [16, 16]"),
        (pair(Q) | {f"{Q}.lora_magnitude_vector": random(15)}, "has [15] magnitudes for [16, 16]"),
        (
            pair(Q) | {f"{Q}.dora_scale": random(16, 1), f"{Q}.lora_magnitude_vector": random(16)},
            "is a magnitude (DoRA) without one adapter",
        ),
        (
            {f"{Q}.lora_A.weight": random(4, 16), f"{Q}.lora_B.weight": random(16, 5)},
            "parts do not fit each other: down [4, 16], up [16, 5]",
        ),
        (
            {f"{Q}.lora_A.weight": random(4, 16), f"{Q}.lora_B.weight": random(24, 4)},
            f"changes {Q}.weight as one of [24, 16], here it is [16, 16]",
        ),
        (
            {f"{Q}.lora_A.weight": random(17, 16), f"{Q}.lora_B.weight": random(16, 17)},
            "has the rank 17, more than",
        ),
        (
            {f"{Q}.lora_A.weight": random(0, 16), f"{Q}.lora_B.weight": random(16, 0)},
            "is empty",
        ),
        (
            {
                "patch_embedding.lora_A.weight": random(4, 32, 1, 2, 2),
                "patch_embedding.lora_B.weight": random(16, 4, 1, 1, 1),
            },
            "as one of [16, 32, 1, 2, 2], here it is [16, 16, 1, 2, 2]",
        ),
        (
            {
                "patch_embedding.lora_A.weight": random(4, 1, 16, 2, 2),
                "patch_embedding.lora_B.weight": random(16, 4, 1, 1, 1),
            },
            None,  # the same but for ones
        ),
        (
            {
                "patch_embedding.lora_A.weight": random(4, 2, 2, 1, 16),
                "patch_embedding.lora_B.weight": random(16, 4, 1, 1, 1),
            },
            "as one of [16, 2, 2, 1, 16]",
        ),
        ({f"{Q}.diff": random(16, 15)}, "as one of [16, 15], here it is [16, 16]"),
        ({"blocks.0.self_attn.norm_q.diff_b": random(16)}, "norm_q.bias, which this model lacks"),
        ({"blocks.0.ffn.0.diff_m": random(1, 6, 16)}, "ffn.0.modulation, which this model lacks"),
        ({f"{Q}.diff": random(16, 16).to(torch.float8_e4m3fn)}, "is F8_E4M3, expected F32"),
        ({f"{Q}.diff": torch.ones(16, 16, dtype=torch.int32)}, "is I32, expected F32"),
        ({f"{Q}.what": random(16)}, "is of no kind that is read"),
        ({f"{Q}.weight": random(16, 16)}, "is of no kind that is read"),
        ({f"{Q}.lokr_w1": random(2, 4)}, "has no w2_a and w2_b beside it"),
        ({f"{Q}.lokr_w1": random(2, 4), f"{Q}.lokr_w2": random(8, 5)}, "as one of [16, 20]"),
        (
            {f"{Q}.lokr_w1": random(4, 4), f"{Q}.lokr_w2": ONE, f"{Q}.lokr_w1_a": ONE},
            "has no place in a LoKr",
        ),
        (
            {
                "patch_embedding.lokr_w1": random(4, 4),
                "patch_embedding.lokr_t2": random(1, 3, 1, 2, 2),
                "patch_embedding.lokr_w2_a": random(3, 4),
                "patch_embedding.lokr_w2_b": random(3, 4),
            },
            "parts do not fit each other",
        ),
        ({f"{Q}.hada_w1_a": random(16, 2)}, "has no hada_w1_b and hada_w2_a and hada_w2_b beside"),
        (
            {
                f"{Q}.hada_w1_a": random(1, 2),
                f"{Q}.hada_w1_b": random(2, 16),
                f"{Q}.hada_w2_a": random(16, 2),
                f"{Q}.hada_w2_b": random(2, 16),
            },
            "parts do not fit each other",
        ),
        (
            pair(Q) | {f"diffusion_model.{key}": value for key, value in pair(Q).items()},
            "stands for the same as",
        ),
        (
            pair(Q)
            | {
                "lora_unet_blocks_0_self_attn_q.lora_down.weight": random(4, 16),
                "transformer.blocks.0.attn1.to_q.lora_A.weight": random(4, 16),
            },
            "stands for the same as",
        ),
    ],
)  # fmt: skip
def test_a_tensor_without_a_place_is_named_or_left_out_on_request(
    tensors: dict[str, Tensor], named: str | None, tmp_path: Path
) -> None:
    if named is None:
        assert not stack(tmp_path, GOOD | tensors).unfit
        return
    message = refusal(tmp_path, GOOD | tensors)
    assert named in message and "leave them out with --lora-partial" in message
    partial = stack(tmp_path, GOOD | tensors, partial=True)
    assert any(named in unfit.reason for _, unfit in partial.unfit)
    assert partial.describe()[0]["unused"] == len(partial.unfit)
    down, up = GOOD.values()
    expected = wide(base(f"{FFN}.weight")) + wide(up) @ wide(down)
    assert is_close(partial.merge(f"{FFN}.weight", base(f"{FFN}.weight")), expected)


def test_a_refusal_counts_and_shows_the_first_of_each_reason(tmp_path: Path) -> None:
    tensors = GOOD | {f"blocks.{i}.what.diff": random(3) for i in range(7)}
    tensors[f"{Q}.lora_B.bias"] = random(16)
    message = refusal(tmp_path, tensors)
    assert "8 of 10 tensors in" in message
    assert "blocks.0.what.diff (and 6 more) is of a module that this model lacks" in message
    assert f"{Q}.lora_B.bias is a bias" in message
    many = {f"{Q}.what{i}": random(3) for i in range(2)} | {f"{Q}.diff": random(3)}
    many |= {"blocks.1.diff_m": random(3), "head.diff_m": random(3), f"{Q}.lora_B.bias": random(16)}
    assert "; and 2 more; take" in refusal(tmp_path, many | GOOD | {"x.alpha": ONE})


def test_an_alpha_of_a_module_without_factors_is_used_and_counted(tmp_path: Path) -> None:
    """As in lightx2v's newest files (huggingface/diffusers #12535)."""
    tensors = GOOD | {f"{Q}.alpha": torch.tensor(64)}
    file = write(tmp_path, tensors)
    (record,) = LoraStack([(file, 1.0)], SHAPES).describe()
    assert (record["changes"]["alpha alone"], record["unused"]) == (1, 0)
    with pytest.raises(BadRequest):
        LoraStack([(write(tmp_path, {f"{Q}.alpha": ONE}), 1.0)], SHAPES)


def shaped(width: int, layers: int) -> dict[str, Tensor]:
    named = {}
    for i in range(layers):
        named[f"blocks.{i}.self_attn.q.lora_A.weight"] = torch.zeros(1, width)
        named[f"blocks.{i}.self_attn.q.lora_B.weight"] = torch.zeros(width, 1)
    return {f"diffusion_model.{key}": value for key, value in named.items()}


IMAGE = {
    "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": random(2, 16),
    "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": random(16, 2),
}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("tensors", "hint"),
    [
        (shaped(5120, 1), "it is for a Wan of width 5120 (14B), this one has 16"),
        (shaped(1536, 3), "it is for a Wan of width 1536 (1.3B), this one has 16"),
        (IMAGE, "it is for a model with an image branch (I2V or FLF2V of Wan2.1), this one"),
        ({Q + ".weight": random(16, 16)}, "it holds whole weights: it is a checkpoint, which -m"),
        ({"x.weight": random(16, 16)}, "it is no LoRA (x.weight has no name of a LoRA's tensor)"),
        (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": random(4, 16)},
            "it is of another model, none of its modules is of this one",
        ),
        (
            {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": random(4, 16)},
            "it is of the text encoder alone",
        ),
        ({}, "has no tensors: it is no LoRA"),
    ],
)
def test_a_lora_of_which_nothing_fits_is_refused_with_the_likely_reason(
    tensors: dict[str, Tensor], hint: str, partial: bool, tmp_path: Path
) -> None:
    assert hint in refusal(tmp_path, tensors, partial=partial)


def test_a_lora_of_more_blocks_is_told_so(tmp_path: Path) -> None:
    assert "it is for a Wan of 4 blocks, this one has 2" in refusal(tmp_path, shaped(16, 4))
    kohya = {key.replace("blocks.", "blocks_"): one for key, one in shaped(16, 4).items()}
    assert "it is for a Wan of 4 blocks, this one has 2" in refusal(tmp_path, kohya)


def test_a_lora_of_the_image_branch_and_more_is_told_what_it_is_for(tmp_path: Path) -> None:
    assert "this one has none; take" in refusal(tmp_path, GOOD | IMAGE)
    shapes = parameter_shapes(IMAGE_CONFIG)
    assert not LoraStack([(write(tmp_path, GOOD | IMAGE), 1)], shapes).unfit
    assert parameter_shapes(CONFIG) == SHAPES


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("key", "named"),
    [
        (f"{Q}.set_weight", "replaces whole weights (set_weight)"),
        ("patch_embedding.reshape_weight", "as control LoRAs do (reshape_weight)"),
        (f"{Q}.oft_blocks", "is of OFT or BOFT"),
        (f"{Q}.boft_R.default", "is of OFT or BOFT"),
        (f"{Q}.a1.weight", "is of GLoRA"),
        ("blocks.0.self_attn.q_loras.down.weight", "is of Stand-In"),
        ("dwpose_embedding.0.weight", "is of UniAnimate"),
    ],
)
def test_a_kind_that_is_not_read_is_refused_by_name(
    key: str, named: str, partial: bool, tmp_path: Path
) -> None:
    message = refusal(tmp_path, GOOD | {key: ONE[None]}, partial=partial)
    assert named in message and f"which is not read: {key}" in message


def test_a_file_of_both_experts_is_refused(tmp_path: Path) -> None:
    tensors = {f"transformer.{key}": one for key, one in GOOD.items()}
    tensors |= {f"transformer_2.{key}": one for key, one in GOOD.items()}
    assert "write two files, one for each" in refusal(tmp_path, tensors, partial=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key", [f"{FFN}.lora_A.weight", f"{FFN}.lora_B.weight", f"{FFN}.alpha", f"{FFN}.dora_scale"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_named(
    key: str, value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = GOOD | {f"{FFN}.alpha": ONE, f"{FFN}.dora_scale": random(24, 1)}
    tensors[key] = tensors[key].to(dtype).clone()
    tensors[key].view(-1)[-1] = value
    assert f"{key} has NaN or infinite values" in refusal(tmp_path, tensors, partial=True)


@pytest.mark.parametrize("alpha", [random(2), random(1, 1), ONE.bool(), ONE.to(torch.uint8)])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor, tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD | {f"{FFN}.alpha": alpha})
    assert f"{FFN}.alpha is" in message and "expected one number as alpha" in message


def test_a_merge_beyond_fp32_is_refused_and_not_blamed_on_a_damaged_base(tmp_path: Path) -> None:
    name = f"{FFN}.weight"
    lora = stack(tmp_path, GOOD, strength=1e300)
    with pytest.raises(BadRequest, match=f"{name} becomes NaN or infinite with .*too large"):
        lora.merge(name, base(name))
    damaged = base(name)
    damaged[0, 0] = float("nan")
    assert stack(tmp_path, GOOD).merge(name, damaged)[0, 0].isnan()


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_not_finite_is_refused(strength: float, tmp_path: Path) -> None:
    assert "expected a finite number" in refusal(tmp_path, GOOD, strength=strength)
