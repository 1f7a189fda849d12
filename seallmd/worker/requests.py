"""What a worker knows of the requests whose rows it runs.

Owns tokens, block tables and positions per request, and checks that rows continue where the last one ended.
Must not know tensors or the arena's contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from seallmd.core.messages import Admit, Row, Sampling
from seallmd.worker.grammar import Matcher
from seallmd.worker.kv import Page, Span
from seallmd.worker.pooling import PoolPart
from seallmd.worker.sampler import Draw
from seallmd.worker.scores import PromptPart

# Stands for a token that the device has drawn and the host has not seen; the last of a request at most.
PENDING = -1


@dataclass(slots=True)
class Request:
    """tokens: prompt and output. run: tokens whose KV is in the arena, None before the first row.

    drawn: which of the tokens drawn by the last step is the pending one.

    told: as in `messages.Admit`. matcher: follows the output in its grammar, where it has one.
    """

    id: int
    service: str
    tokens: list[int]
    prompt: int
    sampling: Sampling
    told: int = 1
    matcher: Matcher | None = None
    run: int | None = None
    drawn: int = 0
    table: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Packed:
    """The rows of one step, packed. last: packed index of each sampling row's last token.

    rows: those that are run, the same in number as `spans`. scoring: prompt tokens that need scores. pooling:
    tokens whose hidden states are pooled. fed: packed rows whose ids are pending, each with its number among
    the tokens drawn by the step before. places: among its request's tokens, of each token drawn by this step
    (see `Requests.advance`).
    """

    rows: list[Row] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # blocks that hold no KV yet
    sampling: list[Request] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    scoring: list[PromptPart] = field(default_factory=list)
    fed: list[tuple[int, int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    pooling: list[PoolPart] = field(default_factory=list)

    def draws(self) -> list[Draw]:
        """The sampler's view of the sampling rows."""
        return [Draw(request.sampling, request.tokens, request.prompt) for request in self.sampling]


class Requests:
    """All requests of a worker, by id. Methods raise RuntimeError where a message contradicts what is known.

    A request whose step failed is dropped; until it is forgotten or admitted anew its rows are skipped,
    since the daemon may have sent some before it knew.
    """

    def __init__(self) -> None:
        self._known: dict[int, Request] = {}
        self._failed: set[int] = set()

    def constrain(self, request: int, matcher: Matcher) -> None:
        """A request that was just admitted has a grammar."""
        self._known[request].matcher = matcher

    def admit(self, service: str, admits: Iterable[Admit], vocabulary: int) -> None:
        """Start requests, or start them over. vocabulary: ids from there on have no embedding."""
        for admit in admits:
            if max(admit.tokens, default=0) >= vocabulary or min(admit.tokens, default=0) < 0:
                raise RuntimeError(f"request {admit.request} has token ids outside the vocabulary")
            self._failed.discard(admit.request)
            self._known[admit.request] = Request(
                admit.request, service, list(admit.tokens), admit.prompt, admit.sampling, admit.told
            )

    def forget(self, requests: Iterable[int]) -> None:
        """Drop requests; unknown ones are ignored."""
        for request in requests:
            self._known.pop(request, None)
            self._failed.discard(request)

    def fail(self, requests: Iterable[int]) -> None:
        """A step with these requests failed."""
        for request in requests:
            self._known.pop(request, None)
            self._failed.add(request)

    def rename(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Blocks were moved, one after the other in this order."""
        final: dict[int, int] = {}
        for old, new in zip(reversed(src), reversed(dst), strict=True):
            final[old] = final.get(new, new)  # a later move of the same block counts too
        for request in self._known.values():
            request.table = [final.get(block, block) for block in request.table]

    def pack(self, service: str, rows: Sequence[Row], page: Page) -> Packed:
        """Append the rows' blocks to their tables and lay the rows side by side, less those to be skipped.

        After an error the step's requests are to be failed: their tables may have grown.
        """
        packed, seen = Packed(), set()
        for row in rows:
            if row.request in self._failed:
                continue
            request = self._known.get(row.request)
            if request is None or request.service != service or row.request in seen:
                raise RuntimeError(f"request {row.request} is not known to {service}, or has two rows")
            seen.add(row.request)
            request.table += row.blocks
            self._append(packed, request, row, page)
        return packed

    def needs_tokens(self, rows: Iterable[Row]) -> bool:
        """Whether drawing for these rows takes a token that is still pending."""
        requests = [self._known.get(row.request) for row in rows if row.sample]
        return any(r is not None and r.tokens[-1] == PENDING and _reads_text(r) for r in requests)

    def advance(self, packed: Packed) -> None:
        """The packed rows are on the device; what they draw is pending."""
        for row in packed.rows:
            self._known[row.request].run = row.start + row.count
        for number, request in enumerate(packed.sampling):
            request.drawn = number
            packed.places.append(len(request.tokens))
            request.tokens.append(PENDING)

    @staticmethod
    def settle(rows: Iterable[Row], packed: Packed, drawn: Iterable[int]) -> tuple[int, ...]:
        """The packed rows drew `drawn`. Returns one token per sampling row of `rows`, 0 for a skipped one.

        Their requests may have been dropped meanwhile.
        """
        found = {}
        for request, place, token in zip(packed.sampling, packed.places, drawn, strict=True):
            request.tokens[place] = found[request.id] = token
        return tuple(found.get(row.request, 0) for row in rows if row.sample)

    @staticmethod
    def _append(packed: Packed, request: Request, row: Row, page: Page) -> None:
        end = row.start + row.count
        if row.count < 1 or row.start < 0 or (request.run is not None and row.start != request.run):
            raise RuntimeError(
                f"request {row.request}: row of {row.count} at {row.start}, but {request.run} tokens were run"
            )
        if end > len(request.tokens):
            raise RuntimeError(f"request {row.request}: row ends at {end} of {len(request.tokens)} tokens")
        if row.sample and end != len(request.tokens):
            raise RuntimeError(f"request {row.request}: sampling at {end} of {len(request.tokens)} tokens")
        if len(request.table) < page.holding(end) * page.blocks or len(request.table) % page.blocks:
            raise RuntimeError(f"request {row.request}: {len(request.table)} blocks cannot hold {end} tokens")
        # Appended pages that begin before the row hold KV computed by another request with this prefix.
        first_fresh = max(page.holding(row.start) * page.blocks, len(request.table) - len(row.blocks))
        packed.fresh += request.table[first_fresh:]
        packed.rows.append(row)
        if request.sampling.prompt_logprobs >= 0:
            first, behind = max(row.start + 1, request.told), min(end + 1, request.prompt)
            if first < behind:
                at = len(packed.ids) + first - 1 - row.start  # a token is predicted by the one before it
                tokens = request.tokens[first:behind]
                part = PromptPart(row.request, first, tokens, at, request.sampling.prompt_logprobs)
                packed.scoring.append(part)
        if request.sampling.pooling:
            first = max(row.start, request.told)
            if request.sampling.pooling == "last":
                first = max(first, request.prompt - 1)
            if first < end:
                at = len(packed.ids) + first - row.start
                packed.pooling.append(PoolPart(row.request, first, end - first, at))
        packed.spans.append(Span(len(packed.ids), row.count, end, request.table))
        if request.tokens[end - 1] == PENDING:
            packed.fed.append((len(packed.ids) + row.count - 1, request.drawn))
        packed.ids += [max(token, 0) for token in request.tokens[row.start : end]]
        packed.positions += range(row.start, end)
        if row.sample:
            packed.sampling.append(request)
            packed.last.append(len(packed.ids) - 1)


def _reads_text(request: Request) -> bool:
    """Whether drawing its next token takes the ones before, and not only how many they are."""
    sampling = request.sampling
    return (
        request.matcher is not None
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or bool(sampling.bad_words)
    )
