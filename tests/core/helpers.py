"""Builders for tests of the core: small models, small arenas, and a recorder of what a node does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from seallmd.core import events as ev
from seallmd.core.messages import Sampling
from seallmd.core.settings import (
    GroupSettings,
    NodeSettings,
    PolicySettings,
    ReplacementSettings,
    ServiceSettings,
)
from seallmd.core.shapes import LayerShape, ModelShape, Shard
from seallmd.core.tiers import Tier
from seallmd.sim.world import Costs, World, expected_output

BLOCK = 256
VOCAB = 50


def shape(
    token_bytes: int = 64,
    segments: tuple[int, ...] = (512, 256, 256),
    context: int = 64,
    layers: int = 1,
    ranks: tuple[int, ...] = (),
) -> ModelShape:
    """A model whose KV takes `token_bytes` per token (4 tokens per block by default).

    ranks: how it can be split by tensor parallelism; then it has as many KV heads as the most of these.
    """
    heads = max(ranks, default=1)
    dim = token_bytes // layers // heads // 8
    shards = tuple(
        Shard(n, (LayerShape(heads // n, dim, dim),) * layers, tuple(-(-size // n) for size in segments))
        for n in ranks
    )
    layer = LayerShape(heads, dim, dim)
    return ModelShape("tiny", "float32", 4, (layer,) * layers, segments, VOCAB, context, (), shards)


@dataclass
class Recorder:
    """Follows every request through a world and checks the node after each event."""

    world: World = field(init=False)
    prompts: dict[int, ev.Arrived] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, ev.Finish] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)
    scored: dict[int, int] = field(default_factory=dict)
    pooled: dict[int, int] = field(default_factory=dict)
    check_every_event: bool = True

    def observe(self, _event: ev.Event, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.Emit(request, tokens, cached):
                    assert request not in self.finished, "tokens after the end"
                    if request not in self.outputs:
                        self.cached[request] = cached
                    self.outputs.setdefault(request, []).extend(tokens)
                case ev.Scored(request, scores):
                    # In order, without a gap and none twice; drawn tokens' before the tokens.
                    assert request not in self.finished, "scores after the end"
                    assert scores.position == self.scored.get(request, 1), "scores lost or repeated"
                    self.scored[request] = scores.position + scores.tokens
                case ev.Embedded(request, pooled):
                    # The same; but of the last token alone, where no more is wanted.
                    assert request not in self.finished, "a vector after the end"
                    event = self.prompts[request]
                    first = 0 if event.sampling.pooling == "mean" else len(event.prompt) - 1
                    assert pooled.position == self.pooled.get(request, first), "parts lost or repeated"
                    self.pooled[request] = pooled.position + pooled.tokens
                case ev.Finish(request):
                    assert request not in self.finished, f"request {request} ended twice"
                    self.finished[request] = action
                case ev.Answer(ticket, error):
                    assert ticket not in self.answers, f"ticket {ticket} answered twice"
                    self.answers[ticket] = error
                case ev.Note(_, text):
                    self.notes.append(text)
        if self.check_every_event:
            self.world.node.check()

    def arrive(
        self,
        request: int,
        service: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        *,
        stop_ids: tuple[int, ...] = (),
        salt: str = "",
        leader: int = 0,
        scores: bool = False,
        tier: Tier = "default",
        pooling: Literal["", "mean", "last"] = "",
    ) -> None:
        top = 0 if scores else -1
        greedy = Sampling(temperature=0.0, logprobs=top, prompt_logprobs=top, pooling=pooling)
        event = ev.Arrived(request, service, prompt, max_tokens, greedy, stop_ids, salt, leader, tier)
        self.prompts[request] = event
        self.world.happen(event)

    def assert_output(self, request: int) -> None:
        """The request ended well, with exactly the tokens that the model draws after its prompt."""
        event, finish = self.prompts[request], self.finished[request]
        if event.sampling.pooling:
            assert finish.reason == "stop", finish
            assert self.pooled[request] == len(event.prompt), "the vector is not complete"
            assert request not in self.outputs
            return
        expected = expected_output(event.service, event.prompt, event.max_tokens, VOCAB)
        got = self.outputs[request]
        if event.sampling.logprobs >= 0:
            assert self.scored[request] == len(event.prompt) + len(got), "scores are missing"
        assert finish.reason in ("stop", "length"), finish
        if finish.reason == "stop":
            assert got[-1] in event.stop_ids
            assert not set(got[:-1]) & set(event.stop_ids)
            expected = expected[: len(got)]
        assert got == expected


def world(
    services: dict[str, ModelShape | str],
    arenas: tuple[int, ...] = (40,),
    *,
    pinned: tuple[str, ...] = (),
    preload: tuple[str, ...] = (),
    check_every_event: bool = True,
    context: int = 0,
    host_bytes: int = 1 << 30,
    host_kv: int = 0,
    kv_layout: Literal["merged", "split"] = "merged",
    tensor_parallel: dict[str, int] | None = None,
    groups: dict[str, tuple[tuple[int, ...], ...]] | None = None,
    replacement: ReplacementSettings | None = None,
    costs: Costs | None = None,
    sharing: tuple[GroupSettings, ...] = (),
    idle_seconds: dict[str, float] | None = None,
    importance: dict[str, float] | None = None,
    service_tokens: dict[str, int] | None = None,
    max_wait_seconds: dict[str, float] | None = None,
    absent: tuple[str, ...] = (),
    policy: str = "budget",
    **limits: object,
) -> Recorder:
    """A started world. arenas: blocks of each device. host_kv: blocks of host memory for KV of each. absent:
    services that are known, but not configured yet."""
    settings = NodeSettings(
        services=tuple(
            ServiceSettings(
                name=name,
                model=name,
                pinned=name in pinned,
                preload=name in preload,
                context=context,
                tensor_parallel=(tensor_parallel or {}).get(name, 0),
                devices=(groups or {}).get(name, ()),
                idle_seconds=(idle_seconds or {}).get(name, 0.0),
                importance=(importance or {}).get(name, 1.0),
                max_waiting_tokens=(service_tokens or {}).get(name, 0),
                max_wait_seconds=(max_wait_seconds or {}).get(name, 0.0),
            )
            for name in services
            if name not in absent
        ),
        groups=sharing,
        devices=len(arenas),
        block_bytes=BLOCK,
        host_bytes=host_bytes,
        host_kv_bytes=host_kv * BLOCK,
        kv_layout=kv_layout,
        replacement=replacement or ReplacementSettings(),
        policy=PolicySettings(scheduler=policy, **limits),  # type: ignore[arg-type]
    )
    recorder = Recorder(check_every_event=check_every_event)
    recorder.world = World(
        settings, services, tuple(n * BLOCK for n in arenas), costs or Costs(), observe=recorder.observe
    )
    recorder.world.start()
    recorder.world.run(until=10.0)
    return recorder
