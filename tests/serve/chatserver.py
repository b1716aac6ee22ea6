"""A chat model that says what a test tells it to: a target of a script, a template of each notation, and a server around it.

    python -m tests.serve.chatserver PORT NAME [SCRIPTS]

NAME: a template below. The reply to a conversation is what `SCRIPTS` holds for the last message of the user, or an echo of it.
SCRIPTS: more of them, as JSON.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from outrider.build import Engine
from outrider.models.toy import TableTarget
from outrider.protocols import KVCache
from outrider.types import Rows, Scores
from outrider.verify import load_rule
from tests.contract.scripted import Budgets, Scripted
from tests.dialects.tokens import byte_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
_HEAD = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{- m.content }}"
)
_TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}THINK{% endif %}"
_TOOLS = "{%- if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
_CALLS = "{%- for c in m.tool_calls or [] %}"
HERMES = (
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson)'
    " + '}\n</tool_call>' }}{% endfor %}"
)
CODER = (
    "{{ '\n<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}"
)
TEMPLATES = {
    "plain": _HEAD + _TAIL.replace("THINK", ""),
    "hermes": _TOOLS + _HEAD + _CALLS + HERMES + _TAIL.replace("THINK", ""),
    "coder": _TOOLS + _HEAD + _CALLS + CODER + _TAIL.replace("THINK", ""),
    "thinker": _TOOLS + _HEAD + _CALLS + HERMES
    + _TAIL.replace("THINK", "{{ '<think>\n' if enable_thinking is not false else '<think>\n\n</think>\n\n' }}"),
}  # fmt: skip
SCRIPTS: dict[str, str] = {}
"""What is said to a text of the user."""


def chat_tokenizer(name: str) -> Any:
    """A transformers tokenizer of bytes and marks with a template."""
    from transformers import PreTrainedTokenizerFast

    core = byte_tokenizer(["<think>", "</think>", "<tool_call>", "</tool_call>"], [START])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)
    made.chat_template = TEMPLATES[name]
    return made


class ScriptTarget(TableTarget):
    """Says what `script(prompt, said)` wants next, token by token; a random bias of size `noise` depends on the last tokens."""

    def __init__(
        self,
        vocab: int,
        script: Callable[[list[int]], int],
        noise: float = 0.0,
        sure: float = 30.0,
        likes: Sequence[int] = (),
    ) -> None:
        """likes: tokens that it prefers where it may not say what it wants, the last one most."""
        super().__init__(
            torch.zeros(vocab, vocab), max_length=1 << 20
        )  # agents' prompts have 80,000 bytes, each a token
        self.base = torch.zeros(vocab, dtype=torch.float64)
        for i, token in enumerate(likes):
            self.base[token] = i + 1.0
        self.script, self.noise, self.sure = script, noise, sure
        self._dice = torch.randn(97, vocab, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        logits = self.base.repeat(rows.count, 1)
        scored = set(rows.scored.tolist())
        tokens = rows.token.tolist()
        for s in rows.segments:
            own = rows.token[s.first : s.first + s.count].to(self.dtype)[:, None, None]
            held = kv.write(0, s.slot, s.cached, own, own)[0][0, :, 0]  # type: ignore[attr-defined]
            wanted = [i for i in range(s.count) if s.first + i in scored]
            before = held[: s.cached].long().tolist() if wanted else []
            for i in wanted:
                path, at = list[int](), i
                while at >= s.fed:
                    path.append(tokens[s.first + at])
                    up = s.parent[at - s.fed]
                    at = up if up >= 0 else s.fed - 1
                own = [*before, *tokens[s.first : s.first + at + 1], *reversed(path)]
                logits[s.first + i] += self.noise * self._dice[hash(tuple(own[-3:])) % 97]
                logits[s.first + i, self.script(own)] += self.sure
        return Scores(logits[rows.scored], tuple(logits for _ in layers))


def scripted(tokenizer: Any) -> Callable[[list[int]], int]:
    """The next token after a path: of the script of the last user text, as far as it was followed; else the end."""
    end, start = tokenizer.convert_tokens_to_ids([END, START])
    core = tokenizer.backend_tokenizer  # transformers' own `decode` looks at each id of a prompt of thousands in Python

    def script(path: list[int]) -> int:
        asked, said = _last_turn(core.decode(_tail(path, start), skip_special_tokens=False))
        if asked is None:
            asked, said = _last_turn(core.decode(path, skip_special_tokens=False))
        role, words = asked or ("", "")
        reply = SCRIPTS.get(words) or _known(words) or (SCRIPTS.get("*tool") if role == "tool" else None)
        reply = reply or f"You said: {words[:80]}"
        if said.startswith("<think>\n") and not reply.startswith("<think>"):
            skipped = "<think>\n\n</think>\n\n"
            said = said.removeprefix(skipped if said.startswith(skipped) else "<think>\n")
        if not reply.startswith(said) or said == reply:
            return end
        return core.encode(reply[len(said) :], add_special_tokens=False).ids[0]

    return script


def _tail(path: list[int], start: int) -> list[int]:
    """The last two turns of a path: what was said before, and the reply so far."""
    back, size = path[::-1], len(path)
    if back.count(start) < 2:
        return path
    return path[size - 1 - back.index(start, back.index(start) + 1) :]


def _last_turn(text: str) -> tuple[tuple[str, str] | None, str]:
    """Role and text of the last turn of a user or a tool, None if there is none, and what was said after it."""
    prompt, _, said = text.rpartition(f"{START}assistant\n")
    turns = re.findall(r"<\|im_start\|>(user|tool)\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    return (turns[-1] if turns else None), said


def _known(asked: str) -> str | None:
    """The script of a text that an agent has put among others."""
    return next((reply for name, reply in SCRIPTS.items() if len(name) > 10 and asked.rstrip().endswith(name)), None)


def chat_engine(
    name: str,
    slots: int = 4,
    noise: float = 0.0,
    sure: float = 30.0,
    drafts: bool = True,
    length: int = 6000,
    rule: str = "speculative_sampling",
) -> Engine:
    """An engine that drafts the script, with every fifth token wrong."""
    tokenizer = chat_tokenizer(name)
    script = scripted(tokenizer)
    vocab = len(tokenizer)
    likes = [tokenizer.convert_tokens_to_ids(t) for t in ("1", "}", '"', "<tool_call>", END, "</think>")]

    def guess(view: Any, k: int) -> list[int]:
        path, out = list(view.tokens), list[int]()
        for i in range(k):
            token = script(path) if (len(path) + i) % 5 else 3
            out.append(token)
            path.append(token)
        return out

    parts = (ScriptTarget(vocab, script, noise, sure, likes), Scripted(guess, 4), load_rule(rule))
    return Engine(
        *parts, Budgets(lambda s: 4 if drafts else 0), slots=slots, max_length=length, tokenizer=tokenizer,
        eos=[tokenizer.convert_tokens_to_ids(END)],
    )  # fmt: skip


def main(port: int, name: str, scripts: Sequence[str] = ()) -> None:
    """Serve on a port until ended."""
    import json

    from outrider.serve.app import create_app
    from outrider.serve.server import server_for
    from outrider.serve.settings import Settings
    from tests.serve.harness import rewired

    SCRIPTS.update(json.loads(scripts[0]) if scripts else {})
    settings = Settings("scripted", grace=1.0)
    server_for(
        create_app(rewired(chat_engine(name, length=120_000)), settings, adaptive=False), settings, "127.0.0.1", port
    ).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
