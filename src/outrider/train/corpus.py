"""Training texts from files, folders and JSON lines. A bad row is an error with its line, or is skipped and counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from outrider.conversations import Conversation, answer_in, conversation_in
from outrider.errors import ConfigError
from outrider.files import first_is_object, read_bytes
from outrider.train.data import MAX_BYTES, Document, deduplicate, find_documents, normalise


def read_corpus(
    paths: str | Path | Sequence[str | Path],
    *,
    pattern: str = "*",
    skip_bad: bool = False,
    render: Callable[[Conversation], str] | None = None,
    report: Callable[[str], None] = print,
) -> list[Document]:
    """The texts of `paths`, each distinct one once, in a fixed order.

    A folder gives all its readable files that match `pattern`. A `.jsonl` file gives a text per row: its `text`, its
    `prompt`, or its conversation (`messages`, `conversations`) as `render` writes it (None: its contents, one per line). A
    `completion` follows its prompt: as the answer of that conversation, or without `render` as one text with it. Any other
    file is one text. A pipe is read once; it gives rows if its first line is an object of JSON. A row that is none of these raises
    ConfigError with file and line, unless `skip_bad`.
    """
    found: list[Document] = []
    paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in paths:
        if path.is_dir():
            found += find_documents(path, pattern)
        elif not path.exists():
            raise ConfigError(f"{path}: no such file or folder; name text files, JSON lines or folders of text")
        elif path.is_file() and path.suffix == ".jsonl":
            with path.open("rb") as lines:
                found += _rows(path, lines, skip_bad, render, report)
        else:
            data = read_bytes(path, MAX_BYTES)
            if not path.is_file() and first_is_object(data):
                found += _rows(path, io.BytesIO(data), skip_bad, render, report)
                continue
            text = normalise(data)
            if text is None:
                raise ConfigError(f"{path}: not UTF-8 text, or empty")
            found.append(Document(path.name, text))
    if not found:
        raise ConfigError(f"no text found in {', '.join(map(str, paths))}: check the paths and the pattern {pattern!r}")
    return deduplicate(found)


def _rows(
    path: Path,
    lines: BinaryIO,
    skip_bad: bool,
    render: Callable[[Conversation], str] | None,
    report: Callable[[str], None],
) -> Iterator[Document]:
    bad = 0
    size = 0
    for number, line in enumerate(iter(lambda: lines.readline(MAX_BYTES + 1), b""), 1):
        if (size := size + len(line)) > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB; split it")
        if not line.strip():
            continue
        try:
            yield Document(f"{path.name}:{number}", _text(line, render))
        except ValueError as error:
            if not skip_bad:
                raise ConfigError(f"{path}:{number}: {error}; mend it, or skip bad rows") from None
            bad += 1
    if bad:
        report(f"{path.name}: {bad} bad rows skipped")


def _text(line: bytes, render: Callable[[Conversation], str] | None) -> str:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({str(error)[:200]})") from None
    if not isinstance(row, dict):
        raise ValueError("not an object with `text`, `prompt` or `messages`")
    if isinstance(row.get("text"), str) and row["text"].strip():
        return row["text"]
    prompt, answer = row.get("prompt"), answer_in(row)
    if isinstance(prompt, str) and prompt.strip():
        if answer is None or render is None:
            return prompt + (answer or "")
        return render(Conversation(()).said("user", prompt).said("assistant", answer))
    talk = conversation_in(row)
    if talk is not None and talk.text.strip():
        talk = talk if answer is None else talk.said("assistant", answer)
        return talk.text if render is None else render(talk)
    raise ValueError("no `text`, `prompt`, `messages` or `conversations` with text")
