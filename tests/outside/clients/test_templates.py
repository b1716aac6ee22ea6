"""The templates of real models in trl's wheel: their notations are detected, and what they write is read back as it was given."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from outrider.dialects.detect import detect
from outrider.dialects.formats import FORMATS
from outrider.dialects.harmony import HarmonyReader
from outrider.dialects.pieces import Piece
from outrider.dialects.reader import Reader, Thinking

jinja = pytest.importorskip("transformers.utils.chat_template_utils")
if "OUTRIDER_TRL" not in os.environ:  # the folder of the package, of which only files are read
    pytest.skip("make test-templates", allow_module_level=True)
FOLDER = Path(os.environ["OUTRIDER_TRL"]) / "chat_templates"
EXPECTED = {
    "deepseekv3": "deepseek_v3", "gemma4": "gemma4", "gemma4_v5": "gemma4", "glm4moe": "glm", "gptoss": "gpt_oss",
    "lfm2_v2": "lfm2", "llama3_1": "llama3", "llama3_2": "llama3", "nemotron_3_nano": "qwen3_coder", "qwen2_5": "hermes",
    "qwen3": "hermes", "qwen3_5_think": "qwen3_coder", "qwen3_5_nothink": "qwen3_coder", "qwen3_vl": "hermes",
    "gemma": None, "llama3": None, "phi3": None, "cohere": None,
}  # fmt: skip
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["place"],
}
ENDS = (
    "<|im_end|>",
    "<turn|>",
    "<|eot_id|>",
    "<EOS>",
    "<｜end▁of▁sentence｜>",
    "<|call|>",
    "<|tool_response>",
    "<|observation|>",
)


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    given = {"add_generation_prompt": False, **options}
    return jinja.render_jinja_template(
        [messages], chat_template=template, bos_token="<BOS>", eos_token="<EOS>", **given
    )[0][0]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_real_template(name: str) -> None:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    dialect = detect(lambda messages, **options: rendered(template, messages, **options), template)
    assert dialect.form == EXPECTED[name]
    if dialect.form is None:
        return
    arguments = {"place": 'a "q" b', "n": 7}
    names = ["first_f", "second_f"][: 2 if dialect.parallel else 1]
    tools = [{"type": "function", "function": {"name": n, "description": "d", "parameters": PARAMETERS}} for n in names]
    given = json.dumps(arguments) if dialect.texts else arguments
    calls = [
        {"id": f"call1234{i}", "type": "function", "function": {"name": n, "arguments": given}}
        for i, n in enumerate(names)
    ]
    user = {"role": "user", "content": "hi"}
    prompt = rendered(template, [user], tools=tools, add_generation_prompt=True)
    whole = rendered(template, [user, {"role": "assistant", "content": "Sure.", "tool_calls": calls}], tools=tools)
    before = os.path.commonprefix([prompt, whole])  # noqa: RUF071 (texts, no paths)
    reply = whole[len(before) :]
    for end in ENDS:
        reply = reply.split(end)[0] if end in reply[-40:] else reply
    thinking = dialect.thinks(prompt)
    if thinking is not None and len(before) < len(prompt):
        thinking = Thinking(thinking.open, thinking.close)
    schemas = dict.fromkeys(names, PARAMETERS)
    for seed in range(5):
        reader: Any = HarmonyReader() if dialect.form == "gpt_oss" else Reader(FORMATS[dialect.form], thinking, schemas)
        cuts, at, pieces = random.Random(seed), 0, list[Piece]()
        while at < len(reply):
            size = cuts.randint(1, 9) if seed else len(reply)
            pieces += reader.feed(reply[at : at + size])
            at += size
        pieces += reader.finish()
        made = [
            (p.text, json.loads("".join(q.text for q in pieces if q.kind == "arguments" and q.call == p.call)))
            for p in pieces
            if p.kind == "call"
        ]
        assert made == [(n, arguments) for n in names], reply
