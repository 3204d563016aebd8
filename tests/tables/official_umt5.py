"""Print at which lengths umT5 has the official code's bits, ours and transformers'.

    python -m tests.tables.official_umt5 CLONE

CLONE is a clone of Wan-Video/Wan2.1. The weights are random; it takes what
tests/oracles/official_encoders.py takes.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.oracles import official_encoders as official
from tests.oracles.transformers_encoders import umt5_of
from wanexport.runtime.parts.umt5 import UMT5Config, UMT5Encoder

SIZES = {"vocab": 300, "dim": 1024, "heads": 16, "head_dim": 64, "ffn": 2560, "layers": 2,
         "buckets": 32}  # fmt: skip
LENGTHS = (1, 2, 5, *range(10, 511, 20), 511, 512)


def encoders(t5: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The official encoder, ours and transformers', with the same weights."""
    tensors = official.state(official.text_shapes(SIZES))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    theirs = t5.T5Encoder(
        vocab=SIZES["vocab"], dim=SIZES["dim"], dim_attn=SIZES["heads"] * SIZES["head_dim"],
        dim_ffn=SIZES["ffn"], num_heads=SIZES["heads"], num_layers=SIZES["layers"],
        num_buckets=SIZES["buckets"], shared_pos=False,
    )  # fmt: skip
    ours = UMT5Encoder(
        UMT5Config(
            vocab_size=SIZES["vocab"], dim=SIZES["dim"], num_heads=SIZES["heads"],
            head_dim=SIZES["head_dim"], ffn_dim=SIZES["ffn"], num_layers=SIZES["layers"],
            num_buckets=SIZES["buckets"], max_distance=128, norm_eps=1e-6,
        )
    )  # fmt: skip
    for model in (theirs, ours):
        model.to(dtype).eval().load_state_dict(tensors)
    transformers = umt5_of(tensors, SIZES)
    return {
        "official": theirs,
        "ours": ours,
        "transformers'": lambda ids: transformers(input_ids=ids).last_hidden_state,
    }


def main(clone: Path) -> None:
    """Print a line for each dtype and encoder."""
    t5, _, _ = official._import_official(clone)
    for dtype in (torch.float32, torch.bfloat16):
        models = encoders(t5, dtype)
        expected = models.pop("official")
        for name, model in models.items():
            same = []
            for length in LENGTHS:
                ids = torch.arange(length)[None] * 7 % SIZES["vocab"]
                with torch.inference_mode():
                    same.append(torch.equal(model(ids), expected(ids)))
            lengths = [length for length, is_same in zip(LENGTHS, same) if not is_same]
            print(f"{dtype}: {name} has its bits{f', not at {lengths}' if lengths else ''}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
