"""A merge is PEFT's own, for adapters that PEFT makes, trains nothing of, and saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.runtime.lora.tiny import SHAPES, base, is_close, wide
from wanexport.runtime.lora.merge import LoraStack

LINEAR = ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2")


def wan() -> nn.Module:
    """Layers named as a Wan's, with the tiny model's weights."""
    model = nn.Module()
    for name in [f"blocks.{i}.{layer}" for i in range(2) for layer in LINEAR]:
        out, columns = SHAPES[f"{name}.weight"]
        _place(model, name, nn.Linear(columns, out))
    _place(model, "patch_embedding", nn.Conv3d(16, 16, (1, 2, 2), (1, 2, 2)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base(name))
    return model


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = getattr(model, part)
    model.add_module(last, layer)


def check(config: Any, folder: Path, alpha: float | None) -> None:
    """Merge random adapters of a config by PEFT and by ours, and compare every parameter.

    PEFT keeps alpha in a file beside the weights: here it is put in as other programs do.
    """
    torch.manual_seed(0)
    adapted = get_peft_model(wan(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "lokr_" in name or "hada_" in name:
                positive = "magnitude" in name
                parameter.copy_(torch.rand_like(parameter) + 0.5 if positive else _draw(parameter))
    adapted.save_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.partition(".lo")[0].partition(".hada")[0] for name in tensors}
    if alpha is not None:
        tensors |= {f"{module}.alpha": torch.tensor(alpha) for module in modules}
    save_file(tensors, folder / "lora.safetensors")

    lora = LoraStack([(folder / "lora.safetensors", 1.0)], SHAPES)
    expected = adapted.merge_and_unload().state_dict()
    changed = [name for name in expected if lora.changes(name)]
    assert changed
    for name, value in expected.items():
        assert is_close(lora.merge(name, base(name)), wide(value)), name


def _draw(parameter: Tensor) -> Tensor:
    return torch.randn_like(parameter) / 4


TARGETS = ["q", "o", "k", "ffn.0", "ffn.2"]


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 4}, None),
        ({"lora_alpha": 6}, 6.0),
        ({"lora_alpha": 4, "lora_bias": True}, None),
        ({"lora_alpha": 6, "lora_bias": True}, 6.0),
        ({"lora_alpha": 4, "use_dora": True}, None),
        ({"lora_alpha": 6, "use_dora": True}, 6.0),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own biases for damaged
@pytest.mark.parametrize("targets", [TARGETS, ["patch_embedding"]])
def test_low_ranks_biases_and_doras_merge_as_in_peft(
    config: dict[str, Any], alpha: float | None, targets: list[str], tmp_path: Path
) -> None:
    check(LoraConfig(r=4, target_modules=targets, **config), tmp_path, alpha)


@pytest.mark.parametrize("decompose_both", [False, True])
def test_kronecker_products_merge_as_in_peft(decompose_both: bool, tmp_path: Path) -> None:
    config = LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, decompose_both=decompose_both, decompose_factor=4
    )
    check(config, tmp_path, 3.0)


def test_whole_kronecker_products_merge_as_in_peft(tmp_path: Path) -> None:
    """Of equal rank and alpha: PEFT scales them otherwise, LyCORIS, which writes them, does not."""
    check(LoKrConfig(r=16, alpha=16, target_modules=TARGETS), tmp_path, 7.0)


@pytest.mark.parametrize("alpha", [3, 12])
def test_hadamard_products_merge_as_in_peft(alpha: int, tmp_path: Path) -> None:
    check(LoHaConfig(r=3, alpha=alpha, target_modules=TARGETS), tmp_path, float(alpha))
