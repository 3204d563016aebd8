"""The weights file: one cast for each tensor, content hashes, and seeded random weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.wan_reference import convert, small_config, with_changes, write_official
from wanexport.graphs import source_tensor
from wanexport.graphs.checkpoint import open_checkpoint
from wanexport.graphs.weights import CheckpointWeights, RandomWeights, read_tensor, write_weights
from wanexport.runtime.bundle.signature import parameter_shapes, weights_layout
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.wan_config import WanConfig


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype_is_cast_once_by_the_policy(
    source: torch.dtype, dtype: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    stored = {name: tensor.to(source) for name, tensor in state.items()}
    convert(write_official(tmp_path / "in", stored, config), tmp_path / "out", dtype)
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    written = load_file(tmp_path / "out")
    for name in ("patch_embedding.weight", "blocks.1.ffn.2.bias", "text_embedding.2.weight"):
        torch.testing.assert_close(written[name], stored[name].to(target), atol=0, rtol=0)
    for name in ("time_projection.1.weight", "blocks.0.modulation", "blocks.1.norm3.bias"):
        torch.testing.assert_close(written[name], stored[name].float(), atol=0, rtol=0)


def test_values_beyond_fp16_are_refused(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    large = with_changes(state, text_embedding__0__bias=torch.full((256,), 1e5))
    folder = write_official(tmp_path / "in", large, config)
    with pytest.raises(BadRequest, match=r"text_embedding\.0\.bias has values beyond fp16"):
        convert(folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_counted_and_refused_by_name(
    dtype: str, stored: torch.dtype, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    bad = state["blocks.1.ffn.0.weight"].clone()
    bad[3, 7] = bad[200, 0] = float("nan")
    bad[5, 5] = float("-inf")
    damaged = with_changes(state, blocks__1__ffn__0__weight=bad)
    stored_alike = {name: tensor.to(stored) for name, tensor in damaged.items()}
    folder = write_official(tmp_path / "in", stored_alike, config)
    message = r"blocks\.1\.ffn\.0\.weight has 2 NaN and 1 infinite of 262144 values"
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match=message):
        convert(folder, tmp_path / "out" / "x", dtype)
    assert not any((tmp_path / "out").iterdir())
    tensor = open_checkpoint(folder).tensors[""]["blocks.1.ffn.0.weight"]
    with pytest.raises(BadRequest, match=message):
        read_tensor(tensor)


def test_all_chunks_of_a_tensor_are_counted(
    state: dict[str, Tensor],
    config: WanConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_tensor, "CHUNK", 1000)
    bad = state["head.head.weight"].clone()
    bad.flatten()[[0, 999, 1000, -1]] = float("nan")
    folder = write_official(tmp_path / "in", with_changes(state, head__head__weight=bad), config)
    with pytest.raises(BadRequest, match=r"head\.weight has 4 NaN and 0 infinite of 16384"):
        convert(folder, tmp_path / "out")


def test_values_beyond_a_dtype_are_counted_and_the_remedy_told(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    large = torch.zeros(256)
    large[:2], large[2] = 1e5, -3.4e38
    folder = write_official(
        tmp_path / "in", with_changes(state, text_embedding__0__bias=large), config
    )
    name = r"text_embedding\.0\.bias has values beyond"
    with pytest.raises(BadRequest, match=rf"{name} fp16's 65504 \(3 of 256\): .* bf16 or fp32"):
        convert(folder, tmp_path / "out", "fp16")
    with pytest.raises(BadRequest, match=rf"{name} bf16's 3.38953e\+38 \(1 .* --dtype fp32$"):
        convert(folder, tmp_path / "out", "bf16")
    convert(folder, tmp_path / "out", "fp32")
    tensor = open_checkpoint(folder).tensors[""]["text_embedding.0.bias"]
    with pytest.raises(BadRequest, match=name):
        read_tensor(tensor, fits=torch.float16)
    torch.testing.assert_close(read_tensor(tensor, fits=torch.float32), large, atol=0, rtol=0)


def test_the_largest_value_that_rounds_into_fp16_is_taken(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    edge = torch.full((256,), 65519.0)
    folder = write_official(
        tmp_path / "in", with_changes(state, text_embedding__0__bias=edge), config
    )
    convert(folder, tmp_path / "out", "fp16")
    assert load_file(tmp_path / "out")["text_embedding.0.bias"].max() == 65504


def test_the_digest_follows_the_content_not_the_files(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        return CheckpointWeights(open_checkpoint(folder).tensors[""]).digest()

    one = digest(write_official(tmp_path / "a", state, config))
    assert digest(write_official(tmp_path / "b", state, config)) == one
    changed = with_changes(state, head__head__bias=state["head.head.bias"] * 1.01)
    assert digest(write_official(tmp_path / "c", changed, config)) != one


def test_random_weights_depend_on_seed_and_expert_alone(tmp_path: Path) -> None:
    config = small_config("t2v-1.3b")

    def content(seed: int, expert: str, used: WanConfig = config) -> bytes:
        path = tmp_path / "x"
        write_weights(path, used, "fp32", RandomWeights(used, seed, expert))
        return path.read_bytes()

    assert content(0, "") == content(0, "")
    assert content(0, "") != content(1, "")
    assert content(0, "high_noise") != content(0, "low_noise")
    tensors = load_file(tmp_path / "x")
    content(0, "low_noise", replace(config, num_layers=1))
    fewer = load_file(tmp_path / "x")
    torch.testing.assert_close(fewer["head.head.weight"], tensors["head.head.weight"])


def test_random_weights_have_the_stated_spread() -> None:
    config = small_config("t2v-1.3b")
    source = RandomWeights(config, 0, "")
    matrix = torch.cat(list(source.chunks("text_embedding.0.weight")))
    assert matrix.std().item() == pytest.approx(4096**-0.5, rel=0.01)
    assert abs(matrix.mean().item()) < 1e-3
    norm = torch.cat(list(source.chunks("blocks.0.norm3.weight")))
    assert norm.mean().item() == pytest.approx(1, abs=0.03)


def test_experts_share_one_header() -> None:
    header, entries = weights_layout(small_config("t2v-a14b"), "bf16")
    assert header == weights_layout(small_config("t2v-1.3b"), "bf16")[0]
    assert set(entries) == set(parameter_shapes(small_config("t2v-a14b")))
