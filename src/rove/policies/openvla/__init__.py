"""The OpenVLA family: one Prismatic vision-language-action model, decoded as OpenVLA or OpenVLA-OFT."""

from rove.policies.openvla.model import OpenVLA

__all__ = ["OpenVLA"]
