"""Text embeddings that were computed before, by the text."""

import threading
from collections import OrderedDict

import numpy as np

from wanexport.runtime.errors import BadRequest


class PromptCache:
    """At most `capacity` embeddings, without the one that was unused for longest; thread-safe.

    Raises BadRequest when capacity is no whole number of 0 or more.
    """

    def __init__(self, capacity: int) -> None:
        if type(capacity) is not int or capacity < 0:
            raise BadRequest(
                f"prompt_cache is a number of prompts, got {capacity!r}: expected 0 or more"
            )
        self.capacity = capacity
        self._embeddings: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, text: str) -> np.ndarray | None:
        """The embedding of a text, which is then the last used; None where there is none."""
        with self._lock:
            if text in self._embeddings:
                self._embeddings.move_to_end(text)
            return self._embeddings.get(text)

    def put(self, text: str, embedding: np.ndarray) -> None:
        """Keep an embedding, which nobody may write to any more."""
        with self._lock:
            self._embeddings[text] = embedding
            self._embeddings.move_to_end(text)
            while len(self._embeddings) > self.capacity:
                self._embeddings.popitem(last=False)

    def clear(self) -> None:
        """Forget every text."""
        with self._lock:
            self._embeddings.clear()
