"""Settings of an OpenVLA policy, whether new, from a checkpoint or on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rove.config.schema import PolicyConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies.openvla.config import Checkpoint
from rove.policies.openvla.decoding import Decoding
from rove.policies.openvla.heads import NO_LIKELIHOOD
from rove.policies.openvla.language import Attention
from rove.policies.openvla.tokenizer import PromptTokenizer
from rove.types import ActionSpec

Placeholders = Literal["zero", "learned"]
Head = Literal["discrete", "l1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that the model is made from. Raises RoveError where the settings do not fit each other."""

    checkpoint: Checkpoint
    """The checkpoint's JSON files, which give the architecture."""
    decoding: Decoding
    chunk: int
    """Number of actions in a chunk, C."""
    action_spec: ActionSpec
    statistics: Mapping[str, Any]
    """Statistics of each data set, as in dataset_statistics.json."""
    unnorm_key: str | None = None
    """The data set whose statistics un-normalise actions; None: the only one."""
    attention: Attention = "causal"
    head: Head = "discrete"
    temperature: float = 1.0
    placeholders: Placeholders = "zero"
    film: bool = False
    proprio: bool = False
    pointers: int = 0
    pointed: int = 1
    num_images: int | None = None
    """Number of images that the policy was trained to see at once; None where that is left open."""
    center_crop: bool | None = None
    """True where the centre of every image is cut out; None: as the checkpoint says."""
    value_head: ValueHeadConfig | None = None
    tokenizer: PromptTokenizer | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.decoding == "autoregressive" and self.attention == "bidirectional":
            raise RoveError(
                "Autoregressive decoding needs attention='causal', or a token would see itself; "
                "bidirectional attention goes with decoding='parallel'."
            )
        if self.head == "l1" and self.decoding == "autoregressive":
            raise RoveError("The L1 head reads all actions at once: it goes with decoding='parallel'.")
        if self.head == "l1" and self.value_head is not None:
            raise RoveError(NO_LIKELIHOOD)

    @classmethod
    def from_scratch(
        cls,
        config: PolicyConfig,
        checkpoint: Checkpoint,
        *,
        chunk: int,
        action_spec: ActionSpec,
        statistics: Mapping[str, Any],
        tokenizer: PromptTokenizer | None = None,
    ) -> Settings:
        """Return the settings of a new policy as `config` says; `checkpoint` describes its architecture."""
        return cls(
            checkpoint=checkpoint,
            decoding=config.decoding,
            chunk=chunk,
            action_spec=action_spec,
            statistics=statistics,
            attention=config.attention,
            head=config.head,
            temperature=config.temperature,
            placeholders=config.placeholders,
            film=config.film,
            proprio=config.proprio,
            pointers=config.pointers,
            pointed=config.pointed,
            center_crop=config.center_crop,
            value_head=config.value_head,
            tokenizer=tokenizer,
            compiled=config.compile,
        )
