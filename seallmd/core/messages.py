"""Everything that is said between the daemon and its worker and host processes.

Owns the message structs; with their `framing` they are all that `worker` shares with the rest. Must not know
torch, sockets or policy.

Messages to one process are carried out in the order in which they were sent. The ledger in `core` relies on
that: it may hand a block to a new owner at once, because whatever still reads the old contents was sent
earlier.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from seallmd.core.shapes import ModelShape


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=True, gc=False):
    """Base of every message: immutable, encoded as a tagged array."""


# ------------------------------------------------------------------------- daemon to the host process


class Probe(Message, frozen=True):
    """Resolve `model` (directory, GGUF file, Hugging Face id) and learn its shape.

    dtype: "auto" or a dtype. context: limit in tokens, 0 = the model's own.
    """

    service: str
    model: str
    dtype: str
    context: int


class BuildImage(Message, frozen=True):
    """Build the host image of a service: all its weights, flattened, in shared memory.

    directory, dtype, context: as `Probed` told them, so that a host process that was restarted can do it too.
    ranks: tensor-parallel ranks; the image of rank r is the r-th of as many equal parts.
    """

    service: str
    directory: str = ""
    dtype: str = "auto"
    context: int = 0
    ranks: int = 1


class DropImage(Message, frozen=True):
    """Forget a host image (told to workers too, which unmap it); its memory is free once nobody maps it."""

    service: str


# ------------------------------------------------------------------------- the host process to daemon


class Probed(Message, frozen=True):
    """The model can be served. directory: where config, weights and tokenizer lie."""

    service: str
    directory: str
    shape: ModelShape


class ProbeFailed(Message, frozen=True):
    """The model cannot be served, and why (one line)."""

    service: str
    reason: str


class JobProgress(Message, frozen=True):
    """How far a long job is.

    stage: queue (its files are to be fetched), download, convert, fetched (another Probe finds them), read or
    copy. done and total: bytes (total 0: unknown).
    """

    service: str
    stage: str
    done: int
    total: int


class ImageReady(Message, frozen=True):
    """The image can be mapped from `path` by any process of this user while the host process lives."""

    service: str
    path: str
    bytes_: int
    seconds: float


class ImageFailed(Message, frozen=True):
    """The image could not be built, and why (one line)."""

    service: str
    reason: str


# -------------------------------------------------------------------------------- daemon to a worker


class Extent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One segment's place: bytes [image_at, image_at + bytes_) of the image lie at arena_at in the arena."""

    image_at: int
    bytes_: int
    arena_at: int


class Group(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A worker's part in a tensor-parallel group. id: names the group, once in a daemon's life.

    rank: 0 .. ranks-1. Every member gets the group's steps in the same order relative to all other groups'
    steps. Rank 0 alone draws tokens and reports them; the others report none.
    """

    id: int
    rank: int
    ranks: int


class CopyIn(Message, frozen=True):
    """Make a service resident: copy its image into the arena while other services keep stepping.

    copy: comes back in the outcome, so that a copy that was cancelled is told from the next one. group: None
    for a service on one device.
    """

    service: str
    directory: str
    dtype: str
    context: int
    image: str
    extents: tuple[Extent, ...]
    copy: int = 0
    group: Group | None = None


class DropWeights(Message, frozen=True):
    """The service is no longer resident; its extents belong to others from here on."""

    service: str


class MoveBlocks(Message, frozen=True):
    """Copy KV blocks `src[i]` -> `dst[i]` of the arena, and rename them in every block table."""

    src: tuple[int, ...]
    dst: tuple[int, ...]


class SaveBlocks(Message, frozen=True):
    """Copy KV blocks `src[i]` of the arena to slots `dst[i]` of the device's host memory for KV.

    copy: comes back in `BlocksCopied`; 0 = nobody asks.
    """

    src: tuple[int, ...]
    dst: tuple[int, ...]
    copy: int = 0


class RestoreBlocks(Message, frozen=True):
    """Copy slots `src[i]` of host memory for KV to blocks `dst[i]` of the arena.

    copy: as in `SaveBlocks`. device: whose host memory.
    """

    src: tuple[int, ...]
    dst: tuple[int, ...]
    copy: int = 0
    device: int = 0


# Bounds of compiling a grammar and of each step in it, by the names of llguidance's `LLParserLimits`: an
# eighth to a quarter of its defaults.
GRAMMAR_LIMITS = {
    "initial_lexer_fuel": 250_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 10_000,
    "max_lexer_states": 30_000,
    "max_grammar_size": 100_000,
}


class Grammar(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an output must match. text: in llguidance's terms. ends: ids that may follow a complete output;
    the first is the model's own.
    """

    text: str
    ends: tuple[int, ...]


class Sampling(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """How to choose tokens, and what to tell of them; ranges as in OpenAI's API and vLLM's extras.

    temperature 0 is greedy. top_k 0 is off. repetition_penalty covers prompt and output, the other two
    penalties the output alone. seed: the same (seed, position) gives the same draw, whatever else is in the
    batch. banned: these ids cannot be chosen before min_tokens tokens were generated.

    logprobs, prompt_logprobs: tell the log-probability of each generated or prompt token, and of so many of
    the likeliest in its place; -1 = tell none. They are the model's own, before any adjustment. allowed: no
    other ids are chosen; empty = all are allowed. bad_words: sequences of ids that the output never has.
    grammar: what the output matches; it goes before whatever would leave it nothing to choose.

    pooling: choose none. Tell what the prompt's last hidden states (behind the final norm) come to: those of
    all its tokens ("mean"), or the last one's ("last").
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    banned: tuple[int, ...] = ()
    logprobs: int = -1
    prompt_logprobs: int = -1
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    pooling: Literal["", "mean", "last"] = ""


class Admit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a worker must know of a request before its first row.

    tokens: prompt and whatever was generated before (after a preemption). prompt: how many are prompt.
    told: of the prompt's tokens, how many have been told what is wanted of them, or need not be: the first
    one has no log-probability.
    """

    request: int
    tokens: tuple[int, ...]
    prompt: int
    sampling: Sampling
    told: int = 1


class Row(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """Run `count` tokens of a request from position `start`; `blocks` are appended to its table first.

    A block of the split layout holds one layer: there `blocks` are layer after layer of each run of tokens.

    sample: draw the next token after the row's last one. The worker appends it to the request's tokens, so
    that a later row can run it before the daemon has seen it.
    """

    request: int
    start: int
    count: int
    sample: bool
    blocks: tuple[int, ...] = ()


class Step(Message, frozen=True):
    """One forward pass of one resident service. Rows' tokens are packed in this order.

    A step that fails makes the worker drop its requests. Steps behind it may have rows of them: such rows
    are skipped and draw 0, which the daemon, having failed these requests, ignores. threads: for the math, on
    a CPU; 0 = the worker's own number.
    """

    step: int
    service: str
    admit: tuple[Admit, ...]
    rows: tuple[Row, ...]
    threads: int = 0


class Forget(Message, frozen=True):
    """These requests are over (or preempted): drop their state. Unknown ids are ignored."""

    requests: tuple[int, ...]


class Ping(Message, frozen=True):
    """Say Pong: sent to who has been silent for long, to tell an idle process from one that hangs."""


class Pong(Message, frozen=True):
    """The answer to Ping."""


class Shutdown(Message, frozen=True):
    """End the process once everything before this message is done."""


# -------------------------------------------------------------------------------- a worker to daemon


class Hello(Message, frozen=True):
    """The process is ready. device: a name for people. arena_bytes: of its arena (host process: 0)."""

    pid: int
    device: str
    arena_bytes: int


class CopyDone(Message, frozen=True):
    """The service is resident: it computes from the arena, or from its image until all has been copied, which
    only its JobProgress shows then. seconds: since the copy was begun. operations: what of the model fast
    operations replaced, and how often."""

    service: str
    seconds: float
    copy: int = 0
    operations: tuple[tuple[str, int], ...] = ()


class CopyFailed(Message, frozen=True):
    """The service could not be made resident, and why; its extents are unused."""

    service: str
    reason: str
    copy: int = 0


class BlocksCopied(Message, frozen=True):
    """What was asked for under this number has been copied."""

    copy: int


class Scores(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities of neighbouring tokens of one request, each given all tokens before it; packed.

    position: of the first one among the request's tokens. top: so many of the likeliest ids are told beside
    each token. ids: little-endian int32 [tokens, 1 + top], the token itself and then the likeliest first.
    logprobs: little-endian float32 of the same shape. ranks: little-endian int32 [tokens], of the token
    itself; 1 is the likeliest.
    """

    request: int
    position: int
    top: int
    ids: bytes
    logprobs: bytes
    ranks: bytes

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return len(self.ranks) // 4


class Pooled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A part of what pooling a prompt gives: the sum of the hidden states of neighbouring tokens.

    position: of the first one among the request's tokens. tokens: how many. sum: little-endian float32
    [hidden size].
    """

    request: int
    position: int
    tokens: int
    sum: bytes


class RowFailed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that cannot go on although its step went well: its grammar cannot be followed, and why."""

    request: int
    reason: str


class StepDone(Message, frozen=True):
    """tokens: one per row with `sample`, in row order. seconds: from the step's start to its end.

    scores, pooled: of the rows' requests that want some; those of the prompt as far as these rows ran it.
    failed: requests whose tokens mean nothing.
    In a tensor-parallel group every rank answers, and only rank 0 has more to tell than seconds.
    """

    step: int
    tokens: tuple[int, ...]
    seconds: float
    scores: tuple[Scores, ...] = ()
    failed: tuple[RowFailed, ...] = ()
    pooled: tuple[Pooled, ...] = ()


class StepFailed(Message, frozen=True):
    """The step raised; no row of it counts. memory: for lack of memory, which fewer rows may not lack."""

    step: int
    reason: str
    memory: bool = False


ToHost = Probe | BuildImage | DropImage | Ping | Shutdown
FromHost = Hello | Pong | Probed | ProbeFailed | JobProgress | ImageReady | ImageFailed
ToWorker = (
    CopyIn
    | DropWeights
    | DropImage
    | MoveBlocks
    | SaveBlocks
    | RestoreBlocks
    | Step
    | Forget
    | Ping
    | Shutdown
)
FromWorker = Hello | Pong | JobProgress | CopyDone | CopyFailed | BlocksCopied | StepDone | StepFailed


class WorkerSettings(msgspec.Struct, frozen=True, gc=False):
    """What a worker or the host process is started with.

    device: "cpu" or "cuda:N". arena_bytes: size of the arena, 0 = what the GPU has free, less `reserve_bytes`
    (activations, workspaces, CUDA context). block_bytes: the arena's unit. threads: CPU threads for math.
    cache: directory for downloaded and converted models and for compiled operations. host_kv_bytes: host
    memory of each device for KV, in slots of one block. host_kv: the files in memory that hold it, of all
    devices of the machine in order, `index` being this one's; none = memory of its own, that no other reads.
    kv_layout: "merged" (a block holds all layers of its tokens) or "split" (one layer). image_cache_bytes: of
    host images on disk, 0 = none. kernels: whether a GPU runs operations of its own, where they agree with
    plain torch. graph_bytes: how much of `reserve_bytes` CUDA graphs may take, 0 = none are captured.
    rendezvous: a private directory in which the members of tensor-parallel groups find each other.
    """

    name: str
    device: str
    arena_bytes: int = 0
    reserve_bytes: int = 0
    block_bytes: int = 1 << 21
    threads: int = 1
    cache: str = ""
    host_kv_bytes: int = 0
    host_kv: tuple[str, ...] = ()
    index: int = 0
    kv_layout: Literal["merged", "split"] = "merged"
    kernels: bool = True
    graph_bytes: int = 0
    rendezvous: str = ""
    image_cache_bytes: int = 0
