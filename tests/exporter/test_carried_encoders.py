"""The encoders that a bundle carries: what a build copies, and that they encode as before."""

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.exporter.carried import CLIP, SIZES, T5, carry, carrying_bundle, checkpoint, ordered
from tests.oracles.official_encoders import PROMPTS, images, state, text_shapes
from tests.runtime.bundle.small_bundle import CONFIG, small_bundle
from tests.runtime.parts.vae_bundle import asked_for, small_request
from wanexport.exporter.bundle.writer import open_bundle, write_manifest
from wanexport.exporter.cli.main import cli
from wanexport.exporter.inspection import inspect, list_bundle
from wanexport.exporter.sets.add import add
from wanexport.exporter.sets.encoders import add_encoders, order_encoders
from wanexport.exporter.sets.remove import remove
from wanexport.runtime.bundle.manifest import ENCODERS, WeightsRecord, read_manifest
from wanexport.runtime.bundle.tensorfile import read_header
from wanexport.runtime.errors import BadRequest, BundleError, WanExportError
from wanexport.runtime.parts.image_encoder import open_image_encoder
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.text_encoder import clean_prompt, open_text_encoder

LAYOUTS = {
    "official": (T5, "google/umt5-xxl", CLIP),
    "diffusers": ("text_encoder", "tokenizer", "image_encoder"),
}


def parts_of(bundle: Path, model: str | None = None) -> Parts:
    return Parts(bundle, model, read_manifest(bundle).engines[0], "cpu", {})


def record_of(bundle: Path, role: str) -> WeightsRecord:
    return next(w for w in read_manifest(bundle).weights.values() if w.role == role)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_carried_encoders_encode_as_the_checkpoints_to_the_bit(tmp_path: Path, layout: str) -> None:
    bundle = carrying_bundle(tmp_path, layout)
    text, tokenizer, image = (tmp_path / "model" / name for name in LAYOUTS[layout])
    prompts = [clean_prompt(prompt) for prompt in PROMPTS[:3]]
    expected = open_text_encoder(text, tokenizer)(prompts)
    features = open_image_encoder(image)(images())
    shutil.rmtree(tmp_path / "model")
    parts = parts_of(bundle)
    parts.find(ENCODERS)
    for own, other in zip(parts.text_encoder()(prompts), expected, strict=True):
        np.testing.assert_array_equal(own, other)
    np.testing.assert_array_equal(parts.image_encoder()(images()), features)
    parts.close()


def test_a_file_holds_the_weights_once_in_the_precision_that_is_computed_in(tmp_path: Path) -> None:
    bundle = carrying_bundle(tmp_path, "diffusers")  # whose tensors are fp32
    text, image = (record_of(bundle, role) for role in ENCODERS)
    assert (text.dtype, image.dtype) == ("bf16", "fp32")
    entries = read_header(bundle / text.file.path)
    tokenizer = (tmp_path / "model/tokenizer/tokenizer.json").stat().st_size
    assert entries["tokenizer.json"].size == tokenizer
    shapes = text_shapes(SIZES)
    assert entries.keys() - {"tokenizer.json", "config.json"} == shapes.keys()
    assert all(entries[n].size == 2 * int(np.prod(shape)) for n, shape in shapes.items())
    assert "config.json" in read_header(bundle / image.file.path)


def test_a_bundle_shows_its_encoders_and_gives_them_up(tmp_path: Path) -> None:
    bundle = carrying_bundle(tmp_path)
    record = inspect(bundle, verify=True)
    assert not record["problems"]
    assert [own["role"] for own in list_bundle(bundle)["sets"]] == ["denoiser", *ENCODERS]
    for command in ("inspect", "ls"):
        shown = CliRunner().invoke(cli, [command, str(bundle)])
        assert shown.exit_code == 0 and "image" in shown.output
    files = {role: bundle / record_of(bundle, role).file.path for role in ENCODERS}
    gone = remove(bundle, "text_encoder")
    assert gone["files"] == [files["text_encoder"].relative_to(bundle).as_posix()]
    assert [path.exists() for path in files.values()] == [False, True]
    with pytest.raises(BadRequest, match="no engine text_encoder: expected one of image_encoder,"):
        remove(bundle, "text_encoder")


@pytest.mark.parametrize("name", [*ENCODERS, "vae"])
def test_no_set_takes_the_name_of_a_part(tmp_path: Path, name: str) -> None:
    bundle = small_bundle(tmp_path / "bundle")
    with pytest.raises(BadRequest, match=f"{name} is what a build calls its own weights"):
        add(bundle, name, model=tmp_path)


def test_what_was_copied_is_reused_and_not_read_again(tmp_path: Path) -> None:
    bundle = carrying_bundle(tmp_path)
    told: list[Any] = []
    reused = carry(bundle, tmp_path / "model", told)
    assert reused == ["weights text_encoder-bf16", "weights image_encoder-fp32"]
    assert told == []
    (tmp_path / "model" / T5).touch()
    assert len(carry(bundle, tmp_path / "model", told)) == 2
    assert [stage for stage, *_ in told] == [
        "weights text_encoder-bf16: reading the checkpoint to compare"
    ]


def test_another_encoder_is_refused_until_the_first_is_removed(tmp_path: Path) -> None:
    bundle = carrying_bundle(tmp_path)
    other = state(text_shapes(SIZES))
    other["norm.weight"][0] += 1
    torch.save(other, tmp_path / "model" / T5)
    told = r"holds another text encoder, of .*: remove it first \(wanexport remove BUNDLE text_enc"
    with pytest.raises(BadRequest, match=told):
        carry(bundle, tmp_path / "model")
    remove(bundle, "text_encoder")
    carry(bundle, tmp_path / "model")


def test_what_an_earlier_try_finished_is_reused(tmp_path: Path) -> None:
    bundle, folder = small_bundle(tmp_path / "bundle"), checkpoint(tmp_path / "model", "official")
    before = read_manifest(bundle)
    encoders = ordered(bundle, folder)
    with pytest.raises(WanExportError, match="later"), open_bundle(bundle, before) as writer:
        add_encoders(writer, encoders, lambda *_: None)
        raise WanExportError("what came later failed")
    assert read_manifest(bundle) == before
    assert carry(bundle, folder) == ["weights text_encoder-bf16"]


def test_a_damaged_checkpoint_leaves_the_bundle_as_it_was(tmp_path: Path) -> None:
    bundle, folder = small_bundle(tmp_path / "bundle"), checkpoint(tmp_path / "model", "official")
    before, files = read_manifest(bundle), sorted(bundle.rglob("*"))
    tensors = state(text_shapes(SIZES))
    tensors["norm.weight"][0] = torch.nan
    torch.save(tensors, folder / T5)
    with pytest.raises(BadRequest, match=r"norm\.weight has 1 NaN"):
        carry(bundle, folder)
    assert read_manifest(bundle) == before
    assert [path for path in sorted(bundle.rglob("*")) if path.name != ".lock"] == files


def test_a_reader_that_does_not_know_the_role_passes_it_over(tmp_path: Path) -> None:
    bundle = carrying_bundle(tmp_path)
    manifest = read_manifest(bundle)
    later = {n: replace(w, role=f"later_{w.role}") for n, w in manifest.weights.items()}
    base = {n: w for n, w in manifest.weights.items() if w.role not in ENCODERS}
    write_manifest(bundle, replace(manifest, weights={**later, **base}))
    assert not inspect(bundle, verify=True)["problems"]
    assert parts_of(bundle).own("text_encoder") is None


def test_a_checkpoint_that_is_named_takes_their_place(tmp_path: Path) -> None:
    bundle = carrying_bundle(tmp_path)
    other = checkpoint(tmp_path / "other", "official")
    tensors = torch.load(other / T5, weights_only=True)
    tensors["norm.weight"] *= 2
    torch.save(tensors, other / T5)
    own, named = parts_of(bundle), parts_of(bundle, str(other))
    own.find(["text_encoder"])
    named.find(["text_encoder"])
    (first,), (second,) = own.text_encoder()(["a"]), named.text_encoder()(["a"])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.replace(b'"num_layers": 2', b'"num_layers":99'), "num_layers is"),
        (lambda content: content.replace(b'"dim": 32', b'"dim": 0.'), "run wanexport build"),
        (lambda content: content.replace(b'"dim": 32', b'"dim": 64'), "does not fit UMT5Encoder"),
        (lambda content: content.replace(b"config.json", b"config.jsoX"), "is no encoder of a"),
        (lambda content: content[:-1], "cut short|describes|run the same wanexport build"),
    ],
)
def test_what_is_damaged_is_told_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    bundle = carrying_bundle(tmp_path)
    record = record_of(bundle, "text_encoder")
    path = bundle / record.file.path
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert path.read_bytes() != content
    manifest = read_manifest(bundle)
    header = change(content)[: 8 + int.from_bytes(content[:8], "little")]
    known = {**manifest.weights}
    label = next(n for n, w in known.items() if w.role == "text_encoder")
    known[label] = replace(known[label], layout=sha256(header).hexdigest())
    write_manifest(bundle, replace(manifest, weights=known))
    parts = parts_of(bundle)
    parts.find(["text_encoder"])
    with pytest.raises(BundleError, match=message) as raised:
        parts.text_encoder()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"random_seed": 0, "preset": "tiny"}, "random weights have no encoders beside them"),
        ({"path": "EMPTY"}, r"lacks the text encoder .* and the tokenizer"),
        ({"path": "WIDE"}, f"gives 40 values a token, the model takes {CONFIG.text_dim}"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    bundle = small_bundle(tmp_path / "bundle")
    (tmp_path / "EMPTY").mkdir()
    checkpoint(tmp_path / "WIDE", "official", {**SIZES, "dim": 40})
    if "path" in source:
        source = {"path": str(tmp_path / source["path"])}
    request = small_request(read_manifest(bundle))
    with pytest.raises(WanExportError, match=message):
        order_encoders(request, source, asked_for(parts=True))
    assert order_encoders(request, source, asked_for()) == []
