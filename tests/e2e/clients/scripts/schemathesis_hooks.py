"""What schemathesis needs to know of us: names of models that are there, small work, what an honest 503 is.

Loaded by its command line (SCHEMATHESIS_HOOKS); MODELS in the environment names services, space between.
"""

import json
import os

import schemathesis

MODELS = os.environ["MODELS"].split()
# The most that a request may ask for here, and the most that it may ask for at all.
SMALL = {
    "max_tokens": (3, 1 << 31),
    "max_completion_tokens": (3, 1 << 31),
    "max_output_tokens": (16, 1 << 31),
    "min_tokens": (2, 1 << 31),
    "n": (2, 128),
}


@schemathesis.hook
def before_call(context, case, kwargs):  # noqa: ARG001 - the signature is schemathesis'
    """A valid name becomes that of a model, or all there is to see is 404. What is invalid stays so."""
    parameters = case.path_parameters
    if isinstance(parameters, dict) and "name" in parameters:
        parameters["name"] = MODELS[len(str(parameters["name"])) % len(MODELS)]
    if isinstance(case.body, dict):
        case.body = answerable(case.operation.path, case.body)


def answerable(path, body):
    """The same body for a model that is there, asking for little."""
    body = dict(body)
    name = body.get("model")
    if isinstance(name, str) and 1 <= len(name) <= 256:
        body["model"] = MODELS[len(name) % len(MODELS)]
    for field, (most, allowed) in SMALL.items():
        value = body.get(field)
        if type(value) is int and most < value <= allowed:
            body[field] = most
    # An answer without a limit is as long as the context.
    if path == "/v1/chat/completions" and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 3 if body.get("max_tokens") is None else body["max_tokens"]
    if path == "/v1/responses" and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = 16
    options = {} if body.get("options") is None else body["options"]
    if path in ("/api/chat", "/api/generate") and type(options) is dict:
        wanted = options.get("num_predict")
        if wanted is None or type(wanted) is int:
            body["options"] = {**options, "num_predict": 3}
    return body


@schemathesis.deserializer("application/x-ndjson")
def first_line(context, response):  # noqa: ARG001 - as above
    """Each line of an Ollama stream is such an object."""
    return json.loads(response.content.splitlines()[0])


@schemathesis.check
def honest_errors(context, response, case):  # noqa: ARG001 - as above
    """No 5xx but a 503 that says whether trying again makes sense."""
    names = {name.lower() for name in response.headers}
    if response.status_code >= 500 and not (
        response.status_code == 503 and names & {"retry-after", "x-should-retry"}
    ):
        raise AssertionError(f"{response.status_code}: {response.content[:300]!r}")
