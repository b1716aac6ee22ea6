"""Conversations in files: the shapes in which data sets hold them, as messages for a chat template. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.errors import ConfigError

ROLES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks, by the names that data sets have for it."""
KEPT = ("name", "tool_call_id", "tool_calls", "reasoning_content")
"""What a message may have besides role and content that templates read."""


TEMPLATE_SECONDS = 20.0
"""Processor time that a chat template may take."""
MOST_TEXT = 1 << 24
"""Most characters of a conversation as its template writes it: several times the longest context there is."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them: role, content (text), and what else `KEPT` names."""

    messages: tuple[dict[str, Any], ...]

    @property
    def text(self) -> str:
        """The contents, one per line: for models without a template."""
        return "\n".join(m["content"] for m in self.messages)

    def said(self, role: str, text: str) -> Conversation:
        """The conversation with another message."""
        return Conversation((*self.messages, {"role": role, "content": text}))

    @property
    def asked(self) -> Conversation:
        """The messages up to the last one that an answer follows. Raises ValueError if there is none."""
        last = max((i for i, m in enumerate(self.messages) if m["role"] != "assistant"), default=-1)
        if last < 0 or all(m["role"] == "system" for m in self.messages[: last + 1]):
            raise ValueError("no message of a user in it")
        return Conversation(self.messages[: last + 1])


def conversation_in(row: Mapping[str, Any]) -> Conversation | None:
    """The conversation of a row: its `messages`, ShareGPT's `conversations`, a `prompt` of messages, or the messages of the `body`
    of a line for OpenAI's batches; None if it has none. Raises ValueError for one that cannot be read."""
    body = row.get("body")
    if isinstance(body, Mapping) and isinstance(body.get("messages"), list):
        return conversation_in(body)
    found = next((row[key] for key in ("messages", "conversations", "prompt") if isinstance(row.get(key), list)), None)
    if not found:
        return None
    talk = _conversation(found)
    if talk.messages[-1]["role"] == "assistant" and answer_in(row) is not None:
        raise ValueError("its conversation ends with an answer, and there is a `completion` too: leave out one of them")
    return talk


def answer_in(row: Mapping[str, Any]) -> str | None:
    """The answer that a row gives apart from its prompt: its `completion`, a text or one message of the assistant; None if there is
    none. Raises ValueError for one that cannot be read."""
    given = row.get("completion")
    if given is None or isinstance(given, str):
        return given or None
    said = _conversation(given).messages if isinstance(given, list) and given else ()
    if len(said) != 1 or said[0]["role"] != "assistant":
        raise ValueError("its `completion` is neither a text nor one message of the assistant")
    return str(said[0]["content"]) or None


def _conversation(found: Sequence[Any]) -> Conversation:
    return Conversation(tuple(_message(m, i) for i, m in enumerate(found, 1)))


def _message(found: Any, number: int) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"message {number} is no object")
    said = found.get("role", found.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"message {number} has the role {str(said)[:40]!r}; known: {', '.join(ROLES)}")
    content = _text(found.get("content", found.get("value")), number, role == "assistant")
    kept = {k: found[k] for k in KEPT if found.get(k)}
    if "tool_calls" in kept:
        calls = kept["tool_calls"]
        if not isinstance(calls, list):
            raise ValueError(f"message {number} has tool_calls that are no list")
        kept["tool_calls"] = [_call(call, number) for call in calls]
    return {"role": role, "content": content, **kept}


def _call(found: Any, number: int) -> dict[str, Any]:
    """A call with its arguments as an object, as templates write them; what is no object is left as it stands."""
    function = found.get("function") if isinstance(found, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"message {number} has a call without a `function`")
    arguments = function.get("arguments")
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**found, "function": {**function, "arguments": arguments}}


def _text(content: Any, number: int, may_be_empty: bool) -> str:
    if isinstance(content, str):
        return content
    if (content is None or content == []) and may_be_empty:  # it calls a tool and says nothing
        return ""
    if not isinstance(content, list) or not content:
        raise ValueError(f"message {number} has no text")
    texts = list[str]()
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise ValueError(f"message {number} has a part that is no text, such as an image, which is not read here")
        texts.append(text)
    return "".join(texts)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


_TRIAL = "a text that no template has"


def as_read(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **chosen: Any) -> list[dict[str, Any]]:
    """Messages as the tokenizer's chat template reads them: texts as they are, or as lists of one typed part where it would drop
    texts without a word, as templates of models that read images do (Idefics 3, SmolVLM, LLaVA, Janus).

    Which, is found out by a trial with one message. chosen: `chat_template`, if another one than the tokenizer's is used.
    """
    found = [dict(message) for message in messages]
    texts = [message for message in found if isinstance(message.get("content"), str)]
    if texts and _drops_texts(tokenizer, chosen):
        for message in texts:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return found


def _drops_texts(tokenizer: Any, chosen: Mapping[str, Any]) -> bool:
    """Whether a text is lost that a typed part would show."""
    if "type" not in str(chosen.get("chat_template") or getattr(tokenizer, "chat_template", "")):
        return False  # it cannot tell parts from each other

    def shows(content: Any) -> bool:
        try:
            return _TRIAL in str(
                tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, **chosen)
            )
        except Exception:  # templates raise what they like
            return False

    return not shows(_TRIAL) and shows([{"type": "text", "text": _TRIAL}])


def rendered_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a conversation by the tokenizer's chat template, a program of whoever made the model: it has TEMPLATE_SECONDS (in
    the main thread; elsewhere nothing can end it) and writes at most MOST_TEXT. Raises what the template raises.

    options: what the template gets besides.
    """
    chosen = {"chat_template": options["chat_template"]} if options.get("chat_template") else {}
    with _ended_in_time():
        read = as_read(tokenizer, messages, **chosen)
        text = str(tokenizer.apply_chat_template(read, tokenize=False, **options))
    if len(text) > MOST_TEXT:
        raise ValueError(f"it writes {len(text)} characters, more than any model reads")
    return text


@contextlib.contextmanager
def _ended_in_time() -> Iterator[None]:
    """Raises TimeoutError inside when the time is over, and again as long as it is caught there."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {TEMPLATE_SECONDS:.0f} seconds")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """The prompt of a conversation, with the opening of the answer, by the model's own template. Raises ConfigError, which begins
    with `where`, for one that the template refuses."""
    try:
        text = rendered_text(tokenizer, messages, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception as error:  # templates are programs of the model's makers and raise what they like
        raise ConfigError(f"{where}: the target's chat template refuses it ({str(error)[:200]})") from None


def whole_text(tokenizer: Any, conversation: Conversation) -> str:
    """A conversation with its answers, as the template writes it; without the token that begins a text, which encoding adds. Raises
    ValueError for one that the template refuses."""
    try:
        text = rendered_text(tokenizer, conversation.messages)
    except Exception as error:  # as above
        raise ValueError(f"the target's chat template refuses it ({str(error)[:200]})") from None
    begin = getattr(tokenizer, "bos_token", None) or getattr(tokenizer, "special", {}).get("bos_token")  # of GGUF files
    return text.removeprefix(begin) if isinstance(begin, str) and begin else text
