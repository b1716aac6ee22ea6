"""An agent of LangGraph on LangChain's ChatOpenAI, through a whole turn."""

from __future__ import annotations


def test_langchain_agent(url: str) -> None:
    from langchain.agents import create_agent
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    asked = []

    @tool
    def look_up(place: str) -> str:
        """The weather of a place."""
        asked.append(place)
        return "cold"

    model = ChatOpenAI(model="scripted", base_url=f"{url}/v1", api_key="unused", temperature=0, max_retries=0)
    agent = create_agent(model, [look_up])
    out = agent.invoke({"messages": [("user", "weather")]})
    assert asked == ["Bern"] and out["messages"][-1].content == "It is cold in Bern."
