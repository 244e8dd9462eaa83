"""Conversion of instructions to token ids: prompt template, left padding, cache; a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from rove.errors import RoveError
from rove.policies.openvla.config import BINS, Checkpoint
from rove.policies.reading import read_text
from rove.policies.words import unknown_word

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
"""Special tokens of a word-level vocabulary, ids 0 to 3; <s> and </s> have Llama's own ids."""

NO_TOKENIZER = (
    "The checkpoint has no tokenizer.json, so it cannot read instructions. Where it has a tokenizer.model, "
    "transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory) converts it."
)


def word_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """Make a lower-casing tokenizer of whole words; the last 256 ids are the action tokens.

    Words and instructions are cut in one way, at white space and between letters and marks: "don't" is three.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    cut = pre_tokenizers.Whitespace()
    texts = (normalizer.normalize_str(word.lower()) for word in vocabulary)
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)})
    tokens = [*SPECIALS, *words, *(f"<action_{BINS - 1 - j}>" for j in range(BINS))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cut
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


_CACHED = 4096
"""Prompts that are kept as token ids."""


class PromptTokenizer:
    """A tokenizer of instructions to left-padded batches of token ids, with a checkpoint's prompt."""

    def __init__(self, tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
        self.tokenizer = tokenizer
        self._template = checkpoint.prompt
        self._end = checkpoint.prompt_end
        self._pad = checkpoint.pad_token
        self._rows = checkpoint.rows
        self._cache: dict[str, list[int]] = {}

    def encode(self, instruction: str) -> list[int]:
        """Return one prompt's token ids, from BOS to the prompt's end, appended where it is absent."""
        ids = self._cache.get(instruction)
        if ids is None:
            ids = self.tokenizer.encode(self._prompt(instruction)).ids
            if not ids or ids[-1] != self._end:
                ids = [*ids, self._known(self._end, "rove.prompt_end")]
            if len(self._cache) >= _CACHED:
                self._cache.clear()  # as many sentences come from a server's clients, not from a suite
            self._cache[instruction] = ids
        return ids

    def unknown(self, instruction: str) -> str | None:
        """Return the first word of a prompt that is not in the vocabulary; None where all are."""
        return unknown_word(self.tokenizer, self._prompt(instruction))

    def _known(self, token: int, key: str) -> int:
        """Return a token. Raises RoveError where the model has no such one."""
        if token >= self._rows:
            raise RoveError(
                f"Prompts need token {token} ({key} in config.json), the model has {self._rows}: correct it."
            )
        return token

    def _prompt(self, instruction: str) -> str:
        return self._template.format(instruction=instruction.strip().lower())

    def __call__(self, instructions: Sequence[str], multiple: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return `input_ids` int64 [B, L] and `attention_mask` bool [B, L], None where no row is padded.

        L is rounded up to a multiple of `multiple`.
        """
        rows = [self.encode(text) for text in instructions]
        longest = -(-max(map(len, rows)) // multiple) * multiple
        if any(len(row) < longest for row in rows):
            self._known(self._pad, "pad_token_id")
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        if bool((lengths == longest).all()):
            return ids, None
        return ids, torch.arange(longest) >= (longest - lengths)[:, None]

    def save(self, directory: Path) -> None:
        """Write tokenizer.json."""
        self.tokenizer.save(str(directory / "tokenizer.json"))


def read_tokenizer(directory: Path, checkpoint: Checkpoint) -> PromptTokenizer | None:
    """Read the tokenizer of a checkpoint directory; None where it has none.

    Raises RoveError where it is damaged, or knows more tokens than the model.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
        # A tokenizer keeps those of the last call before it was saved; prompts are neither padded nor cut.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        prompts = PromptTokenizer(tokenizer, checkpoint)
        tried = tokenizer.encode(checkpoint.prompt.format(instruction="pick up the red cube")).ids
    except Exception as error:  # the library raises no narrower one
        raise RoveError(
            f"{path} is damaged, or of another version of tokenizers: {error}. Copy or download it again."
        ) from error
    largest = max((*tokenizer.get_vocab().values(), *tried), default=0)
    if largest >= checkpoint.rows:
        raise RoveError(
            f"{path} has a token {largest}, beyond the {checkpoint.rows} of the model: "
            "use the tokenizer that was published with the checkpoint."
        )
    return prompts
