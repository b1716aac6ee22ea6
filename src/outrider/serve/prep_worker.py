"""Preparation of a client's text before decoding: token ids, a conversation's prompt, a compiled grammar. Used in the server and,
as a program, in a process that can be killed: no library for it has limits that hold for every tokenizer, template and schema.

As a program it reads jobs and writes answers over its standard streams, each as JSON after its length; the first message gives the
tokenizer. It ends with its parent, after a job's time limit, and before it uses too much memory. It does not need torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from outrider.automata import Compiler, unspelled
from outrider.conversations import rendered_text
from outrider.dialects.detect import Dialect, detect
from outrider.errors import OutriderError, RequestError

NICE = 5
"""Niceness, so that the engine goes first when cores are few."""
Encode = Callable[[str, bool], list[int]]


def encoder(tokenizer: Any) -> Encode:
    """Text to ids by a Hugging Face tokenizer or similar; the flag adds the special tokens that begin or end a text."""
    return lambda text, special: list(
        tokenizer.encode(text) if special else tokenizer.encode(text, add_special_tokens=False)
    )


class Refused(RequestError):
    """The model's chat template refuses the messages."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the model's chat template refuses these messages ({name})")
        self.name = name


TAIL = 256
"""Characters of a prompt's end that are returned with it: they tell whether thinking is open."""


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of a conversation by the model's chat template, in transformers' immutable sandbox. Raises Refused.

    options: what the template gets besides: tools, add_generation_prompt, continue_final_message, and arguments of its own.
    """
    try:
        return rendered_text(tokenizer, messages, **{"add_generation_prompt": True, **options})
    except Exception as error:  # templates refuse orders of roles by raising, and are outside code
        said = " ".join(str(error).split())[:200] if type(error).__name__ == "TemplateError" else ""
        raise Refused(type(error).__name__ + (f": {said}" if said else "")) from None


def conversation(
    tokenizer: Any, messages: list[dict[str, Any]], special: bool, **options: Any
) -> tuple[list[int], str]:
    """The prompt of a conversation, and the end of its text. options: see `rendered`.

    special: let the tokenizer add its special tokens to the template's output, which usually has them already.
    """
    text = rendered(tokenizer, messages, **options)
    return encoder(tokenizer)(text, special), text[-TAIL:]


def template_of(tokenizer: Any) -> str:
    """The source of the tokenizer's chat template, of all of them if it has several; empty if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else template or ""


def dialect_of(tokenizer: Any) -> Dialect:
    """What the tokenizer's chat template can do."""
    template = template_of(tokenizer)
    if not template:
        return Dialect(None, why="it has no chat template")

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        return rendered(tokenizer, messages, **{"add_generation_prompt": False, **options})

    return detect(render, template)


class Work:
    """The jobs of one process. given: {"core": text of a tokenizer.json} or {"folder": where transformers reads it,
    or a GGUF file}, for texts; {"grammar": text of a tokenizer.json, "eos": ids that end a text} for grammars."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self._tokenizer: Any = None
        self._compiler: Compiler | None = None

    def prepare(self) -> dict[str, Any]:
        """Load what the jobs need, so that it does not count towards a job's time."""
        if "grammar" in self._given:
            self._compiler = Compiler(unspelled(self._given.pop("grammar")), self._given["eos"])
        else:
            given = self._given
            self._tokenizer = _Core(given.pop("core")) if "core" in given else _of_folder(given["folder"])
        return {}

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do one job. Its answer: {"ids"}, {"long": tokens of a text that is too long}, {"bad": a sentence}, {} for a grammar."""
        if job["do"] == "grammar":
            return self._grammar(job["text"])
        if job["do"] == "dialect":
            return {"dialect": dialect_of(self._tokenizer).as_json()}
        if job["do"] == "render":
            try:
                return {"text": rendered(self._tokenizer, job["messages"], **job["options"])}
            except Refused as error:
                return {"bad": error.name}
        if job["do"] == "chat":
            try:
                ids, tail = conversation(self._tokenizer, job["messages"], job["special"], **job["options"])
                return {**_bounded([ids], job["most"]), "tail": tail}
            except Refused as error:
                return {"bad": error.name}
        encode = encoder(self._tokenizer)
        return _bounded([encode(text, job["special"]) for text in job["texts"]], job["most"])

    def _grammar(self, text: str) -> dict[str, Any]:
        try:
            assert self._compiler is not None
            self._compiler.make(text)
        except OutriderError as error:
            return {"bad": str(error)}
        return {}


class _Core:
    """A tokenizer.json as `models.tokenizer.PlainTokenizer` reads it, without that module's imports."""

    def __init__(self, core: str) -> None:
        from tokenizers import Tokenizer

        self._core = Tokenizer.from_str(core)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids


def _of_folder(folder: str) -> Any:
    """The tokenizer of a folder or GGUF file that `models.tokenizer.load_tokenizer` has checked. Torch is not imported."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    if os.path.isfile(folder):
        from outrider.models.gguf.tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(Path(folder))
    from outrider.models.fast_tokenizer import read_fast_tokenizer

    return read_fast_tokenizer(folder)


def _bounded(ids: list[list[int]], most: int) -> dict[str, Any]:
    longest = max(map(len, ids))
    return {"ids": ids} if longest <= most else {"long": longest}


def read(stream: BinaryIO) -> Any:
    """Read one message; None if the other side has closed."""
    head = stream.read(4)
    return json.loads(stream.read(int.from_bytes(head))) if len(head) == 4 else None


def packed(message: Any) -> bytes:
    """The bytes of a message."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(4) + data


def limit_memory(size: int) -> None:
    """Limit this process's own memory, if the system supports it; larger allocations fail or end the process."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def main() -> None:
    """Do jobs until the parent has gone. Each has a time limit, after which the kernel ends this process."""
    from outrider.serve.supervisor import die_with_parent

    die_with_parent()
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output that a library prints must not be read as an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(NICE)
    work: Work | None = None
    while (job := read(jobs)) is not None:
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        try:
            if work is None:
                limit_memory(job["memory"])
                work = Work(job)
                answer = work.prepare()
            else:
                answer = work.do(job)
        except Exception as error:
            answer = {"failed": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(packed(answer))
        answers.flush()


if __name__ == "__main__":
    main()
