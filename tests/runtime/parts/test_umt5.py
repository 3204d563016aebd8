"""The umT5 encoder is transformers' to the bit, at every length, in each dtype."""

import pytest
import torch

from tests.oracles.official_encoders import TEXT_SIZES, state, text_shapes
from tests.oracles.transformers_encoders import umt5_embedding, umt5_of
from wanexport.runtime.parts.umt5 import UMT5Config, UMT5Encoder

WIDE = {"vocab": 300, "dim": 256, "heads": 4, "head_dim": 64, "ffn": 512, "layers": 2,
        "buckets": 32}  # fmt: skip


def config_of(sizes: dict[str, int], **changes: float) -> UMT5Config:
    values = {
        "vocab_size": sizes["vocab"],
        "dim": sizes["dim"],
        "num_heads": sizes["heads"],
        "head_dim": sizes["head_dim"],
        "ffn_dim": sizes["ffn"],
        "num_layers": sizes["layers"],
        "num_buckets": sizes["buckets"],
        "max_distance": 128,
        "norm_eps": 1e-6,
    }
    return UMT5Config(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [TEXT_SIZES, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_transformers_to_the_bit(
    sizes: dict[str, int], dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in state(text_shapes(sizes)).items()}
    ours, theirs = UMT5Encoder(config_of(sizes)).to(dtype).eval(), umt5_of(tensors, sizes)
    ours.load_state_dict(tensors)
    for length in (1, 2, 5, 33, 82, 130, 300, 512):
        ids = torch.randint(sizes["vocab"], (length,)).tolist()
        with torch.inference_mode():
            (embedding,) = ours(torch.tensor([ids]))
        assert embedding.dtype == dtype
        assert torch.equal(embedding, umt5_embedding(theirs, ids)), length


def test_positions_share_buckets_as_in_the_official_code() -> None:
    """Worked by hand, of 8 buckets up to 16: 0 and 1 alone, then 2 to 5, then all from 6 on."""
    from wanexport.runtime.parts.umt5 import _buckets

    config = config_of(TEXT_SIZES, num_buckets=8, max_distance=16)
    row = _buckets(9, config, torch.device("cpu"))[0].tolist()
    assert row == [0, 5, 6, 6, 6, 6, 7, 7, 7]
    column = _buckets(9, config, torch.device("cpu"))[:, 0].tolist()
    assert column == [0, 1, 2, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    "changes", [{"num_buckets": 3}, {"max_distance": 4}, {"num_layers": 0}, {"norm_eps": 0.0}]
)
def test_sizes_of_which_no_encoder_can_be_built_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        config_of(TEXT_SIZES, **changes)
