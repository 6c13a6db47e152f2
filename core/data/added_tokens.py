"""A tiktoken encoding with the added tokens of a Hugging Face tokenizer."""

from collections.abc import Set
from typing import Any, Literal

import numpy as np
import tiktoken


class AddedTokensEncoding(tiktoken.Encoding):
    """Added tokens that are not special split ordinary text, as in `tokenizers`; special tokens don't."""

    def __init__(self, name: str, *, in_text: Set[str], **settings: Any) -> None:
        """`in_text`: those of the special_tokens of `settings` that split ordinary text."""
        super().__init__(name, **settings)
        self.in_text = frozenset(in_text)

    def _allowed(self, allowed: Literal["all"] | Set[str]) -> Literal["all"] | Set[str]:
        return "all" if allowed == "all" else self.in_text | allowed

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text, disallowed_special=()) if self.in_text else super().encode_ordinary(text)

    def encode(self, text: str, *, allowed_special: Any = frozenset(), disallowed_special: Any = "all") -> list[int]:
        allowed = self._allowed(allowed_special)
        return super().encode(text, allowed_special=allowed, disallowed_special=disallowed_special)

    def encode_to_numpy(
        self, text: str, *, allowed_special: Any = frozenset(), disallowed_special: Any = "all"
    ) -> np.ndarray:
        allowed = self._allowed(allowed_special)
        return super().encode_to_numpy(text, allowed_special=allowed, disallowed_special=disallowed_special)
