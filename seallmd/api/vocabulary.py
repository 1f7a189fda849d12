"""Single tokens as text and as bytes.

Owns the reading of one token's own characters; `detokenize` owns that of sequences. Must not know requests.
"""

from __future__ import annotations

import functools
import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"^<0x([0-9A-F]{2})>$")
_KEPT = 1 << 16


def _byte_level() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019, their `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_level()


class Vocabulary:
    """A tokenizer's tokens, one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        ids = tokenizer.encode("a", add_special_tokens=False).ids
        self._before = list(ids[-1:])  # decoders strip the space of a token that comes first
        self._before_text = tokenizer.decode(self._before, skip_special_tokens=False)
        self.text = functools.lru_cache(_KEPT)(self._text)
        self.bytes_ = functools.lru_cache(_KEPT)(self._bytes)

    def _text(self, token: int) -> str:
        """What it adds to a text; the replacement character for a part of one. Empty for an unknown id."""
        if token in self._added:
            return self._added[token]
        if self._tokenizer.id_to_token(token) is None:
            return ""
        both = self._tokenizer.decode([*self._before, token], skip_special_tokens=False)
        if both.startswith(self._before_text):
            return str(both[len(self._before_text) :])
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _bytes(self, token: int) -> tuple[int, ...]:
        """Its bytes in UTF-8, also where it is a part of a character."""
        name = self._tokenizer.id_to_token(token)
        if name is not None and token not in self._added:
            if self._is_byte_level and all(character in _BYTES for character in name):
                return tuple(_BYTES[character] for character in name)
            if byte := _BYTE.match(name):
                return (int(byte.group(1), 16),)
        return tuple(self.text(token).encode())
