"""The token ids of real tokenizers, where ROVE_TOKENIZERS names a folder that holds smolvla and paligemma."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tests.golden.test_flow_files import GOLDEN, STYLES

from rove.policies.flow import prompts

ROOT = Path(os.environ.get("ROVE_TOKENIZERS", "/nowhere"))


@pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}; ROVE_GOLDEN says where they are"
)
@pytest.mark.parametrize("policy", STYLES)
def test_token_ids_are_those_of_the_reference(policy: str) -> None:
    folder = ROOT / ("smolvla" if policy == "smolvla" else "paligemma")
    if not (folder / "tokenizer.json").exists():
        pytest.skip("no tokenizer at hand; ROVE_TOKENIZERS says where they are")
    tokenizer = prompts.read_tokenizer(folder, 257152)
    assert tokenizer is not None
    style, length = STYLES[policy], 200 if policy == "pi05" else 48
    encoder = prompts.Prompts(
        tokenizer, style=style, length=length, bos=None if policy == "smolvla" else 2, pad=0
    )
    cases = json.loads((GOLDEN / "prompts.json").read_text())
    for case in (case for case in cases if case["policy"] == policy):
        state = torch.tensor([case["state_normalized"]]) if "state_normalized" in case else None
        ids, mask = encoder([case["task"]], state)
        assert ids[0].tolist() == case["ids"] and mask.all()
