"""docs/features.md: every claim that links a test links one that is there, and every own claim has a link."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
NO = "\N{EN DASH}"
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


def test_links_lead_somewhere() -> None:
    """A file; and in it the test that is named, or the heading."""
    links = LINK.findall(PAGE.read_text())
    assert len(links) > 70
    for target, name in links:
        file = PAGE.parent / target
        assert file.is_file(), f"{target} is not there"
        text = file.read_text()
        if file.suffix == ".py":
            assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{target} has no {name}"
        elif name:
            headings = [
                re.sub(r"[^\w -]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            ]
            assert name in [heading.replace(" ", "-") for heading in headings], f"{target} has no {name}"


def test_every_feature_is_shown() -> None:
    """Whatever our column says, but for a plain no, is a link to a test."""
    table = PAGE.read_text().partition("| | seallmd")[2].partition("\n\n")[0]
    cells = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in table.splitlines()[2:]}
    assert len(cells) > 35
    for feature, cell in cells.items():
        assert cell == NO or LINK.search(cell), f"{feature}: {cell} is shown by nothing"
