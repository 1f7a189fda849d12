"""docs/configuration.md is what the types say, and says something of every field."""

from __future__ import annotations

import msgspec

from seallmd.config import Config
from tools.config_reference import PAGE, _meanings, _struct_of, page


def test_the_page_is_up_to_date() -> None:
    """Else: python tools/config_reference.py"""
    assert PAGE.read_text(encoding="utf-8") == page(), "run tools/config_reference.py"


def test_every_field_has_a_meaning() -> None:
    """A knob that nobody explains is no knob."""
    structs = [_struct_of(field.type) for field in msgspec.structs.fields(Config)]
    for struct in [s for s in structs if s is not None]:
        silent = set(struct.__struct_fields__) - dict(_meanings(struct)).keys()
        assert not silent, f"{struct.__name__} does not say what these mean: {sorted(silent)}"
