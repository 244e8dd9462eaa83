"""Prompts of flow policies: the text in each published format, its token ids, and a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from rove.errors import RoveError
from rove.policies.reading import read_text
from rove.policies.words import unknown_word

Style = Literal["newline", "openpi", "state", "padded_state"]
"""The text: the instruction and a newline (SmolVLA, LeRobot's π0); the same, cleaned first, its newline a
token of its own (openpi's π0, and π0.5 without a state, as for LIBERO); the instruction and the state in 256
steps (π0.5); or that with the state padded to 32 numbers, as LeRobot did for π0.5 before March 2026."""

STATE_STEPS = 256
"""Steps in which a prompt gives the state between −1 and 1."""
_PADDED = 32
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Special tokens of a word-level vocabulary, ids 0 to 3; <pad> and <bos> are π's as published."""


def text(instruction: str, style: Style, state: Sequence[int] | None = None) -> str:
    """Return the prompt of an instruction; `state` is what `discretize` made of it, if the style has one."""
    if style == "newline":
        return instruction if instruction.endswith("\n") else f"{instruction}\n"
    cleaned = instruction.strip().replace("_", " ").replace("\n", " ")
    if style == "openpi":
        return cleaned
    assert state is not None
    return f"Task: {cleaned}, State: {' '.join(map(str, state))};\nAction: "


def discretize(state: Tensor, style: Style = "state") -> list[list[int]]:
    """Return normalised states [B, P] in 256 steps: 0 to 255 between −1 and 1, and −1 below."""
    if style == "padded_state":
        state = torch.nn.functional.pad(state, (0, _PADDED - state.shape[-1]))
    edges = torch.linspace(-1, 1, STATE_STEPS + 1, dtype=torch.float64)[:-1]
    return (torch.bucketize(state.double().cpu(), edges, right=True) - 1).tolist()


NO_TOKENIZER = (
    "has no tokenizer.json, so the policy cannot read instructions. Copy it there from the model that it was "
    "trained from: HuggingFaceTB/SmolVLM2-500M-Video-Instruct for SmolVLA, google/paligemma-3b-pt-224 for π0 "
    "and π0.5 (transformers.AutoTokenizer.from_pretrained(NAME).save_pretrained(DIRECTORY))."
)


def word_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """Make a lower-casing tokenizer of the words of `vocabulary`, for a policy from scratch.

    It also knows the words, marks and numbers of the published prompts, the newline among them.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    parts = ("task", "state", "action", ":", ",", ";", "-", "\n", *map(str, range(STATE_STEPS)))
    texts = (normalizer.normalize_str(word) for word in vocabulary)
    words = {word for one in texts for word, _ in cut.pre_tokenize_str(one)} - set(parts)
    tokens = [*SPECIALS, *parts, *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cut
    return tokenizer


class Prompts:
    """A tokenizer of instructions to token ids padded on the right."""

    def __init__(self, tokenizer: Tokenizer, *, style: Style, length: int, bos: int | None, pad: int) -> None:
        """Take a tokenizer; prompts are cut after `length` tokens, and begin with `bos` where given."""
        self.tokenizer, self.length, self.bos, self.pad = tokenizer, length, bos, pad
        self.style: Style = style
        self._cache: dict[str, list[int]] = {}

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt."""
        ids = self._cache.get(prompt)
        if ids is None:
            ids = self._ids(prompt)
            if self.style == "openpi":
                ids = ids + self._ids("\n")
            ids = ([] if self.bos is None else [self.bos]) + ids
            ids = ids[: self.length]
            if self.style in ("newline", "openpi"):  # prompts with a state hardly ever come again
                self._cache[prompt] = ids
        return ids

    def unknown(self, instruction: str) -> str | None:
        """Return the first word of an instruction that is not in the vocabulary; None where all are."""
        return unknown_word(self.tokenizer, instruction)

    def _ids(self, part: str) -> list[int]:
        return self.tokenizer.encode(part, add_special_tokens=False).ids

    @property
    def reads_state(self) -> bool:
        """True where the state is in the prompt."""
        return self.style in ("state", "padded_state")

    def __call__(self, instructions: Sequence[str], state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return token ids, int64 [B, L], and their mask, bool [B, L]; L is that of the longest prompt.

        `state` [B, P], normalised, is read where the style has one. Raises RoveError where it is None then.
        """
        states: Sequence[list[int] | None] = [None] * len(instructions)
        if self.reads_state:
            if state is None:
                raise RoveError(
                    "The policy reads the robot's state in its prompt, which this suite does not give."
                )
            states = discretize(state, self.style)
        rows = [self.encode(text(i, self.style, s)) for i, s in zip(instructions, states, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def read_tokenizer(directory: Path, vocabulary: int) -> Tokenizer | None:
    """Read tokenizer.json of a checkpoint directory; None where there is none.

    Raises RoveError where it is damaged, or knows more tokens than the `vocabulary` of the model.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    content = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(content)
        # A tokenizer keeps those of the last call before it was saved.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tried = tokenizer.encode("pick up the red cube\n", add_special_tokens=False).ids
    except Exception as error:  # the library raises no narrower one
        raise RoveError(
            f"{path} is damaged, or of another version of tokenizers: {error}. Copy or download it again."
        ) from error
    largest = max(tried, default=0)
    if largest >= vocabulary:
        raise RoveError(
            f"{path} has a token {largest}, beyond the {vocabulary} of the model: use the tokenizer that was "
            "published with the checkpoint."
        )
    return tokenizer
