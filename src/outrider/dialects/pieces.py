"""What a reader makes of a model's text, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a reply. text: of reasoning or content; the name of a call that begins; or the next part of its arguments.

    call: the number of the call in the reply, from 0; -1 for text. id: the call's own id, if the model wrote one.
    """

    kind: Kind
    text: str
    call: int = -1
    id: str | None = None


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same pieces with neighbours of one kind and call joined, and empty ones left out (but not the arguments' first)."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if last and piece.kind != "call" and (last.kind, last.call) == (piece.kind, piece.call):
            out[-1] = Piece(last.kind, last.text + piece.text, last.call)
        elif piece.text or piece.kind == "call":
            out.append(piece)
    return out


def overlap(text: str, marker: str) -> int:
    """Characters at the end of `text` that may be the beginning of `marker`."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if marker.startswith(text[-n:])), 0)
