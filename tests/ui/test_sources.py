"""Promises that can be read off the page's sources."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

ASSETS = sorted(f.name for f in files("seallmd.ui").iterdir() if not f.name.startswith("__"))
ELSEWHERE = r"https?://(?!www\.w3\.org/2000/svg)"
MARKUP_FROM_TEXT = r"\b(?:inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
INLINE = r"\sstyle=|\son\w+=\"|<style|<script(?! type=\"module\" src)"


@pytest.mark.parametrize("name", ASSETS)
def test_sources(name: str) -> None:
    """Nothing from elsewhere, nothing inline, no markup made from text; lines as long as everywhere."""
    text = (files("seallmd.ui") / name).read_text()
    for barred in (ELSEWHERE, MARKUP_FROM_TEXT, INLINE):
        assert not re.findall(barred, text)
    assert max(map(len, text.splitlines())) <= 110
    assert len(text.splitlines()) < 500
