"""The text encoder gives what the official code gives, from either layout."""

import gc
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles.official_encoders import (
    IMAGE_SIZES,
    PROMPTS,
    TEXT_SIZES,
    UMT5_XXL,
    VALUES,
    image_shapes,
    state,
    text_shapes,
    write_tokenizer,
)
from tests.oracles.transformers_encoders import umt5_embedding, umt5_of
from tests.runtime.parts.test_torch_checkpoint import mapped_ranges
from wanexport.runtime.bundle import piece_reading
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    EngineFailure,
    WanExportError,
    WanExportWarning,
)
from wanexport.runtime.parts import fill_model, umt5_files
from wanexport.runtime.parts.fill_model import read_to
from wanexport.runtime.parts.stored import StoredTensor
from wanexport.runtime.parts.text_encoder import UMT5TextEncoder, clean_prompt, open_text_encoder

OFFICIAL = json.loads(VALUES.read_text())["prompts"]
PROMPT = PROMPTS[0]
pytestmark = pytest.mark.filterwarnings("ignore:the prompt .* tokens")  # one of PROMPTS is cut


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with encoder.pth, fp32, and tokenizer/; a test must not change it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.save(state(text_shapes(TEXT_SIZES)), folder / "encoder.pth")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def encoder(checkpoint: Path) -> UMT5TextEncoder:
    """The encoder in fp32."""
    return open_text_encoder(checkpoint / "encoder.pth", checkpoint / "tokenizer", dtype="fp32")


def write_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """The encoder of these official tensors in diffusers' layout, in shards, as it is published."""
    umt5_of(tensors, TEXT_SIZES).save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same encoder, fp32, in diffusers' layout."""
    return write_folder(tmp_path / "text_encoder", state(text_shapes(TEXT_SIZES)))


def write_with(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The official file after a change of its tensors."""
    tensors = state(text_shapes(TEXT_SIZES))
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


@pytest.mark.parametrize(("prompt", "official"), list(zip(PROMPTS, OFFICIAL)))
def test_prompts_are_cleaned_as_the_official_code_cleans_them(prompt: str, official: Any) -> None:
    assert clean_prompt(prompt) == official["cleaned"]


@pytest.mark.parametrize(("prompt", "official"), list(zip(PROMPTS, OFFICIAL)))
def test_embeddings_are_those_of_the_official_code(
    encoder: UMT5TextEncoder, prompt: str, official: Any
) -> None:
    (embedding,) = encoder([clean_prompt(prompt)])
    assert embedding.dtype == np.float32
    assert embedding.shape == (official["tokens"], encoder.text_dim)
    for row, values in official["rows"].items():
        np.testing.assert_allclose(embedding[int(row)], values, atol=2e-5)


def test_weights_and_arithmetic_are_bf16_where_nothing_else_is_asked_for(
    encoder: UMT5TextEncoder, checkpoint: Path
) -> None:
    rounded = open_text_encoder(checkpoint / "encoder.pth", checkpoint / "tokenizer")
    assert rounded._model is not None
    assert {parameter.dtype for parameter in rounded._model.parameters()} == {torch.bfloat16}
    (ours,), (exact,) = rounded([PROMPT]), encoder([PROMPT])
    assert 1e-4 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 4e-2


def test_an_embedding_does_not_depend_on_the_prompts_beside_it(encoder: UMT5TextEncoder) -> None:
    together = encoder(PROMPTS)
    alone = [encoder([prompt])[0] for prompt in PROMPTS]
    assert len(together) == len(PROMPTS)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(together, alone))


def test_a_prompt_that_is_cut_is_warned_of(encoder: UMT5TextEncoder) -> None:
    words = "circle " * 511  # with the end token as many as there may be
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (whole,) = encoder([words.strip()])
    with pytest.warns(WanExportWarning, match="more than 512 tokens: .* character 3576 of 3590 is"):
        (cut,) = encoder([words + "circle circle"])
    assert whole.shape[0] == 512
    np.testing.assert_array_equal(cut, whole)


def test_an_encoder_that_a_gpu_does_not_hold_runs_on_the_cpu_and_says_so(
    encoder: UMT5TextEncoder, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def full(device: torch.device, *_: object) -> dict[str, Tensor]:
        asked.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fill_model, "read_to", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 10**10))
    files = (checkpoint / "encoder.pth", checkpoint / "tokenizer")
    with pytest.warns(WanExportWarning, match=r"5\.0 GB free, which do not hold the text encoder"):
        opened = open_text_encoder(*files, device="cuda:1", dtype="fp32")
    assert asked == [torch.device("cuda:1")]
    np.testing.assert_array_equal(opened([PROMPT])[0], encoder([PROMPT])[0])


def test_padding_that_tokenizer_json_asks_for_is_left_out(
    encoder: UMT5TextEncoder, checkpoint: Path, tmp_path: Path
) -> None:
    saved = json.loads((checkpoint / "tokenizer" / "tokenizer.json").read_text())
    saved["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    padding = open_text_encoder(checkpoint / "encoder.pth", tmp_path, dtype="fp32")
    assert np.array_equal(padding([PROMPT])[0], encoder([PROMPT])[0])


@pytest.mark.parametrize("layout", ["official", "diffusers", "pickled"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_both_layouts_give_the_bits_of_transformers(
    layout: str, dtype: str, checkpoint: Path, tmp_path: Path
) -> None:
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    tensors = {name: t.to(kind) for name, t in state(text_shapes(TEXT_SIZES)).items()}
    theirs = umt5_of(tensors, TEXT_SIZES)
    if layout == "official":
        path = tmp_path / "encoder.pth"
        torch.save(tensors, path)
    else:
        path = write_folder(tmp_path / "text_encoder", tensors)
    if layout == "pickled":
        for file in path.glob("model*"):
            file.unlink()
        torch.save(theirs.state_dict(), path / "pytorch_model.bin")
    opened = open_text_encoder(path, checkpoint / "tokenizer", dtype=dtype)
    for prompt, embedding in zip(PROMPTS, opened(PROMPTS)):
        ids = opened._tokenizer.encode(prompt).ids
        assert np.array_equal(embedding, umt5_embedding(theirs, ids).float().numpy()), prompt


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_several_threads_read_to_a_device_are_the_file_s_values(
    layout: str, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: t.to(stored) for name, t in state(text_shapes(TEXT_SIZES)).items()}
    path = tmp_path / "encoder.pth"
    if layout == "official":
        torch.save(tensors, path)
    else:
        path = write_folder(tmp_path / "text_encoder", tensors)
    _, found = umt5_files.find_umt5(path)
    assert all(each.file is not None for each in found.values())
    monkeypatch.setattr(piece_reading, "PIECE", 256)
    with torch.inference_mode():
        values = read_to(torch.device("cpu"), found, torch.bfloat16)
    assert values.keys() == tensors.keys()
    for name, value in values.items():
        assert torch.equal(value, tensors[name].bfloat16()), name
        assert value.data_ptr() % 16 == 0
        value.zero_()  # which it is not of a caller in inference mode


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_has_the_bits_of_transformers(
    layout: str, stored: torch.dtype, checkpoint: Path, tmp_path: Path
) -> None:
    tensors = {name: t.to(stored) for name, t in state(text_shapes(TEXT_SIZES)).items()}
    path = tmp_path / "encoder.pth"
    if layout == "official":
        torch.save(tensors, path)
    else:
        path = write_folder(tmp_path / "text_encoder", tensors)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    theirs = umt5_of(rounded, TEXT_SIZES).to("cuda")
    opened = open_text_encoder(path, checkpoint / "tokenizer", device="cuda")
    assert opened._model is not None
    for name, parameter in opened._model.named_parameters():
        assert torch.equal(parameter.cpu(), rounded[name]), name
    for prompt, embedding in zip(PROMPTS, opened(PROMPTS)):
        ids = opened._tokenizer.encode(prompt).ids
        assert np.array_equal(embedding, umt5_embedding(theirs, ids).float().cpu().numpy()), prompt


def test_what_lies_in_no_file_as_it_is_is_copied_to_a_device(tmp_path: Path) -> None:
    tensors = state(text_shapes(TEXT_SIZES))
    tensors["norm.weight"] = torch.stack([tensors["norm.weight"]] * 2, 1)[:, 0]  # every other value
    for name, as_zip in (("zip.pth", True), ("old.pth", False)):
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=as_zip)
        _, found = umt5_files.find_umt5(tmp_path / name)
        assert found["norm.weight"].file is None
        assert (found["token_embedding.weight"].file is None) is not as_zip
        values = read_to(torch.device("cpu"), found, torch.float32)
        assert all(torch.equal(value, tensors[each]) for each, value in values.items())


def test_a_file_that_changes_before_it_is_read_to_a_device_is_refused(tmp_path: Path) -> None:
    torch.save(state(text_shapes(TEXT_SIZES)), tmp_path / "encoder.pth")
    _, found = umt5_files.find_umt5(tmp_path / "encoder.pth")
    torch.save(state(text_shapes(TEXT_SIZES)), tmp_path / "other.pth")
    (tmp_path / "other.pth").replace(tmp_path / "encoder.pth")
    with pytest.raises(BundleError, match=r"encoder\.pth was changed since it was checked"):
        read_to(torch.device("cpu"), found, torch.float32)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_bf16_checkpoint_is_not_copied(layout: str, checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in state(text_shapes(TEXT_SIZES)).items()}
    path = tmp_path / "bf16.pth"
    if layout == "official":
        torch.save(tensors, path)
    else:
        path = write_folder(tmp_path / "text_encoder", tensors)
    opened = open_text_encoder(path, checkpoint / "tokenizer")
    files = [path] if layout == "official" else list(path.glob("*.safetensors"))
    mapped = [each for file in files for each in mapped_ranges(file)]
    assert opened._model is not None
    for name, parameter in opened._model.named_parameters():
        assert any(parameter.data_ptr() in each for each in mapped), name


def test_the_published_encoder_has_these_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = text_shapes(UMT5_XXL)
    published = {n: StoredTensor(torch.empty(s, device="meta")) for n, s in shapes.items()}
    monkeypatch.setattr(umt5_files, "read_stored", lambda _: published)
    model, _ = umt5_files.find_umt5(Path("published.pth"))
    config = model.config
    assert (config.dim, config.head_dim, config.ffn_dim) == (4096, 64, 10240)
    assert (config.num_layers, config.num_heads, config.vocab_size) == (24, 64, 256384)
    # google/umt5-xxl's encoder: 5.68e9 parameters.
    assert sum(parameter.numel() for parameter in model.parameters()) == 5680910336


def test_close_frees_the_model_at_once(encoder: UMT5TextEncoder) -> None:
    encoder([PROMPT])
    assert encoder._model is not None
    model = weakref.ref(encoder._model)
    gc.disable()  # what runs by itself
    try:
        encoder.close()
    finally:
        gc.enable()
    encoder.close()
    assert model() is None
    with pytest.raises(EngineFailure, match="text encoder is closed: open it again"):
        encoder([PROMPT])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("token_embedding.weight"), "is no umT5 encoder: it has no token_"),
        (lambda t: t.pop("blocks.1.ffn.fc2.weight"), r"missing blocks\.1\.ffn\.fc2\.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda t: t.update({"norm.weight": torch.ones(5)}),
            r"norm.weight is \[5\], expected \[24",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=message) as refused:
        open_text_encoder(write_with(tmp_path, change), checkpoint / "tokenizer")
    assert "\n" not in str(refused.value)


def test_the_file_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(state(image_shapes(IMAGE_SIZES)), tmp_path / "clip.pth")
    message = "clip.pth is no umT5 encoder.*expected the official models_t5_umt5-xxl-enc-bf16.pth"
    with pytest.raises(BundleError, match=message):
        open_text_encoder(tmp_path / "clip.pth", checkpoint / "tokenizer")


def test_a_folder_that_lacks_a_tensor_is_refused(folder: Path, checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    shard = folder / index["weight_map"].pop(lost)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(shard)
    save_file({k: t for k, t in tensors.items() if k != lost}, shard, {"format": "pt"})
    with pytest.raises(BundleError, match=f"does not fit UMT5Encoder: missing {lost}:"):
        open_text_encoder(folder, checkpoint / "tokenizer")


def test_a_folder_with_a_misshapen_tensor_is_refused(folder: Path, checkpoint: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 48}))
    with pytest.raises(BundleError, match=r"encoder\.block\.0.layer\.1\..* is \[24, 40\], expect"):
        open_text_encoder(folder, checkpoint / "tokenizer")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "text_encoder has no config"),
        ("config.json", "{", "cannot read .*config"),
        ("model-00001-of-*.safetensors", None, "cannot read .*model-00001"),
        ("model-00001-of-*.safetensors", "{", "model-00001-of-.* is not a safetensors file"),
        ("model.safetensors.index.json", "{", "cannot read .*index.json is damaged"),
        ("model.safetensors.index.json", "{}", "cannot read .*index.json names no files"),
        ("model.safetensors.index.json", None, "cannot read .* has no model.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    folder: Path, checkpoint: Path, name: str, content: str | None, message: str
) -> None:
    (file,) = folder.glob(name)
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(BundleError, match=f"{message}.*: download it again$") as bad:
        open_text_encoder(folder, checkpoint / "tokenizer")
    assert "\n" not in str(bad.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu"}, "is no umT5 encoder: its feed_forward_proj is 'relu', exp"),
        ({"num_layers": 10**9}, r"the num_layers of config.json is 1000000000, expected 1 to \d+"),
        ({"d_model": "24"}, "the d_model of config.json is 24, expected 1 to"),
        ({"num_heads": 0}, "the num_heads of config.json is 0, expected 1 to"),
        ({"relative_attention_num_buckets": 2}, "is no umT5 encoder: 2 buckets of positions"),
        ({"layer_norm_epsilon": "small"}, "is no umT5 encoder: "),
        ({"d_kv": 2**18, "num_heads": 2**18}, r"SelfAttention\.k\.weight is \[12, 24\], expected"),
    ],
)
def test_a_config_of_another_model_is_refused_in_one_line(
    folder: Path, checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BundleError, match=message) as refused:
        open_text_encoder(folder, checkpoint / "tokenizer")
    assert "\n" not in str(refused.value)


def test_a_folder_s_second_name_of_the_embeddings_will_do(
    folder: Path, checkpoint: Path, encoder: UMT5TextEncoder
) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors["decoder.final_layer_norm.weight"] = torch.ones(3)  # which an encoder has not
    save_file(tensors, folder / "model.safetensors")
    opened = open_text_encoder(folder, checkpoint / "tokenizer", dtype="fp32")
    assert np.array_equal(opened([PROMPT])[0], encoder([PROMPT])[0])


def test_a_folder_without_a_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no tokenizer.json: expected .*google/umt5-xxl/"):
        open_text_encoder(checkpoint / "encoder.pth", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"tokenizer\.json is damaged") as refused:
        open_text_encoder(checkpoint / "encoder.pth", tmp_path)
    assert "\n" not in str(refused.value)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:20].clone()

    with pytest.raises(BundleError, match=r"knows \d\d tokens, the text encoder .* 20: take"):
        open_text_encoder(write_with(tmp_path, shrink), checkpoint / "tokenizer")


def test_a_prompt_without_a_token_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    saved = json.loads((checkpoint / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**saved, "post_processor": None}))
    opened = open_text_encoder(checkpoint / "encoder.pth", tmp_path)
    with pytest.raises(BadRequest, match="makes no token of the prompt ''"):
        opened([PROMPT, ""])


def test_another_dtype_is_refused(checkpoint: Path) -> None:
    with pytest.raises(BadRequest, match="is bf16 or fp32, got 'fp16'"):
        open_text_encoder(checkpoint / "encoder.pth", checkpoint / "tokenizer", dtype="fp16")


@pytest.mark.parametrize("package", ["torch", "tokenizers"])
def test_a_missing_package_is_named_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = f"the text encoder needs {package}; from a clone .*pip install '.\\[pipeline\\]'$"
    with pytest.raises(WanExportError, match=message):
        open_text_encoder(checkpoint / "encoder.pth", checkpoint / "tokenizer")


def test_cleaning_without_ftfy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(WanExportError, match=r"needs ftfy; from a clone .*'.\[pipeline\]'$"):
        clean_prompt(PROMPT)
