"""Conversion of instructions to token ids: prompt template, left padding, cache; a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from rove.errors import RoveError
from rove.policies.openvla.config import BINS, Checkpoint

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
"""Special tokens of a word-level vocabulary, ids 0 to 3; <s> and </s> have Llama's own ids."""

NO_TOKENIZER = (
    "The checkpoint has no tokenizer.json, so it cannot read instructions. Where it has a tokenizer.model, "
    "transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory) converts it."
)


def word_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """Make a lower-casing tokenizer of whole words; the last 256 ids are the action tokens."""
    words = sorted({word.lower() for word in vocabulary})
    tokens = [*SPECIALS, *words, *(f"<action_{BINS - 1 - j}>" for j in range(BINS))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


class PromptTokenizer:
    """A tokenizer of instructions to left-padded batches of token ids, with a checkpoint's prompt."""

    def __init__(self, tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
        self.tokenizer = tokenizer
        self._template = checkpoint.prompt
        self._end = checkpoint.prompt_end
        self._pad = checkpoint.pad_token
        self._cache: dict[str, list[int]] = {}

    def encode(self, instruction: str) -> list[int]:
        """Return one prompt's token ids, from BOS to the prompt's end, appended where it is absent."""
        ids = self._cache.get(instruction)
        if ids is None:
            prompt = self._template.format(instruction=instruction.strip().lower())
            ids = self.tokenizer.encode(prompt).ids
            if ids[-1] != self._end:
                ids = [*ids, self._end]
            self._cache[instruction] = ids
        return ids

    def __call__(self, instructions: Sequence[str], multiple: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return `input_ids` int64 [B, L] and `attention_mask` bool [B, L], None where no row is padded.

        L is rounded up to a multiple of `multiple`.
        """
        rows = [self.encode(text) for text in instructions]
        longest = -(-max(map(len, rows)) // multiple) * multiple
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        if bool((lengths == longest).all()):
            return ids, None
        return ids, torch.arange(longest) >= (longest - lengths)[:, None]

    def save(self, directory: Path) -> None:
        """Write tokenizer.json."""
        self.tokenizer.save(str(directory / "tokenizer.json"))


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint directory; None where it has none."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # whatever the library raises, it raises as Exception itself
        raise RoveError(f"{path} is damaged, or cannot be read: {error}.") from error
