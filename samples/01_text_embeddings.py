"""Write text embeddings that stand in for umT5's: seeded, of a prompt's usual length.

    python samples/01_text_embeddings.py text.safetensors

The file has what `wanexport run --text` reads: `text` and `negative`, each [n, 4096] with n <= 512.
With a real model they are the umT5-xxl encoder's output for the prompt and the negative prompt.
"""

import sys
from pathlib import Path

import numpy as np

from wanexport.runtime.bundle.tensorfile import save_arrays

TEXT_DIM = 4096


def main(path: Path) -> None:
    """Write the file."""
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal((77, TEXT_DIM), np.float32)
    negative = rng.standard_normal((126, TEXT_DIM), np.float32)
    save_arrays(path, {"text": prompt, "negative": negative})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
