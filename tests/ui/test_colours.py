"""Colours of services are apart for everybody, in both schemes, and stand out from the cards they are on."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

# Linear RGB as people see it who lack one kind of cones: Machado, Oliveira and Fernandes 2009, severity 1.
SIGHT = {
    "all cones": np.eye(3),
    "no long": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no medium": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no short": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Ottosson 2020: linear RGB to OKLab, where distances are those that people see.
CONES = np.array(
    [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
)
OKLAB = np.array(
    [
        [0.2104543, 0.7936178, -0.0040720],
        [1.9779985, -2.4285922, 0.4505937],
        [0.0259040, 0.7827718, -0.8086758],
    ]
)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def palette(scheme: str) -> dict[str, np.ndarray]:
    """The colours of a scheme in linear RGB."""
    light, dark = (
        (files("seallmd.ui") / "style.css").read_text().split("@media (prefers-color-scheme: dark)", 1)
    )
    pairs = re.findall(r"--(s\d|card): #([0-9a-f]{6})", light if scheme == "light" else dark)
    codes = {name: np.array(list(bytes.fromhex(code))) / 255 for name, code in pairs}
    return {
        name: np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for name, v in codes.items()
    }


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_apart(scheme: str, sight: str) -> None:
    """0.02 is just noticeable side by side; across a page it takes several times that."""
    colours = palette(scheme)
    seen = [
        OKLAB @ np.cbrt(CONES @ np.clip(SIGHT[sight] @ colours[f"s{index}"], 0, 1)) for index in range(10)
    ]
    distances = [float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)]
    assert min(distances) > 0.06
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen[:5], 2)) > 0.1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """WCAG 2.1 asks for 3 to 1 of what is no text (1.4.11)."""
    colours = palette(scheme)
    card = float(LUMINANCE @ colours.pop("card"))
    for colour in colours.values():
        own = float(LUMINANCE @ colour)
        assert (max(own, card) + 0.05) / (min(own, card) + 0.05) >= 3
