"""One Prismatic vision-language-action model, two decodings: OpenVLA and OpenVLA-OFT."""

from rove.policies.openvla.model import OpenVLA

__all__ = ["OpenVLA"]
