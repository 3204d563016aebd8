"""Where the encoders and the VAE of a bundle's model are found, and what is said otherwise."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from tests.runtime.test_denoiser import record
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.exporter.model_source import resolve
from wanexport.graphs.config import PRESETS
from wanexport.runtime.bundle.manifest import BASE, DENOISER, FileRecord, Manifest, WeightsRecord
from wanexport.runtime.errors import BadRequest, BundleError, WanExportError
from wanexport.runtime.family import family_of
from wanexport.runtime.parts.find import find_components, origin_note
from wanexport.runtime.parts.protocols import check_text_encoder, check_vae

NO_HASH = "0" * 64
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
OFFICIAL = (T5, "google/umt5-xxl/tokenizer.json", "Wan2.1_VAE.pth", CLIP)
DIFFUSERS = tuple(
    f"{part}/x.json" for part in ("text_encoder", "tokenizer", "vae", "image_encoder")
)
# The files of a published repository in each layout, as their model cards list them.
REPOSITORIES = {
    "official": (
        *OFFICIAL, "config.json", "diffusion_pytorch_model.safetensors", "README.md",
        "google/umt5-xxl/spiece.model", "xlm-roberta-large/tokenizer.json", "assets/logo.png",
    ),
    "diffusers": (
        *DIFFUSERS, "model_index.json", "scheduler/scheduler_config.json",
        "text_encoder/model-00001-of-00005.safetensors", "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    ),
}  # fmt: skip


def bundle_of(folder: Path, preset: str, *sources: dict[str, Any]) -> Path:
    """A manifest of the preset's engine and of weights from each source."""
    config = PRESETS[preset].config
    file = FileRecord("engines/denoiser.onnx", 0, NO_HASH)
    engine = replace(
        record(config),
        target={"device": "cpu"},
        files={"denoiser": file},
        layout=NO_HASH,
    )
    weights = {
        dtype: WeightsRecord(
            name=BASE,
            role=DENOISER,
            expert="",
            dtype=dtype,
            layout=NO_HASH,
            file=FileRecord(f"weights/{dtype}/denoiser.safetensors", 0, NO_HASH),
            content="",
            source=source,
        )
        for dtype, source in zip(("fp32", "bf16"), sources)
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, Manifest(preset, config, (), weights, (engine,), "0.1.0"))
    return folder


def filled(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def message_of(bundle: Path, model: str | None = None, **options: Any) -> str:
    with pytest.raises(BundleError if model is None else BadRequest) as refusal:
        find_components(bundle, model, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("source", ["", "diffusion_pytorch_model.safetensors", "high_noise_model"])
def test_an_official_checkpoint_is_looked_through_wherever_its_transformer_lies(
    source: str, tmp_path: Path
) -> None:
    folder = filled(tmp_path / "model", (*OFFICIAL, "high_noise_model/config.json"))
    (folder / "diffusion_pytorch_model.safetensors").touch()
    bundle = bundle_of(tmp_path / "bundle", "i2v-14b", {"path": str(folder / source)})
    files = find_components(bundle)
    assert files.layout == "official" and files.origin == str(folder / source)
    assert files.text_encoder == folder / T5 and files.tokenizer == folder / "google/umt5-xxl"
    assert files.vae == folder / "Wan2.1_VAE.pth" and files.image_encoder == folder / CLIP


@pytest.mark.parametrize(
    "source", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_a_diffusers_checkpoint_is_looked_through_wherever_its_transformer_lies(
    source: str, tmp_path: Path
) -> None:
    transformer = "transformer/diffusion_pytorch_model.safetensors"
    folder = filled(tmp_path / "model", (*DIFFUSERS, transformer))
    bundle = bundle_of(tmp_path / "bundle", "i2v-14b", {"path": str(folder / source)})
    files = find_components(bundle)
    assert files.layout == "diffusers"
    assert files.text_encoder == folder / "text_encoder" and files.vae == folder / "vae"
    assert files.tokenizer == folder / "tokenizer"
    assert files.image_encoder == folder / "image_encoder"


def test_clip_only_where_the_engine_takes_it_and_the_vae_of_the_models_channels(
    tmp_path: Path,
) -> None:
    folder = filled(tmp_path / "model", (*OFFICIAL, "Wan2.2_VAE.pth"))
    for preset, vae in (("t2v-1.3b", "Wan2.1_VAE.pth"), ("ti2v-5b", "Wan2.2_VAE.pth")):
        files = find_components(bundle_of(tmp_path / preset, preset, {"path": str(folder)}))
        assert files.image_encoder is None and files.vae == folder / vae
    a14b = bundle_of(tmp_path / "i2v-a14b", "i2v-a14b", {"path": str(folder)})
    assert find_components(a14b).image_encoder is None


def test_another_checkpoint_takes_the_place_of_the_recorded_one(tmp_path: Path) -> None:
    recorded = filled(tmp_path / "recorded", OFFICIAL)
    other = filled(tmp_path / "other", DIFFUSERS)
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", {"path": str(recorded)})
    files = find_components(bundle, str(other))
    assert files.origin == str(other) and files.vae == other / "vae"


def test_of_several_sources_the_first_that_is_there(tmp_path: Path) -> None:
    there = filled(tmp_path / "there", OFFICIAL)
    moved, random = {"path": str(tmp_path / "moved")}, {"random_seed": 0, "preset": "t2v-1.3b"}
    for first in (moved, random):
        bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", first, {"path": str(there)})
        assert find_components(bundle).origin == str(there)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A hub of one repository: its client's filter decides which files arrive."""
    state = SimpleNamespace(files=(), calls=[])

    def snapshot_download(
        repo: str, *, revision: str | None, allow_patterns: list[str]
    ) -> str:  # fmt: skip
        arrived = tuple(filter_repo_objects(state.files, allow_patterns=allow_patterns))
        state.calls.append((repo, revision, set(arrived)))
        return str(filled(tmp_path / "snapshots" / (revision or "main"), arrived))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


@pytest.mark.parametrize("layout", REPOSITORIES)
def test_of_a_hub_repository_only_the_parts_arrive(
    layout: str, hub: SimpleNamespace, tmp_path: Path
) -> None:
    hub.files = REPOSITORIES[layout]
    source = {"hub": "Wan-AI/some", "revision": "0123abc"}
    files = find_components(bundle_of(tmp_path / "bundle", "t2v-1.3b", source))
    ((repo, revision, arrived),) = hub.calls
    assert (repo, revision) == ("Wan-AI/some", "0123abc")
    assert files.origin == "Wan-AI/some" and files.layout == layout
    assert files.vae.exists() and files.tokenizer.is_dir()
    expected = {name for name in hub.files if name.startswith(("text_encoder", "tokenizer", "vae"))}
    official = {name for name in hub.files if name in OFFICIAL[:3] or "umt5" in name}
    assert arrived == (official if layout == "official" else expected)


def test_a_hub_id_that_is_named_and_only_what_is_needed_of_it(
    hub: SimpleNamespace, tmp_path: Path
) -> None:
    hub.files = REPOSITORIES["official"]
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", {"random_seed": 0, "preset": "t2v-1.3b"})
    files = find_components(bundle, "Wan-AI/Wan2.1-T2V-1.3B", needs=("vae",))
    assert hub.calls == [("Wan-AI/Wan2.1-T2V-1.3B", None, {"Wan2.1_VAE.pth"})]
    assert files.vae.exists() and not files.text_encoder.exists()


def test_the_build_gets_the_transformer_of_the_same_hub(
    hub: SimpleNamespace, tmp_path: Path
) -> None:
    hub.files = REPOSITORIES["diffusers"]
    with pytest.raises(WanExportError, match="download it again"):  # its files are empty
        resolve("Wan-AI/some", None)
    ((_, _, arrived),) = hub.calls
    assert arrived == {n for n in hub.files if n.startswith(("transformer/", "model_index"))}


@pytest.mark.parametrize(
    "source",
    [
        {"hub": "https://example.com/x"}, {"hub": "../x"}, {"hub": "a/.."}, {"hub": "a/b..c"},
        {"hub": "~/x"}, {"hub": "a/b/c"}, {"hub": "a"}, {"hub": "a/b\n"}, {"hub": "-a/b"},
        {"hub": "a/b", "revision": "../../x"}, {"hub": "a/b", "revision": "refs/pr/1"},
        {"path": "models"}, {"path": "~/models"}, {"path": "/tmp/../etc"}, {"path": "/a//b"},
        {"path": "/tmp/\x1b[2J"}, {"path": ""}, {"path": "file:///etc"}, {"path": "/tmp/"},
        {"path": "//server/share/x"}, {"path": r"\\server\share\x"}, {"path": "C:x"},
        {"path": r"C:\x\..\y"}, {"path": "C:/x"},
    ],
)  # fmt: skip
def test_a_source_that_no_build_writes_is_not_followed(
    source: dict[str, Any], hub: SimpleNamespace, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", source)
    message = message_of(bundle)
    assert "as its checkpoint, which is no " in message and "name the checkpoint (-m" in message
    assert message.isprintable() and not hub.calls
    other = filled(tmp_path / "other", OFFICIAL)
    assert find_components(bundle, str(other)).origin == str(other)


def test_what_will_be_followed_is_said_and_nothing_is_followed_yet(
    hub: SimpleNamespace, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path / "bundle", "i2v-14b", {"hub": "Wan-AI/some", "revision": "c"})
    note = origin_note(bundle, None)
    titles = "the text encoder and the VAE and the CLIP image encoder"
    assert note.startswith(f"taking {titles} from Wan-AI/some, which the bundle names; -m names")
    assert origin_note(bundle, None, needs=("vae",)).startswith("taking the VAE from")
    assert origin_note(bundle, "x") == "" and not hub.calls
    random = bundle_of(tmp_path / "random", "t2v-1.3b", {"random_seed": 0})
    assert origin_note(random, None) == ""


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", {"hub": "a/b", "revision": "c"})
    message = message_of(bundle)
    assert "cannot get a/b from the hub: no route to host" in message
    assert "name the folder (-m" in message


def test_a_part_that_is_not_in_the_cache_of_an_offline_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself returns the snapshot that is there, whatever it lacks."""
    commit, cache = "0123456789" * 4, tmp_path / "hub"
    names = (f"models--a--b/snapshots/{commit}/transformer/config.json",)
    filled(cache, names)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = {"hub": "a/b", "revision": commit}
    message = message_of(bundle_of(tmp_path / "bundle", "t2v-1.3b", source), needs=("vae",))
    assert message.startswith("a/b lacks the VAE (Wan2.1_VAE.pth): it is not in the hub's cache")
    assert "HF_HUB_OFFLINE" in message


def test_random_weights_come_without_encoders(tmp_path: Path) -> None:
    hubs = {
        "tiny": "Wan-AI/Wan2.1-T2V-1.3B",
        "i2v-14b": "Wan-AI/Wan2.1-I2V-14B-480P",
        "ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B",
    }
    for preset, hub_id in hubs.items():
        source = {"random_seed": 0, "preset": preset}
        message = message_of(bundle_of(tmp_path / preset, preset, source))
        assert f"{preset} came from random weights alone" in message
        assert f"(-m, model=), as {hub_id}, or give text embeddings (--text)" in message
        assert ("the CLIP image encoder" in message) == (preset == "i2v-14b")
    assert "--text" not in message_of(tmp_path / "tiny", needs=("vae",))


def test_a_checkpoint_that_has_moved(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", {"path": str(tmp_path / "gone")})
    message = message_of(bundle)
    assert f"{tmp_path / 'gone'}, the checkpoint that {bundle} came from, is gone" in message
    assert "(-m, model=), as Wan-AI/Wan2.1-T2V-1.3B" in message


def test_a_checkpoint_of_a_machine_with_windows_is_not_here(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", {"path": r"C:\models\wan"})
    assert rf"C:\models\wan, the checkpoint that {bundle} came from, is gone" in message_of(bundle)


def test_bundle_and_model_are_paths_in_either_form(tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", OFFICIAL)
    bundle = bundle_of(tmp_path / "bundle", "t2v-1.3b", {"path": str(folder)})
    assert find_components(str(bundle), folder) == find_components(bundle, str(folder))
    assert find_components(str(bundle)) == find_components(bundle)
    assert origin_note(str(bundle), None) == origin_note(bundle, None) != ""
    with pytest.raises(BadRequest, match="does not exist"):
        find_components(bundle, tmp_path / "none")


@pytest.mark.parametrize(
    ("names", "lacks", "hub_id"),
    [
        (OFFICIAL[:3], f"the CLIP image encoder ({CLIP})", "Wan-AI/Wan2.1-I2V-14B-480P,"),
        (OFFICIAL[1:], f"the text encoder ({T5})", "Wan-AI/Wan2.1-I2V-14B-480P,"),
        ((OFFICIAL[0], *OFFICIAL[2:]), "the tokenizer (google/umt5-xxl)", "I2V-14B-480P,"),
        (DIFFUSERS[:2], "the VAE (vae) and the CLIP image encoder (image_encoder)",
         "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers,"),
        ((), f"the text encoder ({T5}) and the tokenizer (google/umt5-xxl) and the VAE "
         f"(Wan2.1_VAE.pth) and the CLIP image encoder ({CLIP})", "I2V-14B-480P,"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lacks_a_part(
    names: tuple[str, ...], lacks: str, hub_id: str, tmp_path: Path
) -> None:
    folder = filled(tmp_path / "model", names)
    folder.mkdir(exist_ok=True)
    bundle = bundle_of(tmp_path / "bundle", "i2v-14b", {"path": str(folder)})
    message = message_of(bundle)
    assert message.startswith(f"{folder} lacks {lacks}: get it from ")
    assert hub_id in message and "(-m, model=)" in message


def test_what_is_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", "tiny", {"random_seed": 0, "preset": "tiny"})
    for name in ("no/such/folder", "nothing", "x" * 5000):
        assert "does not exist: expected a checkpoint folder" in message_of(bundle, name)


def test_a_text_encoder_of_another_width_is_refused() -> None:
    engine = record(PRESETS["t2v-1.3b"].config)
    check_text_encoder(SimpleNamespace(text_dim=4096), engine, "x")
    check_text_encoder(lambda prompts: [], engine, "x")  # states none
    with pytest.raises(BundleError, match=r"encoder of some/x gives 512 .* takes 4096.*model=\)"):
        check_text_encoder(SimpleNamespace(text_dim=512), engine, "some/x")


@pytest.mark.parametrize(("channels", "stride"), [(16, 8), (16, 16), (48, 8)])
def test_the_vae_of_another_model_is_refused(channels: int, stride: int) -> None:
    vae: Any = SimpleNamespace(channels=channels, spatial_stride=stride)
    with pytest.raises(BundleError, match=r"VAE of some/x has .* takes 48 .*model=\)"):
        check_vae(vae, record(PRESETS["ti2v-5b"].config), "some/x")
    check_vae(SimpleNamespace(), record(PRESETS["ti2v-5b"].config), "x")
    vae.channels, vae.spatial_stride = 48, 16
    check_vae(vae, record(PRESETS["ti2v-5b"].config), "x")


# Hashes of the texts in Wan-Video/Wan2.1 and Wan2.2, wan/configs.
@pytest.mark.parametrize(
    ("preset", "length", "sha256"),
    [
        ("t2v-1.3b", 137, "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"),
        ("i2v-a14b", 137, "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"),
        ("ti2v-5b", 137, "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"),
        ("i2v-14b", 142, "412753d092bcf3708424769cd0f54e27973d53a12e229e5492b718457213fc2f"),
        ("flf2v-14b", 147, "43885bed372496a7998e1c1c83a19dd46254345e0b2c9a23e6fafde8f9d6e106"),
    ],
)
def test_the_negative_prompts_are_the_official_ones(preset: str, length: int, sha256: str) -> None:
    from hashlib import sha256 as digest

    text = family_of(PRESETS[preset].config).negative
    assert len(text) == length and digest(text.encode()).hexdigest() == sha256
