"""What people do with the official client, of whichever version is installed here.

    python with_openai.py URL CHAT_MODEL PLAIN_MODEL

Prints one JSON object. Any assertion or exception ends it with a traceback.
"""

import asyncio
import json
import sys

import openai
from openai import AsyncOpenAI, OpenAI

URL, CHAT, PLAIN = sys.argv[1:]
PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Name a colour."}]
GREEDY = {"model": CHAT, "temperature": 0, "max_tokens": 12}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


def completions(client):
    """Whole, and streamed with usage: the same text."""
    whole = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens) == 12
    chunks = list(
        client.completions.create(
            prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    return whole.choices[0].text


def chats(client):
    """The same of chats."""
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=1, **GREEDY)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].logprobs.content[0].top_logprobs
    text = ""
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY):
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    return text


def structured(client):
    """A schema and a forced tool, both ways of naming them."""
    wanted = {**GREEDY, "max_tokens": 60}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = client.chat.completions.create(messages=MESSAGES, response_format=form, **wanted)
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}
    answer = client.chat.completions.create(
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        **wanted,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city"}


def responses(client):
    """The newer endpoint, whole and in events."""
    wanted = {"model": CHAT, "input": "Name a colour.", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**wanted)
    deltas = [e.delta for e in client.responses.create(stream=True, **wanted) if "text.delta" in e.type]
    assert "".join(deltas) == whole.output_text
    return whole.output_text


def embeddings(client):
    """The client asks for base64 and unpacks it, unless told otherwise."""
    packed = client.embeddings.create(model=CHAT, input=[PROMPT, "x"]).data
    plain = client.embeddings.create(model=CHAT, input=[PROMPT, "x"], encoding_format="float").data
    for one, other in zip(packed, plain, strict=True):
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6
    return packed[0].embedding[:8]


def errors(client):
    """Each is the exception that programs expect, with the field at fault."""
    wrong = [
        (openai.NotFoundError, "model_not_found", {"model": "nobody"}),
        (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 1 << 20}),
        (openai.BadRequestError, None, {"temperature": 3}),
    ]
    for kind, code, fields in wrong:
        try:
            client.chat.completions.create(**{**GREEDY, "messages": MESSAGES, **fields})
        except kind as error:
            assert error.code == code, error
            assert error.message
        else:
            raise AssertionError(f"{fields} was accepted")


async def at_once(text):
    """The asynchronous client, several requests in flight, one of them left early."""
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(prompt=PROMPT, stream=True, **{**GREEDY, "max_tokens": 500})
        asked = [client.completions.create(prompt=PROMPT, **GREEDY) for _ in range(4)]
        answers = await asyncio.gather(*asked)
        await stream.close()
        assert {answer.choices[0].text for answer in answers} == {text}


def main():
    client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)
    assert {CHAT, PLAIN} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(CHAT).id == CHAT
    text = completions(client)
    asyncio.run(at_once(text))
    structured(client)
    errors(client)
    found = {
        "version": openai.__version__,
        "completion": text,
        "chat": chats(client),
        "response": responses(client),
        "embedding": embeddings(client),
    }
    print(json.dumps(found))


main()
