"""The HTTP side as `tests/api` serves it."""

from tests.api.conftest import client, engine, model, port, runner, tokenizer, url

__all__ = ["client", "engine", "model", "port", "runner", "tokenizer", "url"]
