"""Decoding of a chunk of tokens from the language model: in parallel, or one by one.

    BOS | patches of every picture | points and state, if read | prompt | suffix

The suffix is the chunk's own tokens (autoregressive) or placeholders with zeroed embeddings (parallel;
OpenVLA-OFT, Kim et al. 2025, section 4). The token at place j is read one position before its own, the
first one at the last prompt token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rove.policies.openvla.config import BINS
from rove.policies.openvla.language import Attention, first_come, make_cache
from rove.policies.openvla.vlm import Prefix, PrismaticVLM

Decoding = Literal["autoregressive", "parallel"]


def prompt_state(vlm: PrismaticVLM, prefix: Prefix, attention: Attention) -> Tensor:
    """Compute the hidden state [B, 1, D] at the last prompt token, with nothing after it."""
    return vlm.hidden(prefix.embeddings, prefix.valid, outputs=1, attention=attention)


def parallel(vlm: PrismaticVLM, prefix: Prefix, count: int, attention: Attention, stop: int) -> Tensor:
    """Compute the hidden states [B, count, D] that predict `count` tokens, in one pass; `stop` is EOS."""
    before = prefix.embeddings
    # Under causal attention nothing is read at or after the last placeholder.
    read = count - (attention == "causal")
    if vlm.placeholders is None:
        suffix = before.new_zeros(len(before), read, before.shape[2])
    else:
        suffix = vlm.placeholders[:read].expand(len(before), -1, -1)
    if attention == "bidirectional":
        end = vlm.language_model.embed_tokens(torch.full((len(before), 1), stop, device=before.device))
        suffix = torch.cat((suffix, end), dim=1)
    return after_prompt(vlm, prefix, suffix, attention)[:, :count]


def teacher_forced(vlm: PrismaticVLM, prefix: Prefix, tokens: Tensor) -> Tensor:
    """Compute hidden states [B, N, D] that predict each of `tokens` [B, N] from those before it."""
    suffix = vlm.language_model.embed_tokens(tokens[:, :-1])
    return after_prompt(vlm, prefix, suffix, "causal")


def after_prompt(vlm: PrismaticVLM, prefix: Prefix, suffix: Tensor, attention: Attention) -> Tensor:
    """Compute hidden states from the last prompt token to the end of the suffix."""
    extra, valid = suffix.shape[1], prefix.valid
    if valid is not None:
        valid = torch.cat((valid, valid.new_ones(len(valid), extra)), dim=1)
    embeddings = torch.cat((prefix.embeddings, suffix), dim=1)
    return vlm.hidden(embeddings, valid, outputs=extra + 1, attention=attention)


def one_by_one(
    vlm: PrismaticVLM, prefix: Prefix, count: int, temperature: float, uniform: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode `count` tokens with a key-value cache, sampling where `uniform` [B, count] is given.

    Returns columns [B, count], logits [B, count, 256] at temperature 1, and hidden states [B, count, D].
    """
    batch, length = prefix.embeddings.shape[:2]
    device, capacity = prefix.embeddings.device, length + count - 1
    cache = make_cache(vlm.language_model, batch, capacity, prefix.embeddings)
    before = prefix.valid
    if before is None:
        before = torch.ones(batch, length, dtype=torch.bool, device=device)
    valid, start = first_come(before, capacity), before.sum(1, keepdim=True)
    slots = torch.arange(capacity, device=device)
    hidden = vlm.hidden(prefix.embeddings, prefix.valid, outputs=1, attention="causal", cache=cache)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for j in range(count):
        if j:
            valid[:, length + j - 1] = True
            embedding = vlm.language_model.embed_tokens(steps[-1][0] + vlm.vocab_size - BINS)
            hidden = vlm.language_model.step(
                embedding, cache, slots[length + j - 1 :][:1], start + j - 1, valid
            )
        logits = vlm.action_logits(hidden)
        column = choose(logits, temperature, None if uniform is None else uniform[:, j, None, None])[..., 0]
        steps.append((column, logits, hidden))
    columns, logits, hidden = (torch.cat(part, dim=1) for part in zip(*steps, strict=True))
    return columns, logits, hidden


def choose(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """Choose columns [B, N, G] from logits [B, N, 256]: the largest (G = 1), or by inverse CDF from `uniform`
    [B, N, G]."""
    if uniform is None:
        return logits.argmax(dim=-1, keepdim=True)
    cdf = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    # Rounding leaves the last entry beside 1; scaling by it keeps every draw inside.
    threshold = (uniform.to(cdf.dtype) * cdf[..., -1:]).contiguous()
    return torch.searchsorted(cdf, threshold, right=True).clamp_max(BINS - 1)
