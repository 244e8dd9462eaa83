"""Contents of a checkpoint's config.json and preprocessor_config.json, in the layout of `openvla/openvla-7b`.

The `json` dictionaries are the only source; everything here is read from them, with the published
defaults where a file leaves a key out. Rove's own settings live under the key "rove".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig as HFLlamaConfig

from rove.config.schema import LoraConfig, PolicyConfig, TowerConfig, ValueHeadConfig
from rove.errors import RoveError, nearest
from rove.policies.openvla import datasets
from rove.types import ActionSpec

BINS = 256
"""Number of bins of an action dimension, K, and so of action tokens."""
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_TIMM_SIZES = {
    "vit_large_patch14_reg4_dinov2.lvd142m": (1024, 24, 16),
    "vit_so400m_patch14_siglip_224": (1152, 27, 16),
}
_MLP_RATIO = {"dinov2": 4.0, "siglip": 3.7362}
# What a `text_config` written as a diff leaves out: the values of Llama-2 as the published converter
# instantiated it, not those of the installed library.
_LLAMA_2 = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "pad_token_id": 32000,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The two JSON files of a checkpoint directory, with their meaning as properties."""

    config: dict[str, Any]
    preprocessor: dict[str, Any]

    @staticmethod
    def read(directory: Path) -> Checkpoint:
        """Read both files. Raises RoveError where config.json is missing, damaged, or not an OpenVLA's."""
        path = directory / "config.json"
        if not path.is_file():
            raise RoveError(f"{directory} is not a checkpoint: it has no config.json.")
        config = read_json(path)
        if config.get("model_type") != "openvla":
            raise RoveError(f"{path}: model_type is {config.get('model_type')!r}, expected 'openvla'.")
        preprocessor = directory / "preprocessor_config.json"
        return Checkpoint(config, read_json(preprocessor) if preprocessor.is_file() else {})

    def write(self, directory: Path) -> None:
        """Write both files into `directory`."""
        for name, content in (("config", self.config), ("preprocessor_config", self.preprocessor)):
            (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def with_settings(self, settings: dict[str, Any]) -> Checkpoint:
        """Return the same files with Rove's own settings updated."""
        return replace(self, config={**self.config, "rove": {**self.rove, **settings}})

    @property
    def rove(self) -> dict[str, Any]:
        """Rove's own settings; empty in a checkpoint that Rove did not write."""
        return self.config.get("rove", {})

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of the vision towers' input."""
        return int(self.config.get("image_sizes", [224])[0])

    @property
    def towers(self) -> tuple[TowerConfig, ...]:
        """The vision towers, in the order of their channels in the pixel values."""
        names = self.config.get("timm_model_ids", list(_TIMM_SIZES))
        sizes = self.config.get("timm_kwargs") or [{}] * len(names)
        return tuple(_tower(name, size) for name, size in zip(names, sizes, strict=True))

    @property
    def normalization(self) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
        """Mean and standard deviation of each tower's three channels, for pixels in [0, 1]."""
        means, stds = self.preprocessor.get("means"), self.preprocessor.get("stds")
        if means is None or stds is None:
            return tuple(_statistics(tower.kind) for tower in self.towers)
        return tuple((tuple(m), tuple(s)) for m, s in zip(means, stds, strict=True))

    @property
    def center_crop(self) -> bool | None:
        """True where the centre of every image is cut out; None where the files do not say."""
        return self.rove.get("center_crop", self.config.get("center_crop"))

    @property
    def interpolation(self) -> str:
        """Interpolation by which images are resized: "bicubic" or "lanczos"."""
        stored = self.rove.get("interpolation") or self.preprocessor.get("interpolations", ["bicubic"])[0]
        if stored not in ("bicubic", "lanczos"):
            choice = nearest(stored, ("bicubic", "lanczos"))
            raise RoveError(f"preprocessor_config.json: interpolation {stored!r} is unknown. {choice}")
        return stored

    @property
    def num_images(self) -> int | None:
        """Number of images that the policy was trained to see at once; None where the files do not say."""
        return self.rove.get("num_images")

    @property
    def llama(self) -> HFLlamaConfig:
        """The language model's configuration, independent of the installed library's defaults."""
        text = {key: self.config.get("text_config", {}).get(key, value) for key, value in _LLAMA_2.items()}
        theta = text.pop("rope_theta")
        return HFLlamaConfig(
            **text,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            tie_word_embeddings=False,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the embedding table's padding; the last 256 are the actions."""
        return self.llama.vocab_size - int(self.config.get("pad_to_multiple_of", 64))

    @property
    def pad_token(self) -> int:
        """Id of the token that pads prompts on the left."""
        return int(self.config.get("pad_token_id", 32000))

    @property
    def stop_token(self) -> int:
        """Id of EOS, which closes the sequence where attention is bidirectional."""
        return 2

    @property
    def prompt(self) -> str:
        """Template of the prompt around the lower-cased instruction."""
        return self.rove.get("prompt", PROMPT)

    @property
    def prompt_end(self) -> int:
        """Id of the token that every prompt ends in; for Llama-2's tokenizer the lone space, 29871."""
        return int(self.rove.get("prompt_end", 29871))

    @property
    def norm_stats(self) -> dict[str, Any]:
        """Statistics stored in config.json; dataset_statistics.json overrides them."""
        return self.config.get("norm_stats", {})

    def settings(self, decoding: str | None, *, head: str, proprio: bool) -> dict[str, Any]:
        """Return the settings to run the model with: saved by Rove, or else those of published checkpoints.

        `head` and `proprio` describe the files that the directory holds.
        """
        regression = head == "l1"
        decoding = decoding or self.rove.get("decoding", "parallel" if regression else "autoregressive")
        published = {
            # RL trains discrete checkpoints with causal attention; regression heads have the original's.
            "attention": "bidirectional" if regression else "causal",
            "chunk": 8 if decoding == "parallel" else 1,
            "temperature": 1.0,
            "placeholders": "zero",
            "film": False,
            "proprio": proprio,
            "pointers": 0,
            "unnorm_key": None,
            "num_images": 2 if proprio else 1,
        }
        saved = {key: self.rove.get(key, value) for key, value in published.items()}
        return saved | {"decoding": decoding, "head": head}

    def action_spec(self, key: str | None, dim: int) -> ActionSpec:
        """Return the action spec of `dim` dimensions: the saved one, or else that of the data set `key`."""
        spec = self.rove.get("action_spec")
        if spec is None:
            return datasets.action_spec(key, dim)
        lists: dict[str, Any] = {name: tuple(spec[name]) for name in ("names", "units", "low", "high")}
        return ActionSpec(**{**spec, **lists})

    @property
    def lora(self) -> LoraConfig | None:
        """Configuration of the adapters whose weights the checkpoint holds; None without adapters."""
        lora = self.rove.get("lora")
        return None if lora is None else LoraConfig(**{**lora, "targets": tuple(lora["targets"])})

    @property
    def value_head(self) -> ValueHeadConfig | None:
        """Configuration of the critic whose weights the checkpoint holds; None without a critic."""
        head = self.rove.get("value_head")
        return None if head is None else ValueHeadConfig(**{**head, "hidden": tuple(head["hidden"])})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RoveError naming a file that is damaged."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RoveError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise RoveError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def _statistics(kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return IMAGENET if kind == "dinov2" else SIGLIP


def _tower(name: str, size: dict[str, Any]) -> TowerConfig:
    kinds = [kind for kind in _MLP_RATIO if kind in name]
    if not kinds or (name not in _TIMM_SIZES and not size):
        raise RoveError(f"Unknown vision tower {name!r}. Expected one of: {', '.join(_TIMM_SIZES)}.")
    width, depth, heads = _TIMM_SIZES.get(name, (0, 0, 0))
    width = size.get("embed_dim", width)
    return TowerConfig(
        kind=kinds[0],  # pyright: ignore[reportArgumentType]
        width=width,
        depth=size.get("depth", depth),
        heads=size.get("num_heads", heads),
        patch=size.get("patch_size", 14),
        mlp=int(width * size.get("mlp_ratio", _MLP_RATIO[kinds[0]]) + 1e-6),
    )


def _check_sizes(policy: PolicyConfig, image_size: int) -> None:
    for tower in policy.towers:
        if image_size % tower.patch:
            fits = [str(patch) for patch in (4, 8, 14, 16, 32) if image_size % patch == 0]
            raise RoveError(
                f"policy.towers: patch {tower.patch} does not divide the image size {image_size}. "
                f"Choose one of: {', '.join(fits)}."
            )
        if tower.kind == "dinov2" and tower.mlp % tower.width:
            raise RoveError(
                f"policy.towers: the mlp of a dinov2 tower must be a multiple of its width {tower.width}, "
                f"not {tower.mlp}."
            )
    if len({tower.patch for tower in policy.towers}) != 1:
        raise RoveError(
            "policy.towers: all towers need the same patch size, because their features are joined."
        )
    for name, sizes in [("towers", tower) for tower in policy.towers] + [("llama", policy.llama)]:
        if sizes.width % (2 * sizes.heads):
            raise RoveError(
                f"policy.{name}: width {sizes.width} must be a multiple of 2 x heads = {2 * sizes.heads}."
            )


def describe(policy: PolicyConfig, *, image_size: int, words: int) -> Checkpoint:
    """Make the JSON files of a new model; `words` is the size of its tokenizer, action tokens included.

    Raises RoveError where sizes do not divide.
    """
    _check_sizes(policy, image_size)
    statistics = [_statistics(tower.kind) for tower in policy.towers]
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
