"""From logits to tokens, for all sampling rows of a step at once.

Owns the order of the adjustments and the draw: penalties, bias, bans, what is allowed and grammars' masks,
then temperature, top-k, top-p, min-p, then one uniform number per row through the inverse of the cumulative
distribution. What a row draws depends on its own logits, settings and (seed, position) alone. Must not know
requests or the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from seallmd.core.messages import Sampling
from seallmd.worker.transfer import to_device

_MASK64 = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-6
# Logits that are drawn from together: to sort them and sum them up takes 36 bytes for each and more, of the
# 2 GiB that a GPU keeps free by default.
_DRAWN_AT_ONCE = 1 << 24
# How many of a row's likeliest tokens are sorted before the whole vocabulary is.
_SORT_FIRST = 1024


class Draw(NamedTuple):
    """One row. tokens: prompt and output so far; prompt: how many of them are prompt."""

    sampling: Sampling
    tokens: Sequence[int]
    prompt: int


def row_argmax(x: torch.Tensor) -> torch.Tensor:
    """Where each row is largest."""
    return x.argmax(-1)


def sample(
    logits: torch.Tensor,
    draws: Sequence[Draw],
    masks: Mapping[int, torch.Tensor] = MappingProxyType({}),
    argmax: Callable[[torch.Tensor], torch.Tensor] = row_argmax,
) -> torch.Tensor:
    """The next token of each row. logits: [rows, vocabulary], any float dtype. Returns int64 [rows].

    masks: by row, which ids its grammar allows (bool); longer or shorter than the vocabulary is fine.
    argmax: of each row of float32.

    Temperature 0 is the lowest of the ids with the largest adjusted logit.
    """
    raw = logits.float()
    adjusted = _masked(_adjust(raw, draws), raw, masks)
    greedy = argmax(adjusted)
    if adjusted is not raw:  # everything banned: the model's own choice rather than none
        greedy = torch.where(adjusted.amax(-1).isneginf(), raw.argmax(-1), greedy)
    drawing = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if not drawing:
        return greedy
    step = max(1, _DRAWN_AT_ONCE // logits.shape[1])
    for at in range(0, len(drawing), step):
        part = drawing[at : at + step]
        rows = to_device(part, logits.device)
        mine = adjusted[rows]
        picked = _draw(mine, [draws[row] for row in part])
        greedy[rows] = torch.where(mine.amax(-1).isneginf(), greedy[rows], picked)
    return greedy


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone.

    splitmix64 (Steele, Lea, Flood 2014) as a counter-based generator: the seed is mixed first, so that near
    seeds give unrelated streams.
    """
    value = _mix((_mix(seed & _MASK64) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64)
    return (value >> 16) / (1 << 48)  # 48 bits: times a float64 total it stays below that total


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


# -------------------------------------------------------------------------------- adjustments of logits


class _Entries:
    """Some (row, id) entries of the logits with the values to apply there."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ids: list[int] = []
        self.values: list[float] = []

    def add(self, row: int, ids: Sequence[int], values: Sequence[float]) -> None:
        self.rows += [row] * len(ids)
        self.ids += ids
        self.values += values

    def on(self, logits: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Index into `logits`, and the values; ids outside the vocabulary are left out."""
        index = to_device([self.rows, self.ids], logits.device)
        values = to_device(self.values, logits.device, logits.dtype)
        known = (index[1] >= 0) & (index[1] < logits.shape[1])
        rows, ids = index[:, known]
        return (rows, ids), values[known]


def _adjust(raw: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Penalties, bias and bans, touching only the entries they name; `raw` itself when there are none."""
    repeated, subtracted, banned = _Entries(), _Entries(), _Entries()
    for row, (sampling, tokens, prompt) in enumerate(draws):
        if sampling.repetition_penalty != 1.0:
            seen = list(set(tokens))
            repeated.add(row, seen, [sampling.repetition_penalty] * len(seen))
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = _counts(tokens[prompt:])
            penalties = [sampling.presence_penalty + n * sampling.frequency_penalty for n in counts.values()]
            subtracted.add(row, list(counts), penalties)
        for token, bias in sampling.logit_bias:
            subtracted.add(row, [token], [-bias])
        if sampling.banned and len(tokens) - prompt < sampling.min_tokens:
            banned.add(row, sampling.banned, [0.0] * len(sampling.banned))
        if sampling.bad_words:
            last = _last_of_bad_words(sampling.bad_words, tokens[prompt:])
            banned.add(row, last, [0.0] * len(last))
    limited = [row for row, draw in enumerate(draws) if draw.sampling.allowed]
    if not (repeated.rows or subtracted.rows or banned.rows or limited):
        return raw
    logits = raw.clone()
    if repeated.rows:  # as in transformers: a negative logit moves down too
        index, penalty = repeated.on(logits)
        old = logits[index]
        logits[index] = torch.where(old > 0, old / penalty, old * penalty)
    if subtracted.rows:
        index, penalty = subtracted.on(logits)
        logits.index_put_(index, -penalty, accumulate=True)
    if banned.rows:
        index, _ = banned.on(logits)
        logits[index] = float("-inf")
    for row in limited:
        allowed = to_device(draws[row].sampling.allowed, logits.device)
        kept = logits[row, allowed]
        logits[row] = float("-inf")
        logits[row, allowed] = kept
    return logits


def _masked(adjusted: torch.Tensor, raw: torch.Tensor, masks: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """What the grammars leave. Where that and the bans leave nothing, the bans do not count."""
    if not masks:
        return adjusted
    logits = adjusted.clone() if adjusted is raw else adjusted
    vocabulary = logits.shape[1]
    for row, mask in masks.items():
        forbidden = ~mask[:vocabulary].to(logits.device)
        _forbid(logits[row], forbidden)
        if bool(logits[row].amax().isneginf()):
            logits[row] = raw[row]
            _forbid(logits[row], forbidden)
    return logits


def _forbid(row: torch.Tensor, forbidden: torch.Tensor) -> None:
    """Ids behind the end of `forbidden` are forbidden too."""
    row[: len(forbidden)].masked_fill_(forbidden, float("-inf"))
    row[len(forbidden) :] = float("-inf")


def _last_of_bad_words(words: Sequence[tuple[int, ...]], output: Sequence[int]) -> list[int]:
    """The ids that would complete one of the words now."""
    return [word[-1] for word in words if len(word) == 1 or tuple(output[-(len(word) - 1) :]) == word[:-1]]


def _counts(tokens: Sequence[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    return counts


# ------------------------------------------------------------------------------------------- the draw


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    device = logits.device
    settings = [draw.sampling for draw in draws]
    # The maximum goes first and the temperature has a floor: dividing must give neither inf - inf nor 0 / 0.
    heat = to_device([max(s.temperature, _LEAST_TEMPERATURE) for s in settings], device)
    scaled = (logits - logits.amax(-1, keepdim=True)) / heat[:, None]
    scaled = _keep_top_k(scaled, settings)
    weights = torch.exp(scaled)  # the likeliest token weighs 1
    weights = _keep_top_p(weights, settings)
    if any(s.min_p > 0 for s in settings):
        least = to_device([s.min_p for s in settings], device, weights.dtype)
        weights = weights.masked_fill(weights < least[:, None], 0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    uniforms = [uniform(d.sampling.seed, len(d.tokens)) for d in draws]
    target = to_device(uniforms, device, torch.float64) * cumulative[:, -1]
    # right: the first entry strictly above the target, which is never one of weight 0
    picked = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return picked.clamp_(max=logits.shape[1] - 1)  # a row of NaN ends up behind the last id


def _keep_top_k(scaled: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """-inf below the k-th largest of each row; equals of the k-th stay, as in transformers."""
    vocabulary = scaled.shape[1]
    wanted = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in settings]
    limited = [row for row, k in enumerate(wanted) if k < vocabulary]
    if not limited:
        return scaled
    rows = to_device(limited, scaled.device)
    k = to_device([wanted[row] for row in limited], scaled.device)
    largest = torch.topk(scaled[rows], max(wanted[row] for row in limited), dim=-1).values
    least = torch.full_like(scaled[:, :1], float("-inf"))
    least[rows] = largest.gather(1, (k - 1)[:, None])
    return scaled.masked_fill(scaled < least, float("-inf"))


def _keep_top_p(weights: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """0 outside the smallest set of likeliest tokens whose probability reaches p; equals of its last stay."""
    limited = [row for row, s in enumerate(settings) if s.top_p < 1]
    if not limited:
        return weights
    least = torch.zeros_like(weights[:, :1])
    vocabulary = weights.shape[1]
    # On a GPU sorting is quick, and asking it whether a first part was enough is not.
    first = min(_SORT_FIRST, vocabulary) if weights.device.type == "cpu" else vocabulary
    for size in (first, vocabulary):
        rows = to_device(limited, weights.device)
        share = to_device([settings[row].top_p for row in limited], weights.device, torch.float64)
        wanted = share[:, None] * weights[rows].sum(-1, keepdim=True, dtype=torch.float64)
        largest = torch.topk(weights[rows], size, dim=-1).values
        reached = largest.cumsum(-1, dtype=torch.float64) - largest < wanted  # before adding this one
        last = (reached.sum(-1, keepdim=True) - 1).clamp_(min=0)
        least[rows] = largest.gather(1, last)
        if size == vocabulary:
            break
        # A row all of whose sorted tokens are wanted may want more of them: sort all of its vocabulary.
        more = reached.all(-1).tolist()
        limited = [row for row, unsure in zip(limited, more, strict=True) if unsure]
        if not limited:
            break
    return weights.masked_fill(weights < least, 0)
