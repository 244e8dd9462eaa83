"""What a checkpoint's config.json says of a flow policy: LeRobot's, or openpi's, whose sizes are constants.

A value that changes the computation and that Rove does not compute with is refused by file and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast, get_args

from rove.config.ranges import PositiveFloat, Range
from rove.errors import RoveError, nearest
from rove.policies.flow.images import Resizer
from rove.policies.flow.prompts import Style
from rove.policies.reading import DEPTH, WIDTH, Table, from_one_to

Family = Literal["smolvla", "pi0", "pi05"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Freeze = Literal["none", "vision", "vlm"]
"""What is not trained; see `FlowPolicyConfig.freeze`."""
FREEZES: tuple[Freeze, ...] = get_args(Freeze)

_NAMES = ("SmolVLM2-500M-Video-Instruct", "SmolVLM2-500M-Instruct", "SmolVLM-500M-Instruct")
_SMOLVLM = {
    "scale_factor": 4,
    "text_config": {
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
}
"""Sizes of SmolVLM2-500M, which SmolVLA's config.json gives by name only."""
_SPECIAL_TOKENS = (49189, 49152)
"""SmolVLM2's `<fake_token_around_image>` and `<global-img>`."""
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257152}
_GEMMAS = {
    "gemma_2b": _GEMMA | {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384},
    "gemma_300m": _GEMMA | {"hidden_size": 1024, "num_hidden_layers": 18, "intermediate_size": 4096},
}
"""Sizes of PaliGemma's language model and of the experts beside it, by their names in openpi."""
COUNT = Annotated[int, Range("from 0 to 64", lambda x: 0 <= x <= 64)]
PICTURES = Annotated[int, from_one_to(64)]
_TOKEN = Annotated[int, Range("a token's id", lambda x: 0 <= x < 10**7)]
HORIZON = Annotated[int, Range("from 1 to 1024", lambda x: 1 <= x <= 1024)]


@dataclass(frozen=True, slots=True)
class TextSizes:
    """Sizes of a language model, or of the expert beside it."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    """Added to the mean square in RMSNorm."""


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """Sizes of a SigLIP vision tower."""

    width: int
    mlp: int
    layers: int
    heads: int
    patch: int
    image: int
    """Height and width of the pictures in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """Everything that a flow policy is made from but its statistics and its tokenizer."""

    family: Family
    horizon: int
    """Number of predicted actions, H."""
    executed: int
    """Number of executed actions that config.json names."""
    steps: int
    """Denoising steps, K, that config.json names."""
    max_state: int
    max_action: int
    """Sizes to which states and actions are padded with zeros, D."""
    state: int | None
    """Size of the robot's state, P; None where config.json does not say."""
    actions: int | None
    """Real action dimensions, A; None where config.json does not say."""
    cameras: int | None
    """Number of pictures; None where config.json does not say."""
    absent: int
    """Cameras after these that are always absent."""
    prompt_length: int
    vision: VisionSizes
    text: TextSizes
    expert: TextSizes
    periods: tuple[float, float]
    """Shortest and longest period of the time embedding."""
    scale_factor: int = 1
    """Edge of a square of patches that become one token."""
    self_attention_every: int = 1
    """SmolVLA: of the expert's layers, every such one attends to the actions too; 0: none does."""
    special_tokens: tuple[int, int] | None = None
    """SmolVLA: the tokens around each picture, and at its beginning; None: none are put there."""
    resizer: Resizer
    prompt: Style
    delta: int = 0
    """First numbers of the state that actions are relative to, as in openpi's π0 for LIBERO; 0: none."""
    content: Mapping[str, Any]
    """config.json as it was read."""
    where: str
    """Its path."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixel values."""
        return self.vision.image, self.vision.image

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture, without special ones."""
        return (self.vision.image // self.vision.patch // self.scale_factor) ** 2


def family_named(kind: str) -> Family | None:
    """Return the family of that name; None where there is none."""
    return cast(Family, kind) if kind in FAMILIES else None


def family_of(config: Table, keys: Mapping[str, Any]) -> Family:
    """Return the family by config.json's "type", or by the names of the weights where openpi wrote it.

    Raises RoveError where the type is unknown.
    """
    kind = config.get("type", str, None)
    if kind is None:
        return "pi05" if any(key.endswith("input_layernorm.dense.weight") for key in keys) else "pi0"
    if (family := family_named(kind)) is None:
        raise RoveError(f"{config.where}: unknown flow policy, type = {kind!r}. {nearest(kind, FAMILIES)}")
    return family


def read(config: Table, family: Family, *, openpi: bool) -> FlowConfig:
    """Read config.json. With `openpi`, pictures and prompts are made as openpi does.

    Raises RoveError naming the key where a value is of another type, or is not computed with.
    """
    _refuse(config)
    vision, text, expert, more = (_read_smolvla if family == "smolvla" else _read_pi)(config)
    shapes, features = _features(config), config.table("input_features")
    visual = [name for name, kind in shapes.items() if kind[0] == "VISUAL"]
    cameras = [name for name in visual if "empty_camera" not in name]
    empty = config.get("empty_cameras", COUNT, 1 if openpi else 0)
    size = config.get(_SIZE_KEY[family], tuple[int, ...], (vision.image, vision.image))
    if size != (vision.image, vision.image):
        raise RoveError(
            f"{config.where}: {_SIZE_KEY[family]} = {list(size)}, but the vision tower sees {vision.image} "
            "pixels in height and width: correct one of them."
        )
    if vision.image % vision.patch or (vision.image // vision.patch) % more.get("scale_factor", 1):
        raise RoveError(f"{config.where}: pictures of {vision.image} pixels do not divide into patches.")
    horizon = config.get("chunk_size", HORIZON, config.get("action_horizon", HORIZON, 50))
    rove = config.table("rove")
    return FlowConfig(
        family=family,
        horizon=horizon,
        executed=min(config.get("n_action_steps", HORIZON, horizon), horizon),
        steps=config.get(_STEPS_KEY[family], HORIZON, 10),
        max_state=config.get("max_state_dim", WIDTH, 32),
        max_action=config.get("max_action_dim", WIDTH, config.get("action_dim", WIDTH, 32)),
        state=_size_of(shapes, features, "STATE"),
        actions=_size_of(shapes, features, "ACTION"),
        cameras=rove.get("cameras", COUNT | None, len(cameras) or (2 if openpi else None)),
        absent=empty,
        prompt_length=config.get("tokenizer_max_length", WIDTH, 200 if family == "pi05" else 48),
        vision=vision,
        text=text,
        expert=expert,
        periods=(config.get("min_period", PositiveFloat, 4e-3), config.get("max_period", PositiveFloat, 4.0)),
        resizer=rove.get("resizer", Resizer, "openpi" if openpi else _RESIZERS[family]),
        prompt=rove.get("prompt", Style, _style(family, openpi)),
        delta=rove.get("delta", COUNT, 0),
        content=config.content,
        where=config.where,
        **more,
    )


_SIZE_KEY = {"smolvla": "resize_imgs_with_padding", "pi0": "image_resolution", "pi05": "image_resolution"}
_STEPS_KEY = {"smolvla": "num_steps", "pi0": "num_inference_steps", "pi05": "num_inference_steps"}
_RESIZERS: dict[Family, Resizer] = {"smolvla": "smolvla", "pi0": "lerobot", "pi05": "lerobot"}


def _style(family: Family, openpi: bool) -> Style:
    if family == "pi05":
        return "state"
    return "openpi" if openpi else "newline"


def _refuse(config: Table) -> None:
    """Raise RoveError where config.json asks for what Rove does not compute."""
    for key in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha", "use_relative_actions"):
        config.refuse_others(key, False)
    config.refuse_others("attention_mode", "cross_attn")
    config.refuse_others("n_obs_steps", 1)
    times = {"beta_alpha": 1.5, "beta_beta": 1.0, "scale": 0.999, "offset": 0.001}
    for key, value in times.items():
        config.refuse_others(f"time_sampling_{key}", value)


def _features(config: Table) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return kind and shape of every feature of LeRobot's config.json, by name."""
    out = {}
    for group in ("input_features", "output_features"):
        table = config.table(group)
        for name in table.content:
            one = table.table(name)
            out[name] = (one.need("type", str), one.get("shape", tuple[int, ...], ()))
    return out


def _size_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]], features: Table, kind: str) -> int | None:
    found = [(name, shape) for name, (its, shape) in shapes.items() if its == kind]
    for name, shape in found:
        if len(shape) != 1 or shape[0] < 1:
            raise RoveError(f"{features.where}: {name} has shape {list(shape)}, expected one size.")
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise RoveError(f"{features.where}: several features are {kind}, {names}: Rove reads one.")
    return found[0][1][0] if found else None


def _read_smolvla(config: Table) -> tuple[VisionSizes, TextSizes, TextSizes, dict[str, Any]]:
    vlm = config.table("vlm_config")
    if not vlm.content:
        name = config.get("vlm_model_name", str, _NAMES[0])
        if name.rpartition("/")[2] not in _NAMES:
            raise RoveError(
                f"{config.where}: the sizes of vlm_model_name = {name!r} are not known: add them "
                "as vlm_config, from that model's own config.json."
            )
        vlm = Table(_SMOLVLM, f"{config.where}: vlm_config")
    text = _text(vlm.table("text_config", needed=True), hidden_act=("silu", "swish"))
    layers = config.get("num_vlm_layers", int, 16)
    text = replace(text, layers=min(layers, text.layers) if layers > 0 else text.layers)
    experts = config.get("num_expert_layers", int, -1)
    if experts > 0 and experts != text.layers:
        raise RoveError(
            f"{config.where}: num_expert_layers = {experts}, but the VLM has {text.layers} layers: only "
            "equal numbers are computed with."
        )
    width = int(config.get("expert_width_multiplier", PositiveFloat, 0.75) * text.width)
    mlp = -(-int(2 * width / 3) * 4 // 256) * 256
    special = None
    if config.get("add_image_special_tokens", bool, False):
        keys = ("fake_image_token_id", "global_image_token_id")
        fake, whole = (
            config.get(key, _TOKEN, token) for key, token in zip(keys, _SPECIAL_TOKENS, strict=True)
        )
        special = (fake, whole)
        if max(special) >= text.vocab:
            raise RoveError(f"{config.where}: {keys[0]} or {keys[1]} is beyond the {text.vocab} tokens.")
    more = {
        "scale_factor": vlm.get("scale_factor", WIDTH, 4),
        "self_attention_every": max(0, config.get("self_attn_every_n_layers", int, 2)),
        "special_tokens": special,
    }
    return _vision(vlm), text, replace(text, width=width, mlp=mlp), more


def _read_pi(config: Table) -> tuple[VisionSizes, TextSizes, TextSizes, dict[str, Any]]:
    sizes = []
    for key, variant, default in (
        ("vlm_config", "paligemma_variant", "gemma_2b"),
        ("dit_config", "action_expert_variant", "gemma_300m"),
    ):
        given = config.table(key)
        given = given.table("text_config") if key == "vlm_config" else given
        name = config.get(variant, str, default)
        if not given.content and name not in _GEMMAS:
            raise RoveError(f"{config.where}: unknown {variant} {name!r}. {nearest(name, _GEMMAS)}")
        table = given if given.content else Table(_GEMMAS[name], f"{config.where}: {key}")
        sizes.append(_text(table, hidden_act=("gelu_pytorch_tanh", "gelu"), gemma=True))
    text, expert = sizes
    for name in ("layers", "heads", "kv_heads", "head_dim"):
        if getattr(text, name) != getattr(expert, name):
            raise RoveError(
                f"{config.where}: the VLM has {name} {getattr(text, name)}, the expert "
                f"{getattr(expert, name)}: they attend to each other layer by layer and need the same."
            )
    return _vision(config.table("vlm_config")), text, expert, {}


def _text(table: Table, *, hidden_act: tuple[str, ...], gemma: bool = False) -> TextSizes:
    table.refuse_others("hidden_act", *hidden_act)
    table.refuse_others("attention_bias", False)
    width, heads = table.need("hidden_size", WIDTH), table.need("num_attention_heads", WIDTH)
    sizes = TextSizes(
        width=width,
        mlp=table.need("intermediate_size", WIDTH),
        layers=table.need("num_hidden_layers", DEPTH),
        heads=heads,
        kv_heads=table.get("num_key_value_heads", WIDTH, heads),
        head_dim=table.get("head_dim", WIDTH, 256 if gemma else width // heads),
        vocab=table.get(
            "vocab_size", Annotated[int, Range("from 1 to 10,000,000", lambda x: 0 < x <= 10**7)], 1
        ),
        eps=table.get("rms_norm_eps", PositiveFloat, 1e-6 if gemma else 1e-5),
    )
    if sizes.heads % sizes.kv_heads or sizes.head_dim % 2:
        raise RoveError(
            f"{table.where}: {sizes.heads} heads of {sizes.head_dim} channels do not share {sizes.kv_heads} "
            "keys: the number of heads has to be a multiple, and channels come in pairs."
        )
    return sizes


def _vision(vlm: Table) -> VisionSizes:
    given = vlm.table("vision_config")
    table = given if given.content else Table(_SO400M, f"{vlm.where}: vision_config")
    table.refuse_others("hidden_act", "gelu_pytorch_tanh")
    table.refuse_others("layer_norm_eps", 1e-6)
    table.refuse_others("num_channels", 3)
    table.refuse_others("vision_use_head", False)
    return VisionSizes(
        width=table.need("hidden_size", WIDTH),
        mlp=table.need("intermediate_size", WIDTH),
        layers=table.need("num_hidden_layers", DEPTH),
        heads=table.need("num_attention_heads", WIDTH),
        patch=table.need("patch_size", WIDTH),
        image=table.get("image_size", WIDTH, 224),
    )
