"""A byte-level tokenizer with the marks of chat models as added tokens, and random texts of a grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from outrider.automata import unspelled
from outrider.sampling.automaton import Automaton
from outrider.sampling.grammar import Grammars

END = "<|im_end|>"


def byte_tokenizer(marks: Sequence[str] = (), special: Sequence[str] = ()) -> Tokenizer:
    """256 bytes, the end token, marks (added tokens), and special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    core.add_tokens([AddedToken(m, special=False, normalized=False) for m in marks])
    core.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in special])
    return core


def grammars_for(core: Tokenizer) -> Grammars:
    return Grammars(unspelled(core.to_str()), core.get_vocab_size(), [core.token_to_id(END)])


def random_text(
    core: Tokenizer, automaton: Automaton, seed: int, most: int = 800, free: str = "", endings: Sequence[str] = ()
) -> list[int]:
    """Tokens of a random text that the grammar allows; where it may end, it does. free: written first, where all is allowed.
    endings: texts that end what may be of any length; one is written now and then, as far as it is allowed."""
    rng, out = random.Random(seed), list[int]()
    end, plenty = core.token_to_id(END), core.get_vocab_size() - 1
    ids = lambda text: core.encode(text, add_special_tokens=False).ids  # noqa: E731
    begun, planned = ids(free), list[int]()
    shown, closers = set(ids('abc012 "}],:')), set(ids('"}]')) | set(range(end + 1, plenty + 1))
    while len(out) < most:
        automaton.keep_up(out, 0)
        allowed = automaton.allowed([]).nonzero().flatten().tolist()
        if begun:
            assert begun[0] in allowed
            out.append(begun.pop(0))
            continue
        if end in allowed or len(allowed) >= plenty - 1:
            return out
        assert allowed, text_of(core, out)
        if not planned and endings and len(allowed) > 1 and rng.random() < 0.3:
            planned = ids(rng.choice(endings))
        if planned and planned[0] in allowed:
            out.append(planned.pop(0))
            continue
        planned = []
        few = [t for t in allowed if t in shown or t > end] or allowed
        closing = [t for t in few if t in closers] if rng.random() < 0.5 else []
        out.append(rng.choice(closing or few))
    raise AssertionError(text_of(core, out)[:2000])


def text_of(core: Tokenizer, tokens: Sequence[int]) -> str:
    return core.decode(list(tokens), skip_special_tokens=False)


def marks_of(core: Tokenizer) -> Any:
    """The token that a mark is, or None."""
    added = {t.content: i for i, t in core.get_added_tokens_decoder().items()}
    return added.get
