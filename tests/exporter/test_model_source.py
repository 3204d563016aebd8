"""What -m means: a folder, a file, a hub id, and in one line what it is not."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import save_file
from torch import Tensor

from wanexport.exporter.model_source import resolve
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.wan_config import WanConfig

REPOSITORY = (
    "config.json", "README.md", "Wan2.1_VAE.pth", "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin.index.json",
    "model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json", "transformer/optimizer.pt",
    "transformer_2/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    "high_noise_model/config.json", "high_noise_model/diffusion_pytorch_model.safetensors",
    "low_noise_model/diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip


def serve(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> list[str]:
    """Answer downloads with a folder or an error; the files of the repository that are fetched."""
    fetched: list[str] = []

    def snapshot_download(repo: str, *, revision: None, allow_patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns))
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


def test_of_a_repository_only_what_is_read_is_downloaded(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    fetched = serve(monkeypatch, tmp_path)
    assert resolve("Wan-AI/Wan2.1-T2V-1.3B", None).record["hub"] == "Wan-AI/Wan2.1-T2V-1.3B"
    left_out = {"README.md", "Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.safetensors",
                "transformer/optimizer.pt"}  # fmt: skip
    assert set(fetched) == {n for n in REPOSITORY if ".bin" not in n} - left_out


def test_a_repository_of_one_expert_is_refused_by_its_name(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    serve(monkeypatch, tmp_path)
    with pytest.raises(WanExportError, match=r"me/wan-high-noise is one expert of an A14B"):
        resolve("me/wan-high-noise", None)
    assert resolve("me/wan-high-noise", None, expert_alone=True).experts == ()


class Missing(RepositoryNotFoundError):
    """What the client raises for a repository that is not there, without its HTTP answer."""

    def __init__(self) -> None:
        Exception.__init__(self, "404\nRequest ID: x")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Missing(), "a/b is neither a folder here nor a repository of the hub"),
        (LocalEntryNotFoundError("no\nroute"), "a/b is neither a folder here nor in the hub's cac"),
        (OSError("disk\nfull"), "cannot get a/b from the hub: disk full; download it"),
        (ValueError("x" * 5000), "cannot get a/b from the hub: xxx"),
        (None, r"a/b has no diffusion_pytorch_model\*\.safetensors where a Wan has them: name"),
    ],
)
def test_a_repository_that_gives_no_model_is_one_line(
    result: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, result or tmp_path)
    with pytest.raises(WanExportError, match=message) as refused:
        resolve("a/b", None)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "-m is empty: name a folder, a file or a hub id"),
        (" \n", "-m is empty"),
        ("x" * 10_000, r"xxx \.\.\. x+ does not exist: expected a checkpoint folder, or a hub id"),
        ("a/" + "x" * 10_000, "does not exist"),
        ("a/b\nc", r"a/b\\nc does not exist"),
        ("a\n\x1b[31m", r"a\\n\\x1b\[31m does not exist"),
        ("a\0b", r"a\\x00b does not exist"),
        ("a/b/c", "does not exist"),
        ("a/b?x", "does not exist"),
        ("../a", "does not exist"),
        ("-a/b", "does not exist"),
        ("~/a", "does not exist"),
        ("t2v-1.3", "does not exist"),
        ("t2v-1.3b", "is a preset, not a checkpoint: add --random-weights"),
    ],
)
def test_a_name_that_is_nothing_is_one_line(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WanExportError, match=message) as refused:
        resolve(name, None)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["", "x" * 10_000, "a\nb"])
def test_a_name_that_is_no_preset_is_one_line(name: str) -> None:
    with pytest.raises(WanExportError, match=r"is no preset|-m is empty") as refused:
        resolve(name, 0)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


def test_a_link_to_nothing_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/b").symlink_to("gone")
    with pytest.raises(WanExportError, match="cannot read a/b: No such file"):
        resolve("a/b", None)
    shutil.rmtree("a")


COMFY = "split_files/diffusion_models/wan_[1].safetensors"


def test_a_file_of_a_repository_is_named_after_a_colon(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / COMFY).parent.mkdir(parents=True)
    save_file(state, tmp_path / COMFY)
    patterns: list[str] = []

    def snapshot_download(repo: str, *, revision: None, allow_patterns: list[str]) -> str:
        patterns.extend([repo, *allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = resolve(f"Comfy-Org/Wan:{COMFY}", None)
    assert (source.record["hub"], source.record["file"]) == ("Comfy-Org/Wan", COMFY)
    assert list(filter_repo_objects([COMFY, "other"], allow_patterns=patterns[1:])) == [COMFY]
    low = tmp_path / "low.safetensors"
    save_file(state, low)
    pair = resolve(f"Comfy-Org/Wan:{COMFY}", None, low_noise=str(low))
    assert pair.experts == ("high_noise", "low_noise") and pair.record["low_noise"] == str(low)
    with pytest.raises(BadRequest, match=r"me/wan has no file gone\.gguf: look up its name"):
        resolve("me/wan:gone.gguf", None)


@pytest.mark.parametrize("file", ["../x.gguf", "/etc/passwd", "a/../../x", "a\\..\\x", ".."])
def test_a_file_outside_a_repository_is_refused_before_a_download(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(BadRequest, match="is no file of a repository: expected one as in"):
        resolve(f"me/wan:{file}", None)


def test_a_family_is_taken_where_the_tensors_are_of_two(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "wan.safetensors")
    path = str(tmp_path / "wan.safetensors")
    plain, causal = resolve(path, None), resolve(path, None, family="self-forcing")
    assert plain.config == config and resolve(path, None, family="t2v").config == config
    assert causal.config == replace(config, family="self-forcing") and causal.name == "self-forcing"
    assert resolve("self-forcing-1.3b", 0, family="t2v").name == "t2v-1.3b"
    with pytest.raises(BadRequest, match=r"--family i2v: the tensors of .* are of family t2v"):
        resolve(path, None, family="i2v")


def test_a_causal_file_is_taken_as_plain_where_that_is_asked_for(
    state: dict[str, Tensor], config: WanConfig, tmp_path: Path
) -> None:
    torch.save({"generator": state}, tmp_path / "wan.pt")
    assert resolve(str(tmp_path / "wan.pt"), None).config.family == "self-forcing"
    assert resolve(str(tmp_path / "wan.pt"), None, family="t2v").config == config
