"""The description of the HTTP side as an OpenAPI 3.1 document, made from the types that read and write it.

Owns the table of operations: what each takes and gives. Must not know how they work. A test compares the
table with the routes there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from seallmd import __version__
from seallmd.api.batch.records import BatchList, BatchObject, Deleted, FileList, FileObject
from seallmd.api.batch.routes import BatchRequest
from seallmd.api.chat_answer import ChatChunk, ChatCompletion
from seallmd.api.completion_answer import Completion
from seallmd.api.embeddings import EmbeddingList, EmbeddingRequest
from seallmd.api.ollama_schema import (
    EmbedRequest,
    GenerateRequest,
    OldEmbedRequest,
    OllamaChatRequest,
    ShowRequest,
)
from seallmd.api.responses_schema import ResponsesRequest
from seallmd.api.schema import ChatRequest, CompletionRequest
from seallmd.api.tokenize import DetokenizeRequest, TokenizeRequest

_REFERENCE = "#/components/schemas/{name}"


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong. code: OpenAI's word, such as "model_not_found". param: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """Every refusal, but below /api/."""

    error: ErrorDetail


class OllamaError(msgspec.Struct, frozen=True):
    """A refusal below /api/, as Ollama's."""

    error: str


class ModelCard(msgspec.Struct, frozen=True):
    """A service. max_model_len: its context in tokens, once it was examined."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    """Every service that the caller may use."""

    object: str
    data: list[ModelCard]


class Tokenized(msgspec.Struct, frozen=True):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct, frozen=True):
    """The answer of /detokenize."""

    prompt: str


class Word(msgspec.Struct, frozen=True):
    """The answer of /health and /ready when all is well."""

    status: str


class Version(msgspec.Struct, frozen=True):
    """The daemon's version."""

    version: str


class Operation(msgspec.Struct, frozen=True):
    """One route. body, answer: types, None = none or no JSON. events: each event of a stream's, if it can be
    one. media: of an answer that is no JSON; lines: streams are JSON lines, not events. form: fields
    of a form, the first of which is a file."""

    method: str
    path: str
    summary: str
    body: Any = None
    answer: Any = None
    events: Any = None
    media: str = ""
    lines: bool = False
    form: tuple[str, ...] = ()


_ANY = dict[str, Any]

OPERATIONS = (
    Operation("get", "/v1/models", "The models that can be asked.", answer=ModelList),
    Operation("get", "/v1/models/{name}", "One model.", answer=ModelCard),
    Operation("post", "/v1/completions", "Complete prompts.", CompletionRequest, Completion, Completion),
    Operation("post", "/v1/chat/completions", "Continue a chat.", ChatRequest, ChatCompletion, ChatChunk),
    Operation("post", "/v1/responses", "Answer, in the newer form.", ResponsesRequest, _ANY, _ANY),
    Operation(
        "post", "/v1/files", "Upload the input of a batch.", answer=FileObject, form=("file", "purpose")
    ),
    Operation("get", "/v1/files", "Files, a page at a time.", answer=FileList),
    Operation("get", "/v1/files/{name}", "One file.", answer=FileObject),
    Operation("get", "/v1/files/{name}/content", "What is in it.", media="application/octet-stream"),
    Operation("delete", "/v1/files/{name}", "Delete a file.", answer=Deleted),
    Operation("post", "/v1/batches", "Begin a batch.", BatchRequest, BatchObject),
    Operation("get", "/v1/batches", "Batches, a page at a time.", answer=BatchList),
    Operation("get", "/v1/batches/{name}", "One batch.", answer=BatchObject),
    Operation("post", "/v1/batches/{name}/cancel", "End a batch.", answer=BatchObject),
    Operation("post", "/v1/embeddings", "Texts to vectors.", EmbeddingRequest, EmbeddingList),
    Operation("post", "/tokenize", "Text or a chat to token ids.", TokenizeRequest, Tokenized),
    Operation("post", "/detokenize", "Token ids to text.", DetokenizeRequest, Detokenized),
    Operation("get", "/", "Whether somebody is there, as Ollama says it.", media="text/plain"),
    Operation("get", "/health", "Whether every device is up.", answer=Word),
    Operation("get", "/ready", "Whether new requests are served.", answer=Word),
    Operation("get", "/version", "The daemon's version.", answer=Version),
    Operation("get", "/metrics", "Metrics for Prometheus.", media="text/plain"),
    Operation("get", "/openapi.json", "This document.", answer=_ANY),
    Operation("get", "/api/version", "Ollama: the daemon's version.", answer=Version),
    Operation("get", "/api/tags", "Ollama: the models that can be asked.", answer=_ANY),
    Operation("get", "/api/ps", "Ollama: the models on devices.", answer=_ANY),
    Operation("post", "/api/show", "Ollama: what is known of a model.", ShowRequest, _ANY),
    Operation("post", "/api/generate", "Ollama: complete.", GenerateRequest, _ANY, _ANY, lines=True),
    Operation("post", "/api/chat", "Ollama: continue a chat.", OllamaChatRequest, _ANY, _ANY, lines=True),
    Operation("post", "/api/embed", "Ollama: texts to vectors.", EmbedRequest, _ANY),
    Operation("post", "/api/embeddings", "Ollama: a text to a vector.", OldEmbedRequest, _ANY),
)


def document(open_paths: Iterable[str] = (), *, keys: bool = False) -> dict[str, Any]:
    """The document. keys: whether API keys are needed, everywhere but on `open_paths`."""
    types = {t for o in OPERATIONS for t in (o.body, o.answer, o.events) if _is_struct(t)}
    types |= {ErrorBody, OllamaError}
    ordered = sorted(types, key=lambda kind: str(kind.__name__))
    _, components = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        described = _describe(operation)
        if keys and operation.path in open_paths:
            described["security"] = []
        paths.setdefault(operation.path, {})[operation.method] = described
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "seallmd",
            "version": __version__,
            "summary": "Many language models on one machine.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _describe(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "operationId": _identifier(operation)}
    if "{name}" in operation.path:
        schema = {"type": "string"}
        described["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    if operation.body is not None:
        content = {"application/json": {"schema": _schema(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.form:
        fields: dict[str, Any] = {name: {"type": "string"} for name in operation.form}
        fields[operation.form[0]]["format"] = "binary"
        form = {"type": "object", "properties": fields, "required": list(operation.form)}
        content = {"multipart/form-data": {"schema": form}}
        described["requestBody"] = {"required": True, "content": content}
    described["responses"] = {"200": {"description": "Done.", "content": _content(operation)}}
    shape = OllamaError if operation.path.startswith("/api/") else ErrorBody
    error = {"application/json": {"schema": _schema(shape)}}
    described["responses"]["default"] = {"description": "Refused, or failed.", "content": error}
    return described


def _content(operation: Operation) -> dict[str, Any]:
    if operation.media:
        return {operation.media: {"schema": {"type": "string"}}}
    content = {"application/json": {"schema": _schema(operation.answer)}}
    if operation.events is not None:
        schema = _schema(operation.events)
        if operation.lines:
            content["application/x-ndjson"] = {"schema": schema}
        else:
            content["text/event-stream"] = {"schema": _event(schema)}
    return content


def _event(schema: dict[str, Any]) -> dict[str, Any]:
    """One server-sent event, as OpenAPI 3.2 describes them: `data` is a document in a string, or the end."""
    document = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    data = {"anyOf": [document, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _schema(kind: Any) -> dict[str, Any]:
    if _is_struct(kind):
        return {"$ref": _REFERENCE.format(name=kind.__name__)}
    return {"type": "object"}


def _identifier(operation: Operation) -> str:
    words = operation.path.replace("{name}", "by_name").replace(".", "_").strip("/") or "root"
    return "_".join([operation.method, *words.split("/")])
