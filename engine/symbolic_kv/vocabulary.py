"""The closed vocabulary of the symbolic-KV task: ten special tokens, then the keys, then the values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

PAD, BOS, EOS, WRITE, READ = "<pad>", "<bos>", "<eos>", "W", "R"
# Ids 3 to 7 belong to an earlier grammar: they never occur in a stream, but they hold their places.
SPECIAL_TOKENS = (PAD, BOS, EOS, "SET", "=", ";", "QRY", "ANS", WRITE, READ)
PAD_ID = 0


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    width = max(2, len(str(count - 1)))
    return tuple(f"{letter}{number:0{width}d}" for number in range(count))


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a benchmark with `num_keys` keys and `num_values` values; a token's id is its place.

    Source: definitions A.1.
    """

    num_keys: int
    num_values: int

    @cached_property
    def key_tokens(self) -> tuple[str, ...]:
        """`K00`, `K01`, … in order."""
        return _numbered("K", self.num_keys)

    @cached_property
    def value_tokens(self) -> tuple[str, ...]:
        """`V00`, `V01`, … in order (`V000` from 101 values on)."""
        return _numbered("V", self.num_values)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every token in id order."""
        return SPECIAL_TOKENS + self.key_tokens + self.value_tokens

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token to id."""
        return {token: index for index, token in enumerate(self.tokens)}

    @property
    def key_ids(self) -> range:
        """Ids of the keys."""
        return range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + self.num_keys)

    @property
    def value_ids(self) -> range:
        """Ids of the values."""
        first = len(SPECIAL_TOKENS) + self.num_keys
        return range(first, first + self.num_values)

    def __len__(self) -> int:
        return len(SPECIAL_TOKENS) + self.num_keys + self.num_values
