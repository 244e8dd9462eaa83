"""Contents of a checkpoint's config.json and preprocessor_config.json, in the layout of `openvla/openvla-7b`.

The `json` dictionaries are the only source; everything here is read from them, with the published
defaults where a file leaves a key out. Rove's own settings live under the key "rove".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import LlamaConfig as HFLlamaConfig

from rove.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from rove.config.schema import LoraConfig, PolicyConfig, TowerConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies.openvla import computed, datasets
from rove.policies.openvla.towers import TIMM_SIZES, check_heads, check_sizes, colours, read_tower
from rove.policies.reading import DEPTH, WIDTH, Table, from_one_to, read_json
from rove.types import ActionSpec

BINS = 256
"""Number of bins of an action dimension, K, and so of action tokens."""
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
_VOCABULARY = Annotated[int, from_one_to(10_000_000)]
_CHUNK = Annotated[int, from_one_to(1000)]
_COUNT = Annotated[int, Range("from 0 to 1,000", lambda x: 0 <= x <= 1000)]
# What a `text_config` written as a diff leaves out: the values of Llama-2 as the published converter
# instantiated it, not those of the installed library.
_LLAMA_2 = {
    "vocab_size": (_VOCABULARY, 32064),
    "hidden_size": (WIDTH, 4096),
    "intermediate_size": (WIDTH, 11008),
    "num_hidden_layers": (DEPTH, 32),
    "num_attention_heads": (WIDTH, 32),
    "num_key_value_heads": (WIDTH, None),
    "max_position_embeddings": (_VOCABULARY, 2048),
    "rms_norm_eps": (NonNegativeFloat, 1e-6),
    "pad_token_id": (NonNegativeInt, 32000),
}
_ROVE = (
    "prompt", "prompt_end", "center_crop", "interpolation", "num_images", "decoding", "attention", "head",
    "chunk", "temperature", "placeholders", "film", "proprio", "pointers", "pointed", "action_spec",
    "unnorm_key", "value_head", "lora", "base", "base_from_here",
)  # fmt: skip
"""Rove's own settings, below "rove"."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The two JSON files of a checkpoint directory, with their meaning as properties.

    A value of another type, or one that Rove does not compute with, raises RoveError with its file and key.
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    config_file: str = "config.json"
    """Where `config` was read from, for messages."""
    preprocessor_file: str = "preprocessor_config.json"

    @staticmethod
    def read(*directories: Path) -> Checkpoint:
        """Read and check both files, each from the first of `directories` that has it.

        Raises RoveError where config.json is missing, damaged, or not an OpenVLA's.
        """
        found = {
            name: [directory / name for directory in directories if (directory / name).exists()]
            for name in ("config.json", "preprocessor_config.json")
        }
        if not found["config.json"]:
            raise RoveError(f"{directories[0]} is not a checkpoint: it has no config.json.")
        config, *others = (read_json(paths[0]) for paths in found.values() if paths)
        if config.content.get("model_type") != "openvla":
            said = config.content.get("model_type")
            raise RoveError(f"{config.where}: model_type is {said!r}, expected 'openvla'.")
        preprocessor = others[0] if others else Table({}, "preprocessor_config.json")
        checkpoint = Checkpoint(config.content, preprocessor.content, config.where, preprocessor.where)
        checkpoint.check()
        return checkpoint

    def write(self, directory: Path) -> None:
        """Write both files into `directory`."""
        for name, content in (("config", self.config), ("preprocessor_config", self.preprocessor)):
            (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def check(self) -> None:
        """Read everything once. Raises RoveError naming the first value that is wrong."""
        towers, size = self.towers, self.image_size
        check_sizes(f"{self.config_file}: ", towers, size)
        computed.check_model(self.table, len(towers))
        computed.check_preprocessor(self.preprocessor_table, len(towers), size)
        self.rove.refuse_unknown(_ROVE)
        self.settings(None, head="discrete", proprio=False)
        self.action_spec(None, 7)
        for name, value in vars(Checkpoint).items():
            if isinstance(value, property):
                getattr(self, name)

    def with_settings(self, settings: dict[str, Any]) -> Checkpoint:
        """Return the same files with Rove's own settings updated."""
        return replace(self, config={**self.config, "rove": {**self.rove.content, **settings}})

    @property
    def table(self) -> Table:
        """config.json."""
        return Table(self.config, self.config_file)

    @property
    def preprocessor_table(self) -> Table:
        """preprocessor_config.json; empty where there is none."""
        return Table(self.preprocessor, self.preprocessor_file)

    @property
    def rove(self) -> Table:
        """Rove's own settings; empty in a checkpoint that Rove did not write."""
        return self.table.table("rove")

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the vision towers' input."""
        sizes = self.table.get("image_sizes", tuple[int, ...], (224,))
        if len(sizes) not in (1, len(self.towers)) or len(set(sizes)) != 1 or not 1 <= sizes[0] <= 10_000:
            raise RoveError(
                f"{self.config_file}: image_sizes = {list(sizes)}: expected one positive size for all towers."
            )
        return sizes[0]

    @property
    def towers(self) -> tuple[TowerConfig, ...]:
        """The vision towers, in the order of their channels in the pixel values."""
        names = self.table.get("timm_model_ids", tuple[str, ...], tuple(TIMM_SIZES))
        sizes = self.table.tables("timm_kwargs")
        if not 1 <= len(names) <= 2:
            raise RoveError(f"{self.config_file}: timm_model_ids has {len(names)} towers, expected 1 or 2.")
        if sizes is not None and len(sizes) != len(names):
            raise RoveError(
                f"{self.config_file}: timm_kwargs has {len(sizes)} entries, timm_model_ids {len(names)}: "
                "give each tower its own."
            )
        empty = Table({}, f"{self.config_file}: timm_kwargs")
        return tuple(
            read_tower(name, size) for name, size in zip(names, sizes or [empty] * len(names), strict=True)
        )

    @property
    def normalization(self) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
        """Mean and standard deviation of each tower's three channels, for pixels in [0, 1]."""
        towers, table = self.towers, self.preprocessor_table
        if "means" not in table and "stds" not in table:
            return tuple(colours(tower.kind) for tower in towers)
        triple = tuple[float, float, float]
        means, stds = (table.need(name, tuple[triple, ...]) for name in ("means", "stds"))
        if not len(means) == len(stds) == len(towers) or min(x for std in stds for x in std) <= 0:
            raise RoveError(
                f"{table.where}: expected means and stds of {len(towers)} towers, each std above 0, not "
                f"{len(means)} means and stds {[list(std) for std in stds]}."
            )
        return tuple(zip(means, stds, strict=True))

    @property
    def center_crop(self) -> bool | None:
        """True where the centre of every image is cut out; None where the files do not say."""
        return self.rove.get("center_crop", bool, self.table.get("center_crop", bool, None))

    @property
    def interpolation(self) -> str:
        """Interpolation by which images are resized: "bicubic" or "lanczos"."""
        known = Literal["bicubic", "lanczos"]
        own = self.rove.get("interpolation", known, None)
        stored = self.preprocessor_table.get("interpolations", tuple[known, ...], ("bicubic",))
        if len(set(stored)) != 1:
            raise RoveError(
                f"{self.preprocessor_file}: interpolations = {list(stored)}: expected one for all towers."
            )
        return own or stored[0]

    @property
    def llama(self) -> HFLlamaConfig:
        """The language model's configuration, independent of the installed library's defaults."""
        theta = computed.rope_theta(self.table.table("text_config"))
        rope = {"rope_type": "default", "rope_theta": theta}
        return HFLlamaConfig(**self._llama_sizes, rope_parameters=rope, tie_word_embeddings=False)

    @property
    def rows(self) -> int:
        """Number of rows of the embedding table, which has more than `vocab_size`."""
        return self._llama_sizes["vocab_size"]

    @property
    def _llama_sizes(self) -> dict[str, Any]:
        text = self.table.table("text_config")
        sizes = {key: text.get(key, kind, default) for key, (kind, default) in _LLAMA_2.items()}
        heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        check_heads(text.where, sizes["hidden_size"], heads)
        if heads % (shared or heads):
            raise RoveError(f"{text.where}: num_key_value_heads {shared} does not divide the {heads} heads.")
        if sizes["pad_token_id"] >= sizes["vocab_size"]:
            raise RoveError(
                f"{text.where}: pad_token_id {sizes['pad_token_id']} is beyond the {sizes['vocab_size']} of "
                "vocab_size."
            )
        computed.check_text(text, sizes["hidden_size"] // heads)
        return sizes

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the embedding table's padding; the last 256 are the actions."""
        rows, padding = self.rows, self.table.get("pad_to_multiple_of", NonNegativeInt, 64)
        if rows - padding < BINS:
            raise RoveError(
                f"{self.config_file}: vocab_size {rows} less pad_to_multiple_of {padding} leaves no room for "
                f"the {BINS} action tokens."
            )
        return rows - padding

    @property
    def pad_token(self) -> int:
        """Id of the token that pads prompts on the left."""
        return self._token(self.table, "pad_token_id", 32000)

    @property
    def stop_token(self) -> int:
        """Id of EOS, which closes the sequence where attention is bidirectional."""
        return 2

    @property
    def prompt(self) -> str:
        """Template of the prompt around the lower-cased instruction."""
        template = self.rove.get("prompt", str, PROMPT)
        mark = "\0"
        try:
            told = template.format(instruction=mark)
        except (ValueError, LookupError, AttributeError):
            told = ""
        if mark not in told:
            raise RoveError(
                f"{self.rove.where}: prompt = {template!r}: expected text with {{instruction}} in it, and no "
                "other braces."
            )
        return template

    @property
    def prompt_end(self) -> int:
        """Id of the token that every prompt ends in; for Llama-2's tokenizer the lone space, 29871."""
        return self._token(self.rove, "prompt_end", 29871)

    def _token(self, table: Table, key: str, default: int) -> int:
        token = table.get(key, NonNegativeInt, default)
        if key in table and token >= self.rows:
            raise RoveError(f"{table.where}: {key} = {token} is beyond the {self.rows} tokens of vocab_size.")
        return token

    @property
    def norm_stats(self) -> Table:
        """Statistics stored in config.json; dataset_statistics.json overrides them."""
        return self.table.table("norm_stats")

    def settings(self, decoding: str | None, *, head: str, proprio: bool) -> dict[str, Any]:
        """Return the settings to run the model with: saved by Rove, or else those of published checkpoints.

        `head` and `proprio` describe the files that the directory holds.
        """
        rove, regression = self.rove, head == "l1"
        rove.get("head", Literal["discrete", "l1"], head)
        saved = rove.get(
            "decoding",
            Literal["autoregressive", "parallel"],
            "parallel" if regression else "autoregressive",
        )
        # RL trains discrete checkpoints with causal attention; regression heads have the original's.
        usual = "bidirectional" if regression else "causal"
        return {
            "decoding": decoding or saved,
            "head": head,
            "attention": rove.get("attention", Literal["causal", "bidirectional"], usual),
            "chunk": rove.get("chunk", _CHUNK, 8 if (decoding or saved) == "parallel" else 1),
            "temperature": rove.get("temperature", PositiveFloat, 1.0),
            "placeholders": rove.get("placeholders", Literal["zero", "learned"], "zero"),
            "film": rove.get("film", bool, False),
            "proprio": rove.get("proprio", bool, proprio),
            "pointers": rove.get("pointers", _COUNT, 0),
            "pointed": rove.get("pointed", PositiveInt, 1),
            "unnorm_key": rove.get("unnorm_key", str | None, None),
            "num_images": rove.get("num_images", PositiveInt | None, 2 if proprio else 1),
        }

    def action_spec(self, key: str | None, dim: int) -> ActionSpec:
        """Return the action spec of `dim` dimensions: the saved one, or else that of the data set `key`."""
        if "action_spec" not in self.rove:
            return datasets.action_spec(key, dim)
        table = self.rove.table("action_spec")
        table.refuse_unknown([field.name for field in fields(ActionSpec)])
        names, units = (table.need(name, tuple[str, ...]) for name in ("names", "units"))
        low, high = (table.numbers(name, endless=True) for name in ("low", "high"))
        if not len(set(names)) == len(names) == len(units) == len(low) == len(high) > 0:
            raise RoveError(
                f"{table.where}: expected as many names, all different, as units, low and high; there are "
                f"{len(set(names))}, {len(units)}, {len(low)} and {len(high)}."
            )
        if wrong := [name for name, a, b in zip(names, low, high, strict=True) if a > b]:
            raise RoveError(f"{table.where}: low is above high in {', '.join(wrong)}.")
        frame = table.get("frame", Literal["world", "end_effector"], "world")
        control = table.get("control", Literal["delta", "absolute"], "delta")
        gripper = table.get("gripper", Literal["open_high", "open_low"], "open_high")
        return ActionSpec(names, units, low, high, frame, control, gripper)

    @property
    def lora(self) -> LoraConfig | None:
        """Configuration of the adapters whose weights the checkpoint holds; None without adapters."""
        return self.rove.get("lora", LoraConfig, None)

    @property
    def value_head(self) -> ValueHeadConfig | None:
        """Configuration of the critic whose weights the checkpoint holds; None without a critic."""
        head = self.rove.get("value_head", ValueHeadConfig, None)
        if head is not None and not all(1 <= width <= 100_000 for width in head.hidden):
            raise RoveError(f"{self.rove.where}: value_head.hidden = {list(head.hidden)}: expected widths.")
        return head


def describe(policy: PolicyConfig, *, image_size: int, words: int) -> Checkpoint:
    """Make the JSON files of a new model; `words` is the size of its tokenizer, action tokens included.

    Raises RoveError where sizes do not divide.
    """
    check_sizes("policy.", policy.towers, image_size)
    check_heads("policy.llama", policy.llama.width, policy.llama.heads)
    statistics = [colours(tower.kind) for tower in policy.towers]
    config = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp" if len(policy.towers) > 1 else "no-align+gelu-mlp",
        "use_fused_vision_backbone": len(policy.towers) > 1,
        "image_sizes": [image_size] * len(policy.towers),
        "image_resize_strategy": "resize-naive",
        "timm_model_ids": [
            f"vit_patch{tower.patch}_{'reg4_' if tower.kind == 'dinov2' else ''}{tower.kind}"
            for tower in policy.towers
        ],
        "timm_kwargs": [
            {
                "embed_dim": tower.width,
                "depth": tower.depth,
                "num_heads": tower.heads,
                "patch_size": tower.patch,
                "mlp_ratio": tower.mlp / tower.width,
            }
            for tower in policy.towers
        ],
        "n_action_bins": BINS,
        "pad_token_id": 0,
        "pad_to_multiple_of": 0,
        "text_config": {
            "model_type": "llama",
            "vocab_size": words,
            "hidden_size": policy.llama.width,
            "intermediate_size": policy.llama.mlp,
            "num_hidden_layers": policy.llama.depth,
            "num_attention_heads": policy.llama.heads,
            "num_key_value_heads": policy.llama.heads,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        "rove": {"prompt": "{instruction}", "prompt_end": 2},
    }
    preprocessor = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, image_size, image_size]] * len(policy.towers),
        "interpolations": ["bicubic"] * len(policy.towers),
        "means": [list(mean) for mean, _ in statistics],
        "stds": [list(std) for _, std in statistics],
        "use_fused_vision_backbone": len(policy.towers) > 1,
    }
    return Checkpoint(config, preprocessor)
