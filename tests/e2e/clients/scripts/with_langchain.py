"""What people do with LangChain: messages, streams, chains, structured output, tools, embeddings.

python with_langchain.py URL CHAT_MODEL PLAIN_MODEL
"""

import asyncio
import json
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

URL, CHAT, PLAIN = sys.argv[1:]
SERVER = {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def main():
    chat = ChatOpenAI(model=CHAT, temperature=0, max_tokens=12, **SERVER)
    question = [("user", "Name a colour.")]
    answer = chat.invoke(question)
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(question)) == answer.content
    chain = ChatPromptTemplate.from_messages([("user", "Name a {thing}.")]) | chat | StrOutputParser()
    assert chain.invoke({"thing": "colour"}) == answer.content
    batch = asyncio.run(chain.abatch([{"thing": "colour"}] * 3))
    assert batch == [answer.content] * 3

    longer = ChatOpenAI(model=CHAT, temperature=0, max_tokens=80, **SERVER)
    assert isinstance(longer.with_structured_output(City, method="json_schema").invoke(question), City)
    assert isinstance(longer.with_structured_output(City, method="function_calling").invoke(question), City)
    (call,) = longer.bind_tools([weather], tool_choice="weather").invoke(question).tool_calls
    assert (call["name"], set(call["args"])) == ("weather", {"city"})

    # The other way to count its tokens is by a table of OpenAI's own models, which is fetched.
    embeddings = OpenAIEmbeddings(model=CHAT, check_embedding_ctx_length=False, **SERVER)
    vectors = embeddings.embed_documents(["Once upon a time", "x"])
    assert len(vectors) == 2
    completion = OpenAI(model=PLAIN, temperature=0, max_tokens=12, **SERVER).invoke("Once upon a time")
    print(
        json.dumps(
            {
                "chat": answer.content,
                "completion": completion,
                "embedding": embeddings.embed_query("Once upon a time")[:8],
            }
        )
    )


main()
