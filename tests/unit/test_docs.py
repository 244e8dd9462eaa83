"""The pages say what is so: what they quote from a file stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUOTED = re.compile(r"```python\n# (\S+\.py)\n(.*?)```", re.DOTALL)
"""A block of code whose first line names the file that it is from."""
QUOTATIONS = [
    pytest.param(file, code, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, (file, code) in enumerate(QUOTED.findall(page.read_text()))
]


@pytest.mark.parametrize(("file", "code"), QUOTATIONS)
def test_quoted_code_is_in_the_file(file, code):
    assert code in (ROOT / file).read_text()


def test_there_are_quotations():
    assert len(QUOTATIONS) >= 3
