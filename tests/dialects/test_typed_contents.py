"""Chat templates that read contents as lists of typed parts alone: they drop texts without a word, so texts are given as parts."""

from __future__ import annotations

from typing import Any

import pytest

from outrider.conversations import Conversation, as_read, prompt_ids, whole_text
from outrider.serve.prep_worker import rendered
from tests.checkpoints_images import byte_tokenizer

TYPED = {
    "idefics3": (
        "{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}"
        "{{ ': ' }}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "janus": (
        "{% for m in messages %}<{{ m['role'] }}>: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'].strip() }}"
        "{% endif %}{% endfor %}\n{% endfor %}"
    ),
}
PLAIN = {
    "texts": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "both": (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    ),
    "raising": "{% if messages[0].content is string %}{{ raise_exception('type of content') }}{% endif %}",
}
ASKED = [
    {"role": "user", "content": "a red boat"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": ""},
]


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer("llava", ["<image>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", list(TYPED))
def test_no_text_is_lost_in_a_template_of_typed_parts(name: str) -> None:
    tokenizer = tokenizer_with(TYPED[name])
    lost = tokenizer.apply_chat_template(ASKED[:2], tokenize=False)
    assert "red boat" not in lost, "the control: the template drops texts"
    wanted = tokenizer.apply_chat_template(
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ASKED],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert "red boat" in wanted
    assert rendered(tokenizer, ASKED) == wanted
    assert prompt_ids(tokenizer, ASKED, "here") == tokenizer.encode(wanted, add_special_tokens=False)
    assert "red boat" in whole_text(tokenizer, Conversation(tuple(ASKED[:2])))


@pytest.mark.parametrize("name", list(PLAIN))
def test_templates_of_texts_get_texts(name: str) -> None:
    assert as_read(tokenizer_with(PLAIN[name]), ASKED) == ASKED


def test_parts_stay_parts_and_what_is_no_text_stays() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ]
    found = as_read(tokenizer_with(TYPED["idefics3"]), messages)
    assert [m["content"] for m in found] == [[{"type": "text", "text": "be brief"}], parts, None]
    assert messages[0]["content"] == "be brief", "the caller's are left as they were"


def test_a_template_of_the_request_counts_and_not_the_tokenizers() -> None:
    tokenizer = tokenizer_with(PLAIN["texts"])
    assert "red boat" in rendered(tokenizer, ASKED, chat_template=TYPED["idefics3"])
