"""What people do with Ollama's own client.

python with_ollama.py URL CHAT_MODEL PLAIN_MODEL
"""

import json
import sys

import ollama

URL, CHAT, PLAIN = sys.argv[1:]
MESSAGES = [{"role": "user", "content": "Name a colour."}]
GREEDY = {"temperature": 0, "num_predict": 12}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def colour(thing: str) -> str:
    """Tell the colour of a thing.

    Args:
        thing: what it is about
    """
    return thing


def tools(client):
    """Calls and their results go to the model; what it makes of them is the model's own affair."""
    call = {"function": {"name": "colour", "arguments": {"thing": "the sky"}}}
    talk = [
        {"role": "user", "content": "What colour is the sky?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "colour", "content": "blue"},
    ]
    answer = client.chat(CHAT, talk, tools=[colour], options=GREEDY)
    assert answer.message.content or answer.message.tool_calls
    assert answer.prompt_eval_count > 50
    try:
        client.chat(CHAT, MESSAGES, think=True)
    except ollama.ResponseError as error:
        assert error.status_code == 400
        assert "thinking" in error.error
    else:
        raise AssertionError("a model that does not think did")


def main():
    client = ollama.Client(host=URL, timeout=120)
    assert {CHAT, PLAIN} <= {model.model for model in client.list().models}
    shown = client.show(CHAT)
    assert {"completion", "embedding", "tools"} <= set(shown.capabilities)
    assert shown.modelinfo[f"{shown.details.family}.context_length"] > 1000
    whole = client.chat(CHAT, MESSAGES, options=GREEDY)
    streamed = list(client.chat(CHAT, MESSAGES, options=GREEDY, stream=True))
    assert "".join(part.message.content for part in streamed) == whole.message.content
    assert (streamed[-1].done, streamed[-1].eval_count) == (True, whole.eval_count)
    generated = client.generate(PLAIN, "Once upon a time", options=GREEDY)
    raw = client.generate(CHAT, "Once upon a time", options=GREEDY, raw=True, keep_alive="5m")
    answer = client.chat(CHAT, MESSAGES, format=CITY, options={"temperature": 0, "num_predict": 60})
    assert set(json.loads(answer.message.content)) == {"city"}
    assert CHAT in {model.model for model in client.ps().models}
    tools(client)
    vectors = client.embed(CHAT, ["Once upon a time", "x"])
    assert len(vectors.embeddings) == 2
    assert len(client.embeddings(CHAT, "Once upon a time").embedding) == len(vectors.embeddings[0])
    try:
        client.chat("nobody", MESSAGES)
    except ollama.ResponseError as error:
        assert error.status_code == 404
        assert "nobody" in error.error
    else:
        raise AssertionError("a model that is not there answered")
    print(
        json.dumps(
            {
                "chat": whole.message.content,
                "completion": generated.response,
                "raw": raw.response,
                "embedding": list(vectors.embeddings[0][:8]),
            }
        )
    )


main()
