"""From what the operator wrote to a directory that can be served.

Owns model references (directory, GGUF file, Hugging Face id), the cache of converted and downloaded models
and the completion of missing tokenizer files. Slow parts report progress. Must not know messages or weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from seallmd.errors import ModelRefused
from seallmd.files import partial_of
from seallmd.worker.gguf_check import check_gguf
from seallmd.worker.process import one_line

# stage, bytes done, bytes in all (0: unknown)
Progress = Callable[[str, int, int], None]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*"]
_UNWANTED = ["*/*", "consolidated*"]


def local_directory(model: str) -> Path | None:
    """The directory that `model` names, None if it must be fetched first (see `fetch`).

    Raises ModelRefused where that cannot be seen, by this user for example.
    """
    path = Path(model).expanduser()
    try:
        return path.resolve() if path.is_dir() else None
    except OSError as error:
        raise ModelRefused(f"{path.name[:100]} cannot be looked at: {error.strerror}") from error


def fetch(model: str, cache: str, progress: Progress) -> Path:
    """Convert a GGUF file or download a Hugging Face id, or find it in the cache. Slow.

    Raises ModelRefused with the reason.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        check_gguf(path)
        return _converted(path.resolve(), _cache(cache, "converted"), progress)
    if path.exists():
        raise ModelRefused(f"{path.name} is neither a directory nor a .gguf file")
    if path.suffix == ".gguf" or model.startswith(("/", ".", "~")) or not _HUB_ID.match(model):
        raise ModelRefused("no such file or directory")
    return _downloaded(model, _cache(cache, "hub"), progress)


def with_tokenizer(directory: Path, cache: str) -> Path:
    """`directory`, or a directory of links to it with the tokenizer files that it lacks.

    Raises ModelRefused if a tokenizer.json cannot be made without remote code.
    """
    complete = directory
    if not all((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        # Of all files: some may have been on their way when the last one was made.
        files = sorted(file for file in directory.iterdir() if file.is_file())
        complete = _cache(cache, "completed") / f"{directory.name}-{_key(*files)}"
        if not complete.is_dir():
            _complete(directory, complete)
    try:
        Tokenizer.from_file(str(complete / "tokenizer.json"))
    except Exception as error:
        raise ModelRefused(f"its tokenizer.json cannot be read: {one_line(error)}") from error
    return complete


def eos_ids(directory: Path) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json's, else config.json's, and the tokenizer's."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids |= _eos_of(_json(directory / name))
        if ids:
            break
    token = _json(directory / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        known = _token_id(directory / "tokenizer.json", token)
        if known is not None:
            ids.add(known)
    return tuple(sorted(ids))


class _Added(msgspec.Struct):
    id: int
    content: str


class _Vocabulary(msgspec.Struct):
    """What a tokenizer.json says of tokens with a meaning of their own."""

    added_tokens: list[_Added] = []


def _token_id(file: Path, token: str) -> int | None:
    """A token's id. Nearly all that are asked for are added ones: the rest takes a second to read."""
    with suppress(msgspec.DecodeError):
        vocabulary = msgspec.json.decode(file.read_bytes(), type=_Vocabulary)
        for added in vocabulary.added_tokens:
            if added.content == token:
                return added.id
    return Tokenizer.from_file(str(file)).token_to_id(token)


def _eos_of(config: dict[str, object]) -> set[int]:
    found = config.get("eos_token_id")
    if found is None and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("eos_token_id")  # type: ignore[attr-defined]
    found = found if isinstance(found, list) else [found]
    return {eos for eos in found if isinstance(eos, int)}


def _json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _cache(cache: str, part: str) -> Path:
    if not cache:
        raise ModelRefused("this model must be fetched or completed, and no cache directory is configured")
    directory = Path(cache) / part
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _key(*paths: Path) -> str:
    """Changes when one of the files is replaced or edited."""
    status = [(path, path.stat()) for path in paths]
    text = "\0".join(f"{path}\0{s.st_mtime_ns}\0{s.st_size}" for path, s in status)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def _converted(source: Path, cache: Path, progress: Progress) -> Path:
    target = cache / f"{source.stem}-{_key(source)}"
    if target.is_dir():
        return target
    command = [sys.executable, "-m", "seallmd.worker.convert", str(source), str(target)]
    command += ["--parent", str(os.getpid())]
    last = ""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            last = line.strip() or last
            progress("convert", 0, 0)
    if child.returncode != 0:
        raise ModelRefused(f"the GGUF file cannot be converted: {last}")
    return target


def _downloaded(model: str, cache: Path, progress: Progress) -> Path:
    class Bar(tqdm):
        """Tells our caller what the bar would have shown."""

        def display(self, *_: object, **__: object) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B":  # there is another bar, which counts files
                progress("download", int(self.n), int(self.total or 0))
            return bool(shown)

    progress("download", 0, 0)
    try:
        directory = snapshot_download(
            model, cache_dir=cache, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, tqdm_class=Bar
        )
    except Exception as error:
        raise ModelRefused(f"it cannot be downloaded: {one_line(error)}") from error
    return Path(directory)


def _complete(directory: Path, target: Path) -> None:
    """Make `target`: links to all files of `directory`, and the tokenizer in its fast form."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelRefused(f"it has no tokenizer.json, and none can be made: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelRefused("it has no tokenizer.json, and none can be made from its slow tokenizer")
    partial = partial_of(target)
    partial.mkdir()
    try:
        tokenizer.save_pretrained(partial)
        if (directory / "tokenizer.json").is_file():  # the model's own; its class may make another of it
            (partial / "tokenizer.json").unlink()
        for file in directory.iterdir():
            if not (partial / file.name).exists():
                (partial / file.name).symlink_to(file.resolve())
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
