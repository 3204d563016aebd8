"""Text embeddings in T5's place: a fixed vector for each word of a small vocabulary."""

from collections.abc import Sequence

import numpy as np

from wanexport.runtime.errors import WanExportError

VOCABULARY = (
    *("a", "moves", "circle", "square", "triangle"),
    *("red", "green", "blue", "yellow", "left", "right", "up", "down"),
)
TEXT_DIM = 4096
TEXT_LEN = 512
SEED = 0


class WordEmbeddings:
    """The text encoder of the tiny model: rows in the order of the prompt's words."""

    text_dim = TEXT_DIM

    def __init__(self) -> None:
        # Signs are exact in every dtype, so a bf16 engine reads the same text as an fp32 one.
        bits = np.random.Generator(np.random.PCG64(SEED)).integers(
            0, 2, (len(VOCABULARY), TEXT_DIM)
        )
        self.table = (2 * bits - 1).astype(np.float32)

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """fp32 [n, 4096] for each prompt of n words.

        Raises WanExportError for a prompt without words, with over 512, or with an unknown one.
        """
        return [self.table[self.tokens(prompt)] for prompt in prompts]

    def tokens(self, prompt: str) -> list[int]:
        """Indices into VOCABULARY. Raises WanExportError as `__call__` does."""
        words = prompt.lower().split()
        unknown = [word for word in words if word not in VOCABULARY]
        if unknown or not 1 <= len(words) <= TEXT_LEN:
            wrong = f"does not know {unknown[0]!r:.40}" if unknown else f"got {len(words)} words"
            raise WanExportError(
                f"the tiny model {wrong}: expected 1 to {TEXT_LEN} of the words "
                f"{', '.join(VOCABULARY)}"
            )
        return [VOCABULARY.index(word) for word in words]

    def close(self) -> None:
        """Nothing is held that is worth freeing."""
