"""One or several texts, each a string or token ids: how completions and embeddings are given them.

Owns telling these apart. Must not know any endpoint or model.
"""

from __future__ import annotations

from seallmd.errors import RequestError


def split_prompts(given: str | list[str | int | list[int]], param: str, most: int) -> list[str | list[int]]:
    """Each of at most so many prompts: a string, or token ids. Raises RequestError that names `param`."""
    if isinstance(given, str):
        prompts: list[str | list[int]] = [given]
    elif given and all(isinstance(entry, int) for entry in given):
        prompts = [[entry for entry in given if isinstance(entry, int)]]
    elif all(isinstance(entry, str) for entry in given) or all(isinstance(entry, list) for entry in given):
        prompts = [entry for entry in given if not isinstance(entry, int)]
    else:
        raise RequestError(f"`{param}` mixes strings and token ids", param=param)
    if not prompts or not all(prompts):
        raise RequestError(f"`{param}` is empty", param=param)
    if len(prompts) > most:
        message = f"`{param}` has {len(prompts)} prompts, at most {most} are allowed"
        raise RequestError(message, param=param)
    return prompts
