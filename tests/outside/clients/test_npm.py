"""Coding agents from npm, each through a whole session: a call, its result, an answer. OUTRIDER_NPM: where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.outside.clients.conftest import scripted_server

FOLDER = Path(os.environ.get("OUTRIDER_NPM", "node_modules"))
RUN = '<tool_call>\n{"name": "exec_command", "arguments": {"cmd": "echo from-the-shell"}}\n</tool_call>'
LIST = '<tool_call>\n{"name": "list_directory", "arguments": {"path": "WHERE"}}\n</tool_call>'


def program(package: str, name: str) -> str:
    found = FOLDER / ".bin" / name
    if not found.exists():
        pytest.skip(f"npm install {package}")
    return str(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def agent_url(place: Path) -> Iterator[str]:
    (place / "seen-by-the-agent.txt").write_text("x")
    scripts = {"use the shell": RUN, "list the folder": LIST.replace("WHERE", str(place)), "*tool": "All done here."}
    with scripted_server("hermes", scripts) as found:
        yield found


def test_codex_exec(agent_url: str, place: Path, tmp_path: Path) -> None:
    settings = (
        'model = "scripted"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
        f'base_url = "{agent_url}/v1"\nenv_key = "LOCAL_KEY"\nwire_api = "responses"\n'
    )
    (tmp_path / "config.toml").write_text(settings)
    env = os.environ | {"CODEX_HOME": str(tmp_path), "LOCAL_KEY": "unused"}
    command = [program("@openai/codex", "codex"), "exec", "--skip-git-repo-check", "--json", "use the shell"]
    done = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    texts = json.dumps(events)
    assert "from-the-shell" in texts and "All done here." in texts, (done.stdout[-2000:], done.stderr[-2000:])


def test_qwen_code(agent_url: str, place: Path, tmp_path: Path) -> None:
    env = os.environ | {"OPENAI_API_KEY": "unused", "OPENAI_BASE_URL": f"{agent_url}/v1"}
    env |= {"OPENAI_MODEL": "scripted", "HOME": str(tmp_path)}
    command = [
        program("@qwen-code/qwen-code", "qwen"),
        "-p",
        "list the folder",
        "--auth-type",
        "openai",
        "--approval-mode",
        "yolo",
    ]
    done = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )
    assert "All done here." in done.stdout, (done.stdout[-2000:], done.stderr[-2000:])


def test_openai_js(agent_url: str, tmp_path: Path) -> None:
    if not (FOLDER / "openai").exists():
        pytest.skip("npm install openai")
    script = tmp_path / "ask.mjs"
    (tmp_path / "node_modules").symlink_to(FOLDER.resolve())
    script.write_text(f'''
import OpenAI from "openai";
const client = new OpenAI({{baseURL: "{agent_url}/v1", apiKey: "unused"}});
const parameters = {{type: "object", properties: {{cmd: {{type: "string"}}}}}};
const tools = [{{type: "function", function: {{name: "exec_command", parameters}}}}];
const messages = [{{role: "user", content: "use the shell"}}];
const stream = client.chat.completions.stream({{model: "scripted", temperature: 0, tools, messages}});
const chat = await stream.finalChatCompletion();
const response = await client.responses.create({{model: "scripted", input: "hello", temperature: 0}});
console.log(JSON.stringify([chat.choices[0].message.tool_calls[0].function, response.output_text]));
''')
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, timeout=120)
    called, text = json.loads(done.stdout) if done.stdout else pytest.fail(done.stderr)
    assert json.loads(called["arguments"]) == {"cmd": "echo from-the-shell"} and text == "You said: hello"
