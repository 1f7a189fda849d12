"""Tensor parallelism: what each of several ranks holds of a model, and where its layers talk to each other.

Owns the reading of transformers' public `tp_plan`: from the name of a style to the part of a weight and to
the collective behind (or before) a module. The scheme is Megatron-LM's (Shoeybi et al. 2019, section 3): a
layer that is split by columns feeds one that is split by rows, and one sum over the ranks ends the pair.
Plain tensors and stock modules: a rank's tree is the model's own, with smaller weights and a few hooks.
Must not know process groups, images or arenas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

MAX_RANKS = 8

# Split by rows of the weight matrix (columns of its transpose, hence the name), by columns, and not at all.
_COLWISE = {"colwise", "colwise_gather_output", "colwise_rep", "packed_colwise"}
_ROWWISE = {"rowwise", "rowwise_split_input", "rowwise_rep", "packed_rowwise"}
_WHOLE = {
    "replicate",
    "replicated_with_grad_allreduce",  # these two differ from `replicate` in training alone
    "mla_kv_a_proj",
    "local_params",  # has to do with DTensors, which are not used here
    "moe_tp_experts",
    "all_reduce",
    "moe_identity_expert",
}
_STYLES = _COLWISE | _ROWWISE | _WHOLE | {"embedding_rowwise"}
# Input and output of these are the same on all ranks: where one cannot be divided, it can stay whole.
_OPTIONAL = {
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "embedding_rowwise",
}
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Indivisible(Exception):
    """The model cannot be split over so many ranks, and why (one line)."""


class Cut(NamedTuple):
    """A rank's part of a weight: `ranges` (start, length) along `dim`, one behind the other.

    blank: zeros instead. A bias behind a sum over the ranks counts once: it lies on rank 0 alone.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]
    blank: bool = False

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part; a view where it is one range. Works on meta."""
        if self.blank:
            return torch.zeros_like(whole)
        parts = [whole.narrow(self.dim, start, length) for start, length in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


@dataclass(frozen=True)
class Division:
    """cuts: by weight name; what is missing is whole on every rank. styles: by the module they act on."""

    rank: int
    ranks: int
    cuts: dict[str, Cut]
    styles: dict[str, str]


class Peers(Protocol):
    """The collectives that a model's layers need. All ranks call them in the same order."""

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, on every rank; may be written to `part`."""

    def concatenate(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors side by side along the last dimension, in rank order, on every rank."""


class Seat:
    """A rank's place in its group. `peers` come and go with process groups; the tree stays.

    While nobody is there (`peers` is None) a sum is the rank's own part and a concatenation repeats it: the
    shapes are right and the values are not, which is enough to see what the layers store.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.peers: Peers | None = None

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """As `Peers.sum`."""
        return part if self.peers is None else self.peers.sum(part)

    def concatenate(self, part: torch.Tensor) -> torch.Tensor:
        """As `Peers.concatenate`."""
        if self.peers is None:
            return torch.cat([part] * self.ranks, -1)
        return self.peers.concatenate(part)


# ------------------------------------------------------------------------------------- who holds what


def divide(model: PreTrainedModel, rank: int, ranks: int) -> Division:
    """What rank `rank` of `ranks` holds of `model`, a whole one. Raises Indivisible with the reason.

    Whether the model's code runs with such parts is for the caller to try (`sit`, then a forward pass).
    """
    rules = _rules(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    styles, cuts = {}, {}
    for owner, style in _matches(rules, [*modules, *parameters]):
        try:
            found = dict(_cuts(owner, style, modules, parameters, rank, ranks))
        except Indivisible:
            if style not in _OPTIONAL:
                raise
            continue
        if owner in modules:
            styles[owner] = style
        cuts.update(found)
    _reconcile_ties(parameters, cuts, styles)
    if not any(_NUMBER.search(name) for name in cuts):
        raise Indivisible("its tensor-parallel plan divides no layer")
    return Division(rank, ranks, cuts, styles)


def _rules(model: PreTrainedModel) -> dict[str, str]:
    rules: dict[str, str] = model.tp_plan or {}
    if not rules:
        raise Indivisible("it has no tensor-parallel plan in transformers")
    if unknown := set(rules.values()) - _STYLES:
        raise Indivisible(f"its tensor-parallel plan has the style {min(unknown)}, which is not supported")
    return rules


def _matches(rules: Mapping[str, str], names: list[str]) -> Iterator[tuple[str, str]]:
    """(module or parameter, style); a rule's `*` stands for the number of a layer."""
    for name in names:
        style = rules.get(_NUMBER.sub(".*", name))
        if style is not None:
            yield name, style


def _cuts(
    owner: str,
    style: str,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    rank: int,
    ranks: int,
) -> Iterator[tuple[str, Cut]]:
    """(weight name, cut) of a module's own parameters, or of the parameter that the rule names."""
    if style in _WHOLE:
        return
    if owner in parameters:
        if parameters[owner].ndim == 2:  # rows and columns are told apart for linear layers and experts only
            raise Indivisible(f"{owner} is a matrix outside a linear layer")
        yield owner, _cut(owner, parameters[owner], style, None, rank, ranks)
        return
    head = _head_size(owner, modules) if style == "colwise" else None
    for leaf, parameter in modules[owner]._parameters.items():
        if parameter is not None:
            yield f"{owner}.{leaf}", _cut(f"{owner}.{leaf}", parameter, style, head, rank, ranks)


def _cut(name: str, whole: torch.Tensor, style: str, head: int | None, rank: int, ranks: int) -> Cut:
    if style in _ROWWISE and name.endswith("bias"):
        return Cut(0, ((0, whole.shape[0]),), blank=rank > 0)
    if style in _ROWWISE:
        dim = whole.ndim - 1
    else:
        dim = 0 if style == "embedding_rowwise" else max(whole.ndim - 2, 0)
    size = whole.shape[dim]
    if head is not None:
        return Cut(dim, (_heads(name, size, head, rank, ranks),))
    packed = 2 if style.startswith("packed") else 1  # gate and up, one behind the other
    if size % (packed * ranks):
        raise Indivisible(f"{name} has {size // packed} rows or columns")
    each, length = size // packed, size // packed // ranks
    return Cut(dim, tuple((each * i + length * rank, length) for i in range(packed)))


def _head_size(owner: str, modules: Mapping[str, nn.Module]) -> int | None:
    """Elements of a head, where `owner` projects to heads and its attention module says."""
    path, _, leaf = owner.rpartition(".")
    if leaf not in ("q_proj", "k_proj", "v_proj"):
        return None
    size = getattr(modules[path], "head_dim", None)
    if leaf == "v_proj":
        size = getattr(modules[path], "v_head_dim", None) or size
    return size if isinstance(size, int) else None


def _heads(name: str, size: int, head: int, rank: int, ranks: int) -> tuple[int, int]:
    """A rank's heads. A KV head is shared by neighbouring query heads, so where there are fewer of them
    than ranks, neighbouring ranks hold the same one."""
    heads, rest = divmod(size, head)
    if rest == 0 and heads % ranks == 0:
        count = heads // ranks
        return rank * count * head, count * head
    if rest == 0 and heads and ranks % heads == 0 and re.search(r"\.[kv]_proj\.", name):
        return rank * heads // ranks * head, head
    raise Indivisible(f"{name} has {size / head:g} heads")


def _reconcile_ties(
    parameters: Mapping[str, nn.Parameter], cuts: dict[str, Cut], styles: dict[str, str]
) -> None:
    """A tied weight has one part for all its names; where the plan would have two, it stays whole."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len({cuts.get(name) for name in tied}) == 1:
            continue
        for name in tied:
            owner = name.rpartition(".")[0]
            if cuts.pop(name, None) is not None and styles.pop(owner, None) not in _OPTIONAL:
                raise Indivisible(f"{name} is tied to a weight that is divided otherwise")


# ------------------------------------------------------------------------------------- a rank's tree


def sit(model: PreTrainedModel, division: Division) -> Seat:
    """Make a whole model the tree of one rank: smaller weights, and the collectives that the styles need.

    Weights may be on meta. The shapes of parts are the same on every rank, and so is the layout of the tree.
    """
    smaller: dict[int, nn.Parameter] = {}
    for name, cut in division.cuts.items():
        path, _, leaf = name.rpartition(".")
        weights = model.get_submodule(path)._parameters
        whole = weights[leaf]
        if id(whole) not in smaller:
            smaller[id(whole)] = nn.Parameter(cut.of(whole).contiguous(), requires_grad=False)
        weights[leaf] = smaller[id(whole)]
    seat = Seat(division.rank, division.ranks)
    for path, style in division.styles.items():
        _connect(model.get_submodule(path), style, seat)
    return seat


def _connect(module: nn.Module, style: str, seat: Seat) -> None:
    """Hooks rather than forwards: whatever computes the module's output, they see it."""
    if style in ("rowwise_split_input", "rowwise_rep"):
        module.register_forward_pre_hook(lambda _, given: (_own_part(given[0], seat), *given[1:]))
    if style in ("moe_tp_experts", "all_reduce") or style in _ROWWISE:
        module.register_forward_hook(lambda _, __, out: seat.sum(out))
    elif style in ("colwise_gather_output", "colwise_rep"):
        module.register_forward_hook(lambda _, __, out: seat.concatenate(out))
    elif style == "moe_identity_expert":  # what every rank adds whole is summed with the others' parts
        module.register_forward_pre_hook(lambda _, given: (given[0] / seat.ranks, *given[1:]))
    elif style == "embedding_rowwise":
        part = _VocabularyPart(module, seat)
        module.register_forward_pre_hook(part.before)
        module.register_forward_hook(part.after)


def _own_part(x: torch.Tensor, seat: Seat) -> torch.Tensor:
    length = x.shape[-1] // seat.ranks
    return x.narrow(-1, seat.rank * length, length)


class _VocabularyPart:
    """An embedding of which a rank holds some rows: it gives zeros for ids of other ranks, then all sum."""

    def __init__(self, module: nn.Module, seat: Seat) -> None:
        self._seat = seat
        self._rows = module._parameters["weight"].shape[0]  # before it is quantised
        self._here: torch.Tensor | None = None
        module.padding_idx = None  # of use in training alone, and perhaps outside the smaller table

    def before(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Ids -> rows of the part."""
        ids = given[0] - self._seat.rank * self._rows
        self._here = here = (ids >= 0) & (ids < self._rows)
        return (ids.where(here, 0), *given[1:])

    def after(self, _: nn.Module, __: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """[..., dim] of this part -> of all."""
        assert self._here is not None, "an embedding's hooks run in turn"
        return self._seat.sum(out * self._here[..., None])
