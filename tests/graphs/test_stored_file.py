"""Files of every format and spelling give one model: safetensors, torch.save and GGUF."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.wan_reference import diffusers_model, small_config
from wanexport.graphs.checkpoint import Checkpoint, open_checkpoint
from wanexport.graphs.foreign import PREFIXES
from wanexport.graphs.weights import CheckpointWeights, read_tensor, write_weights
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.wan_config import WanConfig

Q = "blocks.0.self_attn.q.weight"


def check(checkpoint: Checkpoint, state: dict[str, Tensor], config: WanConfig) -> None:
    """What is read is the state, to the bit."""
    assert checkpoint.config == config
    found = checkpoint.tensors[""]
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(read_tensor(found[name]), tensor, atol=0, rtol=0)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_taken_off(
    prefix: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    save_file({prefix + n: t for n, t in state.items()}, tmp_path / "wan.safetensors")
    check(open_checkpoint(tmp_path / "wan.safetensors"), state, config)


def test_a_prefix_of_diffusers_names_is_taken_off(config: WanConfig, tmp_path: Path) -> None:
    model = diffusers_model(config)
    tensors = {f"model.{n}": t.contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "wan.safetensors")
    checkpoint = open_checkpoint(tmp_path / "wan.safetensors")
    assert (checkpoint.layout, checkpoint.config) == ("diffusers", config)


FSDP = "_fsdp_wrapped_module."


@pytest.mark.parametrize("before", ["", "model.", "generator.model."])
@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: FSDP + name,
        lambda name: re.sub(r"^(blocks\.\d+\.)", rf"\1{FSDP}", name),
        lambda name: FSDP + re.sub(r"^(blocks\.\d+\.)(\w+\.)", rf"\1{FSDP}\2{FSDP}", name),
    ],
)
def test_what_fsdp_puts_into_names_is_taken_out(
    before: str,
    renamed: Callable[[str], str],
    state: dict[str, Tensor],
    config: WanConfig,
    tmp_path: Path,
) -> None:
    save_file({before + renamed(n): t for n, t in state.items()}, tmp_path / "wan.safetensors")
    check(open_checkpoint(tmp_path / "wan.safetensors"), state, config)


@pytest.mark.parametrize("prefix", ["model.", FSDP])
def test_a_name_with_and_without_the_prefix_is_refused(
    prefix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    twice = {**{prefix + n: t for n, t in state.items()}, Q: state[Q].clone()}
    save_file(twice, tmp_path / "wan.safetensors")
    with pytest.raises(BadRequest, match=f"names twice, with and without {prefix}: "):
        open_checkpoint(tmp_path / "wan.safetensors")


Saved = Callable[[dict[str, Tensor]], Any]
SAVED: dict[str, Saved] = {
    "a state dict": lambda state: state,
    "under model": lambda state: {"model": state, "step": 3},
    "under state_dict": lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}},
    "Self-Forcing": lambda state: {
        "generator": {f"model.{n}": t + 1 for n, t in state.items()},
        "generator_ema": {f"model.{n}": t for n, t in state.items()},
    },
    "Self-Forcing, one": lambda state: {"generator": {f"model.{n}": t for n, t in state.items()}},
    "FSDP": lambda state: {
        "generator": {f"model._fsdp_wrapped_module.{n}": t for n, t in state.items()}
    },
    "channels last": lambda state: {
        **state,
        "patch_embedding.weight": state["patch_embedding.weight"].to(
            memory_format=torch.channels_last_3d
        ),
    },
}


@pytest.mark.parametrize("name", ["wan.pt", "wan.pth", "wan.bin", "wan.safetensors"])
@pytest.mark.parametrize("form", SAVED)
def test_files_of_torch_save_are_read(
    form: str, name: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    torch.save(SAVED[form](dict(state)), tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    # A generator is what Self-Forcing and its relatives call their model.
    is_causal = "generator" in SAVED[form](dict(state))
    config = replace(config, family="self-forcing") if is_causal else config
    check(checkpoint, state, config)
    if form == "Self-Forcing":
        weights = CheckpointWeights(checkpoint.tensors[""])
        write_weights(tmp_path / "out", config, "fp32", weights)
        np.testing.assert_array_equal(load_arrays(tmp_path / "out")[Q], state[Q].numpy())


def training(*names: str) -> Saved:
    """A training's file with these models, of which the average is the state, the other one off."""
    offsets = {"generator": 1, "generator_ema": 0}

    def saved(state: dict[str, Tensor]) -> Any:
        return {
            name: {f"model.{n}": t + offsets[name] for n, t in state.items()} for name in names
        } | {"step": 3}

    return saved


BOTH = ("generator_ema", "generator")


@pytest.mark.parametrize(
    ("names", "ema", "read"),
    [
        (BOTH, None, "generator_ema"),
        (BOTH, True, "generator_ema"),
        (BOTH, False, "generator"),
        (BOTH[::-1], False, "generator"),
        (["generator"], None, "generator"),
        (["generator"], False, "generator"),
        (["generator_ema"], None, "generator_ema"),
        (["generator_ema"], True, "generator_ema"),
    ],
)
def test_of_a_trainings_two_models_the_one_that_was_asked_for_is_read(
    names: list[str],
    ema: bool | None,
    read: str,
    state: dict[str, Tensor],
    config: WanConfig,
    tmp_path: Path,
) -> None:
    torch.save(training(*names)(state), tmp_path / "wan.pt")
    checkpoint = open_checkpoint(tmp_path / "wan.pt", ema=ema)
    assert checkpoint.generator == read
    expected = {n: t + (read == "generator") for n, t in state.items()}
    check(checkpoint, expected, replace(config, family="self-forcing"))


@pytest.mark.parametrize(
    ("names", "ema", "message"),
    [
        (["generator"], True, r"^--ema: .*wan.pt has no generator_ema, it holds generator alone: "),
        (
            ["generator_ema"],
            False,
            r"^--no-ema: .* has no generator, it holds generator_ema alone: leave --no-ema out",
        ),
    ],
)
def test_a_trainings_model_that_is_not_there_is_refused(
    names: list[str], ema: bool, message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(training(*names)(state), tmp_path / "wan.pt")
    with pytest.raises(BadRequest, match=message) as refused:
        open_checkpoint(tmp_path / "wan.pt", ema=ema)
    assert "\n" not in str(refused.value)


def test_an_average_that_has_not_begun_is_none(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    torch.save({"generator": dict(state), "generator_ema": {}}, tmp_path / "wan.pt")
    checkpoint = open_checkpoint(tmp_path / "wan.pt")
    assert checkpoint.generator == "generator"
    check(checkpoint, state, replace(config, family="self-forcing"))
    with pytest.raises(BadRequest, match="has no generator_ema, it holds generator alone"):
        open_checkpoint(tmp_path / "wan.pt", ema=True)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("form", ["a state dict", "under model", "safetensors", "GGUF"])
def test_a_file_of_one_model_has_no_generator(
    form: str, ema: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "wan"
    if form == "safetensors":
        save_file(state, path)
    elif form == "GGUF":
        write_gguf(path, state)
    else:
        torch.save(SAVED[form](dict(state)), path)
    assert open_checkpoint(path).generator == ""
    with pytest.raises(BadRequest, match=r"it holds one model, under neither generator nor gene"):
        open_checkpoint(path, ema=ema)


def test_files_of_two_trainings_are_not_mixed(state: dict[str, Tensor], tmp_path: Path) -> None:
    names = sorted(state)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for number, (own, models) in enumerate(zip(halves, (BOTH, ("generator",))), 1):
        saved = training(*models)({name: state[name] for name in own})
        torch.save(saved, tmp_path / f"wan-0000{number}-of-00002.pt")
    with pytest.raises(BadRequest, match=r"has files with generator_ema and files without: add --"):
        open_checkpoint(tmp_path)
    check_generator = open_checkpoint(tmp_path, ema=False)
    assert check_generator.generator == "generator"


def test_a_file_of_torch_before_zip_is_read(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "wan.pt", _use_new_zipfile_serialization=False)
    check(open_checkpoint(tmp_path / "wan.pt"), state, config)


def test_a_folder_with_a_model_among_other_parts_is_read(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "wan.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"x": torch.ones(1)}, tmp_path / "Wan2.1_VAE.pth")
    check(open_checkpoint(tmp_path), state, config)


def looped() -> dict[str, Any]:
    """A dictionary that holds itself."""
    saved: dict[str, Any] = {}
    saved["model"] = saved
    return saved


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (lambda state: [1, 2], "has no model: expected tensors by name"),
        (lambda state: {"step": 3}, "has no model"),
        (lambda state: looped(), "has no model"),
        (lambda state: {**state, "config": {"dim": 3}}, "has no model"),
        (
            lambda state: {**state, Q: torch.zeros(1, 1).expand(256, 256)},
            "q.weight of .* repeats or leaves out stored values",
        ),
        (
            lambda state: {**state, Q: torch.zeros(1).expand(10**12)},
            "q.weight of .* repeats or leaves out stored values",
        ),
        (lambda state: {**state, Q: torch.zeros(256, 512)[:, ::2]}, "repeats or leaves out"),
        (lambda state: {**state, Q: state[Q].to_sparse()}, "is a torch.sparse_coo tensor on cpu"),
        (lambda state: {**state, Q: state["blocks.0.self_attn.k.weight"]}, "in one place: save"),
        (
            lambda state: dict(zip((Q, "x"), torch.zeros(300, 256)[44:], strict=False)),
            "no head.modulation|is no Wan|does not fit",
        ),
        (lambda state: {**state, Q: state[Q].to(torch.complex32)}, "is of torch.complex32"),
    ],
)
def test_what_torch_saved_otherwise_is_refused(
    saved: Saved, message: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(saved(dict(state)), tmp_path / "wan.pt")
    with pytest.raises(BadRequest, match=message):
        open_checkpoint(tmp_path / "wan.pt")


class Code:
    """What would run when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


def test_nothing_of_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Code()}, tmp_path / "wan.pt")
    with pytest.raises(WanExportError, match="could run code, and is not read"):
        open_checkpoint(tmp_path / "wan.pt")
    assert capsys.readouterr().out == ""


def write_gguf(
    path: Path,
    state: dict[str, Tensor],
    *,
    folds: bool = False,
    architecture: str = "wan",
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """A GGUF file of Q8_0 blocks and F32; the values that it stands for.

    With folds, tensors have at most 4 dimensions and no leading ones, as stable-diffusion.cpp has
    them.
    """
    writer, values = gguf.GGUFWriter(path, architecture), {}
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in state.items():
        array = tensor.float().numpy()
        values[name] = array
        if folds and array.ndim == 5:
            array = array.reshape(-1, *array.shape[2:])
        if folds and array.ndim == 3:
            array = array[0]
        if name.startswith("blocks.") and array.ndim == 2 and name.endswith(".weight"):
            raw = gguf.quants.quantize(array, q8)
            writer.add_tensor(prefix + name, raw, raw_dtype=q8)
            values[name] = gguf.quants.dequantize(raw, q8)
        else:
            writer.add_tensor(prefix + name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize(
    ("architecture", "prefix"),
    [("wan", ""), ("wan", "model.diffusion_model."), ("", ""), ("pig", ""), ("cow", "")],
)
@pytest.mark.parametrize("folds", [False, True])
def test_a_gguf_file_is_read_to_the_bit(
    folds: bool,
    architecture: str,
    prefix: str,
    state: dict[str, Tensor],
    config: WanConfig,
    tmp_path: Path,
) -> None:
    values = write_gguf(
        tmp_path / "wan.gguf", state, folds=folds, architecture=architecture, prefix=prefix
    )
    checkpoint = open_checkpoint(tmp_path / "wan.gguf")
    assert checkpoint.config == config
    assert checkpoint.stored == "F32, 49 tensors; GGUF Q8_0, 20 tensors"
    weights = CheckpointWeights(checkpoint.tensors[""])
    write_weights(tmp_path / "out", config, "fp32", weights)
    for name, array in load_arrays(tmp_path / "out").items():
        np.testing.assert_array_equal(array, values[name], name)


def test_a_gguf_file_of_i2v_is_read_though_its_dimensions_are_folded(tmp_path: Path) -> None:
    config = small_config("flf2v-14b", 1)
    from tests.oracles.wan_reference import official_state

    write_gguf(tmp_path / "wan.gguf", official_state(diffusers_model(config)), folds=True)
    assert open_checkpoint(tmp_path / "wan.gguf").config == config


def test_a_gguf_file_of_another_model_and_a_cut_one_are_refused(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "wan.gguf"
    write_gguf(path, state, architecture="flux")
    with pytest.raises(BadRequest, match="is a GGUF file of flux, no Wan: pass -m"):
        open_checkpoint(path)
    write_gguf(path, state)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(BadRequest, match="is cut short"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["wan.gguf", "wan.pt", "wan.safetensors"])
def test_a_folder_holds_one_model_of_any_format(
    name: str, state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    if name.endswith("gguf"):
        write_gguf(tmp_path / name, state)
    elif name.endswith("pt"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    (tmp_path / "README.md").write_text("# A model")
    assert open_checkpoint(tmp_path).config == config
