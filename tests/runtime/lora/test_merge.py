"""Stacks of LoRAs, what is recorded of them, alphas in headers, and FILE:STRENGTH."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.lora.test_kinds import dora64, product
from tests.runtime.lora.tiny import (
    FFN,
    SHAPES,
    Q,
    base,
    is_close,
    merged,
    pair,
    random,
    wide,
    write,
)
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.lora.given import parse_lora
from wanexport.runtime.lora.merge import LoraStack

NAME = f"{Q}.weight"


def test_a_stack_adds_each_by_its_own_strength(tmp_path: Path) -> None:
    first, second = pair(Q, seed=1), pair(Q, rank=2, seed=5) | {f"{Q}.alpha": torch.tensor(8.0)}
    files = [(write(tmp_path, first), 0.7), (write(tmp_path, second), -0.25)]
    expected = wide(base(NAME)) + 0.7 * product(first, Q) - 0.25 * 4 * product(second, Q)
    assert is_close(LoraStack(files, SHAPES).merge(NAME, base(NAME)), expected)
    negated = [(file, -strength) for file, strength in files]
    back = LoraStack([*files, *negated], SHAPES).merge(NAME, base(NAME))
    assert is_close(back, wide(base(NAME)))


def test_a_dora_takes_the_norms_of_what_came_before_it(tmp_path: Path) -> None:
    plain, magnitude = pair(Q, seed=1), random(16, 1).abs()
    dora = pair(Q, seed=5) | {f"{Q}.dora_scale": magnitude}
    files = [(write(tmp_path, plain), 0.5), (write(tmp_path, dora), 1.0)]
    weight = wide(base(NAME))

    after = dora64(weight + 0.5 * product(plain, Q) + product(dora, Q), wide(magnitude), (1,))
    assert is_close(LoraStack(files, SHAPES).merge(NAME, base(NAME)), after)

    before = dora64(weight + product(dora, Q), wide(magnitude), (1,)) + 0.5 * product(plain, Q)
    assert is_close(LoraStack(files[::-1], SHAPES).merge(NAME, base(NAME)), before)


def test_a_difference_is_added_after_a_dora_of_the_same_file(tmp_path: Path) -> None:
    magnitude, difference = random(16, 1).abs(), random(16, 16)
    tensors = {f"{Q}.diff": difference} | pair(Q) | {f"{Q}.dora_scale": magnitude}
    expected = dora64(wide(base(NAME)) + product(tensors, Q), wide(magnitude), (1,))
    assert is_close(merged(tmp_path, NAME, tensors), expected + wide(difference))


def test_a_merge_leaves_the_base_and_what_no_lora_changes_as_they_are(tmp_path: Path) -> None:
    lora = LoraStack([(write(tmp_path, pair(Q)), 1.0)], SHAPES)
    weight, other = base(NAME), base(f"{FFN}.weight")
    assert not torch.equal(lora.merge(NAME, weight), weight)
    assert torch.equal(weight, base(NAME))
    assert lora.merge(f"{FFN}.weight", other) is other
    assert not lora.changes(f"{FFN}.weight") and lora.changes(NAME)


def test_a_stack_of_none_changes_nothing() -> None:
    empty = LoraStack([], SHAPES)
    weight = base(NAME)
    assert empty.merge(NAME, weight) is weight and not empty.changes(NAME)
    assert empty.describe() == [] and empty.unfit == ()


def test_autocast_and_reduced_precision_of_the_caller_round_nothing(tmp_path: Path) -> None:
    lora = LoraStack([(write(tmp_path, pair(Q)), 0.3)], SHAPES)
    plain = lora.merge(NAME, base(NAME))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(lora.merge(NAME, base(NAME)), plain)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_a_merge_on_a_gpu_is_the_one_on_the_cpu_also_with_tf32(tmp_path: Path) -> None:
    tensors = pair(Q) | {f"{Q}.dora_scale": random(16, 1).abs(), f"{Q}.diff": random(16, 16)}
    lora = LoraStack([(write(tmp_path, tensors), 0.3)], SHAPES)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            found = lora.merge(NAME, base(NAME).cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.is_cuda and is_close(found.cpu(), wide(lora.merge(NAME, base(NAME))))


def test_a_record_tells_file_hash_strength_and_counts(tmp_path: Path) -> None:
    tensors = pair(Q) | pair(FFN) | {f"{FFN}.dora_scale": random(24, 1)}
    tensors |= {f"{Q}.diff_b": random(16), f"{FFN}.diff_b": random(24), "x.alpha": torch.ones(1)}
    file = write(tmp_path, tensors)
    assert LoraStack([(file, -0.5)], SHAPES, partial=True).describe() == [
        {
            "path": str(file),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "strength": -0.5,
            "changes": {"diff_b": 2, "low rank": 1, "low rank with DoRA": 1},
            "unused": 1,
        }
    ]


DIFFUSERS_Q = "blocks.0.attn1.to_q"


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 2}, 0.5),
        ({"lora_alpha": 2, "r": 32}, 0.5),  # the rank is that of the tensors
        ({"lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"lora_alpha": 2, "use_rslora": False, "alpha_pattern": None}, 0.5),
        ({"lora_alpha": 2, "alpha_pattern": {DIFFUSERS_Q: 6}}, 1.5),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 8}}, 2.0),
        ({"lora_alpha": 2, "alpha_pattern": {f"^{DIFFUSERS_Q}$": 8.0}}, 2.0),
        ({"lora_alpha": 2, "alpha_pattern": {"attn1.to_q": 4, "to_q": 8}}, 1.0),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 8, "attn1.to_q": 4}}, 2.0),  # as in PEFT
        ({"lora_alpha": 2, "alpha_pattern": {"o_q": 8, "blocks.1.attn1.to_q": 8}}, 0.5),
        ({"r": 4}, 1.0),
    ],
)
def test_an_alpha_in_the_header_counts(
    config: dict[str, Any], scale: float, prefix: str, tmp_path: Path
) -> None:
    factors = pair(Q)
    tensors = {f"transformer.{key.replace(Q, DIFFUSERS_Q)}": one for key, one in factors.items()}
    metadata = {f"{prefix}{key}": value for key, value in config.items()}
    expected = wide(base(NAME)) + scale * product(factors, Q)
    assert is_close(merged(tmp_path, NAME, tensors, lora_adapter_metadata=metadata), expected)


def test_the_header_of_another_part_of_a_pipeline_does_not_count(tmp_path: Path) -> None:
    metadata = {"text_encoder.lora_alpha": 2}
    expected = wide(base(NAME)) + product(pair(Q), Q)
    assert is_close(merged(tmp_path, NAME, pair(Q), lora_adapter_metadata=metadata), expected)


def test_an_alpha_beside_the_factors_comes_before_the_header(tmp_path: Path) -> None:
    tensors = pair(Q) | {f"{Q}.alpha": torch.tensor(2.0)}
    expected = wide(base(NAME)) + 0.5 * product(tensors, Q)
    metadata = {"transformer.lora_alpha": 64}
    assert is_close(merged(tmp_path, NAME, tensors, lora_adapter_metadata=metadata), expected)


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "2"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": [2]},
        {"lora_alpha": 2, "alpha_pattern": [1]},
        {"lora_alpha": 2, "alpha_pattern": {"to_q": "x"}},
        {"lora_alpha": 2, "alpha_pattern": {"blocks.(0|1).*": 4}},
        3,
        None,
    ],
)
def test_damaged_alphas_in_the_header_are_refused(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="damaged lora_adapter_metadata in its header") as error:
        merged(tmp_path, NAME, pair(Q), lora_adapter_metadata=metadata)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1.0),
        ("C:\\loras\\a.safetensors:2", "C:\\loras\\a.safetensors", 2.0),
        ("C:/a:b.safetensors", "C:/a:b.safetensors", 1.0),
        ("/x/a:0.5:0.25", "/x/a:0.5", 0.25),
        ("x" * 5000 + ":2", "x" * 5000, 2.0),
    ],
)
def test_a_file_is_told_from_its_strength(text: str, file: str, strength: float) -> None:
    assert parse_lora(text) == (Path(file), strength)


@pytest.mark.parametrize("name", ["a:0.5", "a:nan", "a:"])
def test_a_file_with_a_colon_in_its_name_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.touch()
    assert parse_lora(str(file)) == (file, 1.0)
    assert parse_lora(f"{file}:0.25") == (file, 0.25)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a:nan", "has the strength nan: expected a finite number"),
        ("a:inf", "has the strength inf"),
        ("a:-Infinity", "has the strength -inf"),
        ("a:1e999", "has the strength inf"),
        ("a:", "ends in a colon"),
        ("a: ", "ends in a colon"),
        ("", "names no LoRA file"),
        (" ", "names no LoRA file"),
        (":0.5", "names no LoRA file"),
    ],
)
def test_a_strength_or_file_that_cannot_be_is_refused(text: str, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        parse_lora(text)
