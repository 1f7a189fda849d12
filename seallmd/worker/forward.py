"""One forward pass: from packed rows to the tokens they draw, on their way to the host.

Owns who answers the attention of a pass, whether it is replayed from a graph, and what is read from its
logits. Nothing here waits for the device where a step's rows do not ask for it: grammars, log-probabilities
and some samplers do. Must not know messages about residency, copies or blocks.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from seallmd.core.messages import Pooled, RowFailed, Scores
from seallmd.worker import grammar
from seallmd.worker.attention import Answerer, answered_by
from seallmd.worker.device import Arriving, Device
from seallmd.worker.graphs import Graphs
from seallmd.worker.group import ProcessGroup
from seallmd.worker.kv import KvView
from seallmd.worker.ops.kernels import Kernels
from seallmd.worker.ops.native import Native
from seallmd.worker.paged import PagedBatch
from seallmd.worker.pooling import pool
from seallmd.worker.requests import Packed
from seallmd.worker.sampler import row_argmax, sample
from seallmd.worker.scores import Head, score_drawn, score_prompts
from seallmd.worker.table_batch import TableBatch
from seallmd.worker.tables import tables_of
from seallmd.worker.transfer import to_device


class Runner(NamedTuple):
    """A resident model as a pass needs it. kernels: those that its attention agreed with."""

    model: PreTrainedModel
    kv: KvView
    kernels: Kernels | None = None
    graphs: Graphs | None = None
    group: ProcessGroup | None = None


class Outcome(NamedTuple):
    """What a pass has to tell; as in `messages.StepDone`. tokens: None where none are drawn, or not here."""

    tokens: Arriving | None = None
    scores: tuple[Scores, ...] = ()
    failed: tuple[RowFailed, ...] = ()
    pooled: tuple[Pooled, ...] = ()


def run(
    device: Device, native: Native | None, runner: Runner, packed: Packed, before: Arriving | None = None
) -> Outcome:
    """Run the packed rows. before: the tokens that `packed.fed` refers to."""
    with torch.inference_mode():
        fed = _Fed(packed, before, device.torch_device)
        logits, told = None, Outcome()
        if runner.graphs is not None and runner.group is None and not (packed.scoring or packed.pooling):
            logits = runner.graphs.run(
                packed, fed.put, lambda: _eager(device, native, runner, packed, fed)[0]
            )
        if logits is None:
            logits, told = _eager(device, native, runner, packed, fed)
        if not packed.sampling:
            if runner.group is not None:
                runner.group.finish()
            return told
        return _draw(device, native, runner.group, packed, logits, told)


class _Fed:
    """Tokens that the device has drawn and the host has not seen, into the rows that run them."""

    def __init__(self, packed: Packed, before: Arriving | None, device: torch.device) -> None:
        self._values: torch.Tensor | None = None
        if packed.fed:
            if before is None:
                raise RuntimeError("a row runs a token that nobody drew")
            at, source = to_device(packed.fed, device).unbind(1)
            self._rows, self._values = at, before.tensor[source]

    def put(self, ids: torch.Tensor) -> None:
        """ids: of every packed row, at least."""
        if self._values is not None:
            ids[self._rows] = self._values.to(ids.dtype)


def _eager(
    device: Device, native: Native | None, runner: Runner, packed: Packed, fed: _Fed
) -> tuple[torch.Tensor, Outcome]:
    """Logits of the sampling rows, and what is told of prompts."""
    where, model, kv = device.torch_device, runner.model, runner.kv
    answerer: Answerer
    if runner.kernels is not None:
        answerer = TableBatch(kv, tables_of(packed.spans, kv.page, where), runner.kernels)
    else:
        answerer = PagedBatch(kv, packed.spans, where, native)
        if native is None:  # the others read nothing that was not written
            kv.clear(packed.fresh)
    with answered_by(answerer):
        last = to_device(packed.last, where, torch.long)
        input_ids = to_device([packed.ids], where)
        fed.put(input_ids[0])
        head = Head(model, input_ids) if packed.scoring or packed.pooling else None
        with nullcontext() if head is None else head.watching():
            logits: torch.Tensor = model(
                input_ids=input_ids,
                position_ids=to_device([packed.positions], where),
                use_cache=False,
                logits_to_keep=last,
            ).logits[0]
        told = Outcome()
        if head is not None:
            scores = score_prompts(head, packed.scoring)
            told = Outcome(scores=tuple(scores), pooled=pool(head.hidden, packed.pooling))
    if packed.sampling and logits.shape[0] != len(packed.last):  # a family that computes all logits
        logits = logits[last]
    return logits, told


def _draw(
    device: Device,
    native: Native | None,
    group: ProcessGroup | None,
    packed: Packed,
    logits: torch.Tensor,
    told: Outcome,
) -> Outcome:
    scores = told.scores
    failed: tuple[RowFailed, ...] = ()
    if group is None or group.rank == 0:
        argmax = row_argmax if native is None else native.argmax
        draws, ids = packed.draws(), [request.id for request in packed.sampling]
        matchers = [request.matcher for request in packed.sampling]
        masks, failed = grammar.masks_of(draws, matchers, ids)
        tokens = sample(logits, draws, masks, argmax)
        scores += tuple(score_drawn(logits, tokens, draws, ids))
    else:
        tokens = torch.empty(len(packed.last), dtype=torch.long, device=device.torch_device)
    if group is not None:
        group.agree(tokens)
    return Outcome(device.fetch(tokens), scores, failed, told.pooled)
