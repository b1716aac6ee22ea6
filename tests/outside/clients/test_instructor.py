"""instructor: an object of a class, by a call of a tool."""

from __future__ import annotations


def test_instructor(url: str) -> None:
    import instructor
    import openai
    import pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int

    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="unused"), mode=instructor.Mode.TOOLS)
    found = client.chat.completions.create(
        model="scripted", response_model=Person, temperature=0, messages=[{"role": "user", "content": "ada"}]
    )
    assert found.model_dump() == {"name": "Ada", "age": 36}  # of a class that instructor makes
