"""Names of tensors are translated by a table; required ones that are missing are named."""

import pytest

from wanexport.runtime.errors import BundleError
from wanexport.runtime.key_tables import key_table, required

ROWS = {
    "head.*": "out.*",
    "layers.{}.scale": "blocks.{}.modulation",
    "layers.{}.net.0.*": "blocks.{}.ffn.0.*",
    "down.{}.res.{}.*": "stage.{}.part.{}.conv.*",
    "down.7.norm.weight": "stage.seven.gamma",
    "down.{}.res.{}.norm.*": "stage.{}.norm.*",
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("head.weight", "out.weight"),
        ("head.bias", "out.bias"),
        ("layers.12.scale", "blocks.12.modulation"),
        ("layers.3.net.0.weight", "blocks.3.ffn.0.weight"),
        ("down.1.res.22.gamma", "stage.1.part.22.conv.gamma"),
        ("down.1.res.22.norm.bias", "stage.1.norm.bias"),
        ("down.7.norm.weight", "stage.seven.gamma"),
    ],
)
def test_numbers_and_last_words_go_where_the_row_says(name: str, expected: str) -> None:
    assert key_table(ROWS)(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", "head", "head.", "head.weights", "head.*", "head.{}", "xhead.weight"),
        *("head.weight\n", "layers.{}.scale", "layers.x.scale", "layers..scale"),
        *("layers.1.2.scale", "layers.1_scale", "a.layers.1.scale", "layers.1.net.1.weight"),
        *("layers.\N{ARABIC-INDIC DIGIT THREE}.scale", "down.6.norm.weight"),
    ],
)
def test_a_name_that_no_row_fits_stays(name: str) -> None:
    assert key_table(ROWS)(name) == name


def test_a_tensor_that_is_required_gives_its_shape_or_is_named() -> None:
    shape = required({"a": (2, 3), "b": ()}, "x.pth is no VAE", "a VAE.pth", BundleError)
    assert shape("a", 2) == (2, 3)
    for name, rank in (("a", 3), ("b", 1), ("c", 1)):
        with pytest.raises(BundleError, match=rf"x\.pth is no VAE: .* {name} of rank {rank}; "):
            shape(name, rank)
