"""What each parser of ours may say to bytes that are thrown at it: one function per parser.

Owns the list of parsers, honest examples of their input to begin with, and the expected refusals; whatever
else is raised is a defect. Must not know who makes the input up (`fuzz` does, and the tests).
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from seallmd import config
from seallmd.api.control_schema import Command
from seallmd.api.guard import names_this_machine
from seallmd.api.keys import Key, Keyring, read_keys
from seallmd.api.ollama_schema import read_generate, read_ollama_chat
from seallmd.api.prompts import split_prompts
from seallmd.api.reasoning import BEGIN, END, ReasoningReader
from seallmd.api.responses_schema import read_responses
from seallmd.api.schema import read_chat, read_completion
from seallmd.api.tool_formats import FORMATS
from seallmd.api.tool_reader import Argued, Called, Said, ToolReader
from seallmd.core import framing
from seallmd.core import messages as msg
from seallmd.core.events import HostUp
from seallmd.core.node import Node
from seallmd.core.settings import NodeSettings, PolicySettings
from seallmd.ctl.http import read_chunks
from seallmd.errors import ConfigError, ControlError, ModelRefused, RequestError
from seallmd.runtime import journal
from seallmd.runtime.notify import take_listeners, take_notifier
from seallmd.worker.checkpoint import Checkpoint
from seallmd.worker.gguf_check import check_gguf
from seallmd.worker.plausible import check_files

ROOT = Path(__file__).parents[2]
_DIRECTORY = Path(tempfile.mkdtemp(prefix="seallmd-fuzz-"))
_LONGEST_ERROR = 1000  # characters


class Parser(NamedTuple):
    """read: takes the bytes; raises nothing but what `refusals` names. examples: honest inputs."""

    read: Callable[[bytes], None]
    refusals: tuple[type[Exception], ...]
    examples: tuple[bytes, ...]

    def accepts(self, data: bytes) -> bool:
        """Whether the input is taken; raises what is a defect."""
        try:
            self.read(data)
        except self.refusals as refusal:
            text = str(refusal)
            assert 0 < len(text) <= _LONGEST_ERROR, f"an error of {len(text)} characters"
            return False
        return True


def _file(name: str, data: bytes, mode: int = 0o600) -> Path:
    path = _DIRECTORY / name
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
    return path


def _configuration(data: bytes) -> None:
    config.load(_file("seallmd.toml", data))


def _keys(data: bytes) -> None:
    for key in read_keys(_file("keys.toml", data)):
        assert key.allows("m") in (True, False)


def _presented(data: bytes) -> None:
    """As aiohttp gives headers: bytes that are no UTF-8 become surrogates."""
    key = Key(name="a", key="0123456789abcdef")
    found = Keyring([key]).find(data.decode(errors="surrogateescape"))
    assert (found is None) == (data != b"0123456789abcdef")


def _bodies(data: bytes) -> None:
    """Every kind of body is read; refusals of one say nothing about the next."""
    taken, refused = [], list[RequestError]()
    for read in (read_completion, read_chat, read_responses, read_generate, read_ollama_chat):
        try:
            taken.append(read(data))
        except RequestError as error:
            refused.append(error)
    assert all(400 <= error.status < 500 and len(str(error)) <= _LONGEST_ERROR for error in refused)
    for spec in taken:
        prompt = getattr(spec, "prompt", "")
        if prompt and not isinstance(prompt, str):
            split_prompts(prompt, "prompt", 64)
    if not taken:
        raise refused[0]


def _tool_calls(data: bytes) -> None:
    """However the text is cut into pieces, the same is read from it."""
    if len(data) < 2:
        return
    format_ = list(FORMATS.values())[data[0] % len(FORMATS)]
    text, size = data[2:].decode(errors="replace"), data[1] % 7 + 1
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert _read_calls(format_, pieces) == _read_calls(format_, [text])


def _read_calls(format_: object, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(what was said, (name, arguments) of each call)"""
    reader, said, calls = ToolReader(format_), "", list[list[str]]()  # type: ignore[arg-type]
    for events in (*map(reader.push, pieces), reader.flush()):
        for event in events:
            match event:
                case Said(text):
                    said += text
                case Called(index, _, name):
                    assert index == len(calls)
                    calls.append([name, ""])
                case Argued(index, text):
                    calls[index][1] += text
    assert reader.calls == len(calls)
    return said, [(name, arguments) for name, arguments in calls]


def _thoughts(data: bytes) -> None:
    """The same for what was thought; nothing but a tag of each kind and white space is lost."""
    if len(data) < 2:
        return
    text, size = data[2:].decode(errors="replace"), data[1] % 7 + 1
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    is_open = bool(data[0] % 2)
    told = _read_thoughts(pieces, is_open=is_open)
    assert told == _read_thoughts([text], is_open=is_open)
    lost = len("".join(text.split())) - len("".join("".join(told).split()))
    assert lost in (0, len(BEGIN), len(END), len(BEGIN + END))


def _read_thoughts(pieces: list[str], *, is_open: bool) -> tuple[str, str]:
    """(thoughts, answer)"""
    reader = ReasoningReader(is_open=is_open)
    told = [*map(reader.push, pieces), reader.flush()]
    return "".join(thought for thought, _ in told), "".join(said for _, said in told)


def _gguf(data: bytes) -> None:
    check_gguf(_file("m.gguf", data))


def _model_files(data: bytes) -> None:
    """A first byte says which file of a model's directory the rest is."""
    names = ("model.safetensors", "config.json", "model.safetensors.index.json")
    name = names[data[0] % len(names)] if data else names[0]
    _file("config.json", b"{}")
    for weights in names[::2]:
        (_DIRECTORY / weights).unlink(missing_ok=True)
    _file(name, data[1:])
    check_files(_DIRECTORY)
    checkpoint = Checkpoint(_DIRECTORY)
    for tensor in checkpoint.names:
        assert all(length >= 0 for length in checkpoint.shape(tensor))


def _control(data: bytes) -> None:
    """As `ControlServer` reads a line."""
    msgspec.json.decode(data, type=Command)


def _host(data: bytes) -> None:
    """A name that passes is one of this machine's, whatever surrounds it."""
    text = data.decode(errors="surrogateescape")
    if names_this_machine(text):
        assert any(name in text.lower() for name in ("localhost", "127.0.0.1", "::1")), text


def _service_manager(data: bytes) -> None:
    """The environment that systemd sets, a variable a line."""

    def open_(_descriptor: int) -> object:
        raise ConfigError("there is none")

    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
    lines = data.decode(errors="surrogateescape").replace("\0", "").splitlines()
    environment = dict(zip(names, lines, strict=False))
    notifier = take_notifier(environment)
    assert notifier.watchdog_seconds >= 0
    notifier.status("x")
    take_listeners(environment, ("http", "control"), open_)  # type: ignore[arg-type]
    assert not environment


def _frames(data: bytes) -> None:
    """What a child process might say."""
    for _ in framing.Unframer(msg.FromWorker | msg.FromHost).feed(data):
        pass


def _journal(data: bytes) -> None:
    """A journal or a dump of the flight recorder; it need not be ours."""
    _, records = journal.read(_file("run.journal", data))
    for _ in records:
        pass


def _answers(data: bytes) -> None:
    """What seallmctl reads of a stream, from whoever answers at that address."""
    for chunk in read_chunks(data.splitlines(keepends=True)):
        assert isinstance(chunk, dict)


def _gguf_example() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    alignment = text(b"general.alignment") + struct.pack("<II", 4, 32)
    array = text(b"a") + struct.pack("<IIQ", 9, 8, 2) + text(b"x") + text(b"y")
    tensor = text(b"t") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
    return struct.pack("<4sIQQ", b"GGUF", 3, 1, 2) + alignment + array + tensor + bytes(600)


def _safetensors_example() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def _journal_example() -> bytes:
    settings = NodeSettings(services=(), devices=1, block_bytes=256, host_bytes=0, policy=PolicySettings())
    path = _DIRECTORY / "example.journal"
    with contextlib.closing(journal.Journal(path, 1 << 20, settings)) as made:
        made.record(0.0, HostUp(), Node(settings).handle(HostUp(), 0.0))
    return path.read_bytes()


_KEY = b'[[key]]\nname = "alice"\nkey = "0123456789abcdef"\ntier = "flex"\nmodels = ["m-*"]\n'
_CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
}
_CALLS = (
    b'\0\3a <tool_call>\n{"name": "f", "arguments": {"x": "}"}}\n</tool_call> b',
    b'\2\1<|python_tag|>{"name": "f", "parameters": {"x": [1]}}; {"name": "g", "parameters": {}}',
    b'\3\2[TOOL_CALLS][{"name": "f", "arguments": {}}]',
    b'\3\4[TOOL_CALLS]f[ARGS]{"x": 1}',
)

PARSERS = {
    "configuration": Parser(
        _configuration,
        (ConfigError,),
        ((ROOT / "seallmd.toml").read_bytes(), (ROOT / "systemd/seallmd.toml").read_bytes()),
    ),
    "keys": Parser(_keys, (ConfigError,), (_KEY,)),
    "presented key": Parser(_presented, (), (b"0123456789abcdef",)),
    "bodies": Parser(
        _bodies,
        (RequestError,),
        (
            b'{"model": "m", "prompt": [[1, 2], [3]], "n": 2, "stop": ["a"], "logit_bias": {"5": 1}}',
            json.dumps(_CHAT).encode(),
            b'{"model": "m", "input": [{"role": "user", "content": "x"}], "max_output_tokens": 3}',
            b'{"model": "m", "prompt": "x", "options": {"num_predict": 3}, "keep_alive": "5m"}',
        ),
    ),
    "tool calls": Parser(_tool_calls, (), _CALLS),
    "thoughts": Parser(_thoughts, (), (b"\0\3<think>\na </th b\n</think>\n\nc", b"\1\1a\n</think>b")),
    "gguf": Parser(_gguf, (ModelRefused,), (_gguf_example(),)),
    "model files": Parser(
        _model_files,
        (ModelRefused,),
        (
            b"\0" + _safetensors_example(),
            b'\1{"num_hidden_layers": 2, "rope_scaling": {"factor": 8.0}}',
            b'\2{"weight_map": {"a": "model-1.safetensors"}}',
        ),
    ),
    "control": Parser(
        _control,
        (msgspec.DecodeError, UnicodeDecodeError, RecursionError),
        (
            b'{"op": "evict", "service": "a", "now": true}',
            b'{"op": "drain", "device": 0, "on": false}',
            b'{"op": "events", "follow": true, "last": 5}',
        ),
    ),
    "host": Parser(_host, (), (b"localhost:8000", b"[::1]:80", b"user@127.0.0.1:1")),
    "service manager": Parser(
        _service_manager,
        (ConfigError,),
        (f"/run/x\n2000000\n{os.getpid()}\n2\n{os.getpid()}\nhttp:control".encode(),),
    ),
    "frames": Parser(
        _frames,
        (ValueError, msgspec.DecodeError),
        (framing.frame(msg.Hello(1, "cpu", 0)) + framing.frame(msg.StepDone(1, (2, 3), 0.1)),),
    ),
    "journal": Parser(_journal, (ValueError,), (_journal_example(),)),
    "answers": Parser(
        _answers,
        (ControlError,),
        (b'data: {"choices": []}\n\n: ping\n\ndata: [DONE]\n\n', b'data: {"error": {"message": "no"}}\n'),
    ),
}
