"""Which words a tokenizer knows."""

from __future__ import annotations

from tokenizers import Tokenizer


def unknown_word(tokenizer: Tokenizer, text: str) -> str | None:
    """Return the first word of a text that a tokenizer does not know; None where it knows all."""
    encoded, nothing = tokenizer.encode(text), tokenizer.token_to_id("<unk>")
    places = zip(encoded.ids, encoded.offsets, strict=True)
    return next((text[start:end] for token, (start, end) in places if token == nothing), None)
