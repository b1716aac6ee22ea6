"""inspect_ai: an evaluation whose solver calls a tool, scored; the provider for servers of OpenAI's interface."""

from __future__ import annotations

from pathlib import Path


def test_inspect_ai(url: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate, use_tools
    from inspect_ai.tool import tool

    asked = []

    @tool
    def look_up():
        async def execute(place: str) -> str:
            """The weather of a place.

            Args:
                place: where
            """
            asked.append(place)
            return "cold"

        return execute

    samples = [Sample(input="weather", target="cold in Bern"), Sample(input="hi", target="Hello")]
    task = Task(dataset=samples, solver=[use_tools(look_up()), generate()], scorer=includes())
    (log,) = eval(
        task, model="openai-api/local/scripted", model_base_url=f"{url}/v1", model_args={"api_key": "unused"}, temperature=0,
        display="none", log_dir=str(tmp_path / "logs"),
    )  # fmt: skip
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1.0 and asked == ["Bern"]
