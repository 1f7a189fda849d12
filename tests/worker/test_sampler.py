"""The sampler against plain reference code, and its promise that a draw depends on (seed, position) alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from seallmd.core.messages import Sampling
from seallmd.worker import sampler
from seallmd.worker.sampler import Draw, sample, uniform

VOCABULARY = 3000  # more than the sampler sorts at first


def logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def draw(position: int = 4, **fields: object) -> Draw:
    return Draw(Sampling(**fields), list(range(position)), prompt=2)  # type: ignore[arg-type]


def test_greedy_takes_the_lowest_of_equals() -> None:
    """Ties must not depend on the kernel: the reference takes the first."""
    row = torch.zeros(1, VOCABULARY)
    row[0, [7, 40, 2000]] = 5.0
    assert sample(row, [draw(temperature=0.0)]).tolist() == [7]


def test_top_k_one_is_greedy() -> None:
    """The sampling path narrowed to one candidate ends at the greedy one."""
    rows = logits(16)
    draws = [draw(i, top_k=1, seed=i) for i in range(16)]
    assert torch.equal(sample(rows, draws), rows.argmax(-1))
    draws = [draw(i, top_p=0.0, seed=i) for i in range(16)]
    assert torch.equal(sample(rows, draws), rows.argmax(-1))
    draws = [draw(i, min_p=1.0, seed=i) for i in range(16)]
    assert torch.equal(sample(rows, draws), rows.argmax(-1))
    draws = [draw(i, temperature=1e-30, seed=i) for i in range(16)]
    assert torch.equal(sample(rows, draws), rows.argmax(-1))


def test_draw_does_not_depend_on_the_batch() -> None:
    """A request gets the same token alone, among others, and in another row."""
    kinds = [
        {"seed": 5},
        {"seed": 6, "top_p": 0.9},
        {"seed": 7, "top_p": 0.9999, "temperature": 3.0},
        {"seed": 8, "top_k": 50, "min_p": 0.01},
        {"seed": 9, "temperature": 0.0, "repetition_penalty": 1.3},
        {"seed": 10, "top_k": 2000, "top_p": 0.99, "frequency_penalty": 0.5},
    ]
    rows = logits(len(kinds))
    draws = [draw(3 + i, **kind) for i, kind in enumerate(kinds)]
    together = sample(rows, draws)
    assert together.tolist() == [int(sample(rows[i : i + 1], draws[i : i + 1])) for i in range(len(kinds))]
    assert sample(rows.flip(0), draws[::-1]).tolist() == together.tolist()[::-1]


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many logits at a time as fit into what a GPU has kept free; the tokens are the same."""
    rows, draws = logits(7), [draw(i, seed=i, top_p=0.9, temperature=float(i != 3)) for i in range(7)]
    together, whole, sizes = sample(rows, draws), sampler._draw, list[int]()

    def part(of: torch.Tensor, some: Sequence[Draw]) -> torch.Tensor:
        sizes.append(len(of))
        return whole(of, some)

    monkeypatch.setattr(sampler, "_draw", part)
    monkeypatch.setattr(sampler, "_DRAWN_AT_ONCE", 4 * VOCABULARY + 1)
    assert torch.equal(sample(rows, draws), together)
    assert sizes == [4, 2]


def test_uniform_depends_on_seed_and_position() -> None:
    """Equal arguments give equal numbers; neighbours look unrelated and fill [0, 1) evenly."""
    values = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert len(set(values)) == 4000
    counts = [sum(low <= v * 20 < low + 1 for v in values) for low in range(20)]
    assert sum((n - 200) ** 2 / 200 for n in counts) < 45  # chi-square, 19 degrees of freedom
    assert uniform(3, 4) == uniform(3, 4)
    assert 0 <= uniform(-1, 0) < 1


def test_distribution() -> None:
    """Frequencies over many seeds follow the softmax (chi-square over the likelier tokens)."""
    row = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, float("-inf")]])
    n = 4000
    drawn = sample(row.expand(n, -1), [draw(seed=seed) for seed in range(n)])
    expected = torch.softmax(row[0], -1) * n
    counts = torch.bincount(drawn, minlength=6).float()
    assert counts[5] == 0
    assert float(((counts - expected)[:5] ** 2 / expected[:5]).sum()) < 20  # 4 degrees of freedom


@pytest.mark.parametrize("seed", range(8))
def test_candidates_are_those_of_a_plain_reference(seed: int) -> None:
    """Top-k, top-p and min-p in this order leave the same candidates as straightforward code."""
    choose = random.Random(seed)
    settings = [
        Sampling(
            temperature=choose.choice([0.3, 1.0, 4.0]),
            top_k=choose.choice([0, 3, 40, 5000]),
            top_p=choose.choice([1.0, 0.3, 0.95, 0.9999]),
            min_p=choose.choice([0.0, 0.02]),
            seed=choose.randrange(1 << 40),
        )
        for _ in range(12)
    ]
    rows = logits(12, seed)
    draws = [Draw(s, [1] * (i + 1), 1) for i, s in enumerate(settings)]
    assert sample(rows, draws).tolist() == [plain(row, d) for row, d in zip(rows, draws, strict=True)]


def plain(row: torch.Tensor, wanted: Draw) -> int:
    """One row, sorted in full, step by step."""
    s = wanted.sampling
    order = torch.sort(row / s.temperature, descending=True, stable=True)
    values, ids = order.values, order.indices
    if s.top_k:
        values = values[: s.top_k]
    p = torch.softmax(values.double(), -1)
    p = p[(p.cumsum(-1) - p) < s.top_p]
    p = p[p >= s.min_p * p[0]]
    kept = sorted(zip(ids[: len(p)].tolist(), p.tolist(), strict=True))
    target, below = uniform(s.seed, len(wanted.tokens)) * sum(w for _, w in kept), 0.0
    for token, weight in kept:
        below += weight
        if below > target:
            return token
    raise AssertionError("unreachable")


def test_penalties_bias_and_bans_against_reference() -> None:
    """Each adjustment, for each row, as one line of plain code; other rows stay as they are."""
    rows = logits(5)
    tokens = [3, 9, 9, 4, 4, 4, 7]
    bias = ((9, 2.5), (11, -30.0), (VOCABULARY + 5, 9.0))
    kinds = [
        Sampling(temperature=0.0, repetition_penalty=1.7),
        Sampling(temperature=0.0, presence_penalty=0.5, frequency_penalty=1.25),
        Sampling(temperature=0.0, logit_bias=bias),
        Sampling(temperature=0.0, min_tokens=6, banned=(int(rows[3].argmax()), 5)),
        Sampling(temperature=0.0),
    ]
    import seallmd.worker.sampler as sampler

    before = rows.clone()
    adjusted = sampler._adjust(rows, [Draw(s, tokens, 2) for s in kinds])
    assert torch.equal(rows, before)
    expected = before.clone()
    for token in set(tokens):
        value = expected[0, token]
        expected[0, token] = value / 1.7 if value > 0 else value * 1.7
    for token in set(tokens[2:]):
        expected[1, token] -= 0.5 + 1.25 * tokens[2:].count(token)
    expected[2, 9] += 2.5
    expected[2, 11] -= 30.0
    expected[3, list(kinds[3].banned)] = float("-inf")
    torch.testing.assert_close(adjusted, expected)


def test_min_tokens_ends() -> None:
    """Ids are banned for exactly min_tokens tokens of output."""
    row = torch.zeros(1, 10)
    row[0, 3] = 9.0
    banned = Sampling(temperature=0.0, min_tokens=2, banned=(3,))
    got = [int(sample(row, [Draw(banned, [1] * n, 4)])) for n in (4, 5, 6)]
    assert got == [0, 0, 3]


def test_logit_bias_forces_and_forbids() -> None:
    """+100 makes an id certain, -100 impossible, also when drawing."""
    rows = logits(1).expand(50, -1)
    likely = int(rows[0].argmax())
    draws = [draw(seed=i, logit_bias=((17, 100.0),)) for i in range(50)]
    assert set(sample(rows, draws).tolist()) == {17}
    draws = [draw(seed=i, temperature=0.2, logit_bias=((likely, -100.0),)) for i in range(50)]
    assert likely not in sample(rows, draws).tolist()


def test_hopeless_rows_still_give_a_token() -> None:
    """Everything banned, or NaN from a broken model: some id of the vocabulary, and no error."""
    row = torch.tensor([[1.0, 5.0, 2.0]])
    everything = {"min_tokens": 100, "banned": (0, 1, 2)}
    for temperature in (0.0, 1.0):
        assert sample(row, [draw(temperature=temperature, **everything)]).tolist() == [1]
        broken = torch.full((1, 3), float("nan"))
        assert int(sample(broken, [draw(temperature=temperature, top_k=2, top_p=0.5)])) in range(3)
