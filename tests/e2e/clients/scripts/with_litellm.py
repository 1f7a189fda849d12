"""What people do with LiteLLM: the daemon as an OpenAI-compatible, a vLLM and an Ollama server.

python with_litellm.py URL CHAT_MODEL PLAIN_MODEL
"""

import json
import sys

import litellm

URL, CHAT, PLAIN = sys.argv[1:]
MESSAGES = [{"role": "user", "content": "Name a colour."}]
GREEDY = {"temperature": 0, "max_tokens": 12, "num_retries": 0}
PROVIDERS = {"openai": f"{URL}/v1", "hosted_vllm": f"{URL}/v1", "ollama_chat": URL}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


def chat(provider, **more):
    fields = {**GREEDY, "messages": MESSAGES, **more}
    model = fields.pop("model", CHAT)
    return litellm.completion(
        model=f"{provider}/{model}", api_base=PROVIDERS[provider], api_key="none", **fields
    )


def streamed(provider):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chat(provider, stream=True))


def refused(kind, **fields):
    try:
        chat("openai", **fields)
    except kind:
        return
    raise AssertionError(f"{fields} was accepted")


def main():
    texts = {}
    for provider in PROVIDERS:
        answer = chat(provider)
        texts[provider] = answer.choices[0].message.content
        assert streamed(provider) == texts[provider], provider
        assert answer.usage.completion_tokens > 0
    completed = litellm.text_completion(
        model=f"openai/{PLAIN}", prompt="Once upon a time", api_base=f"{URL}/v1", api_key="none", **GREEDY
    )
    call = chat("openai", tools=[TOOL], tool_choice="required", max_tokens=80)
    assert "city" in json.loads(call.choices[0].message.tool_calls[0].function.arguments)
    vectors = {
        provider: litellm.embedding(
            model=f"{provider}/{CHAT}", input=["Once upon a time"], api_base=base, api_key="none"
        ).data[0]["embedding"][:8]
        for provider, base in (("openai", f"{URL}/v1"), ("hosted_vllm", f"{URL}/v1"), ("ollama", URL))
    }
    refused(litellm.NotFoundError, model="nobody")
    refused(litellm.ContextWindowExceededError, max_tokens=1 << 20)
    refused(litellm.BadRequestError, temperature=3)
    print(json.dumps({"chats": texts, "completion": completed.choices[0].text, "embeddings": vectors}))


main()
