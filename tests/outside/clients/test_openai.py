"""OpenAI's library for Python: tools, parsed replies, the Responses API."""

from __future__ import annotations


def test_openai_tools_parse_and_responses(url: str) -> None:
    import openai
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    ask = [{"role": "user", "content": "person"}]
    parsed = client.chat.completions.parse(model="scripted", messages=ask, response_format=Person, temperature=0)
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
    answer = client.responses.parse(model="scripted", input="person", text_format=Person, temperature=0)
    assert answer.output_parsed == Person(name="Ada", age=36)
    with client.responses.stream(model="scripted", input="hi", temperature=0) as stream:
        assert stream.get_final_response().output_text == "Hello there!"
