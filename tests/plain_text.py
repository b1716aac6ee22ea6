"""One check for all drafters that a folder holds: greedy text is the target's, whatever is drafted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.build import build_engine
from outrider.params import SamplingParams

PROMPTS = ("the line", "a", "of many")


def assert_plain_text(
    target: str | Path,
    drafts: Sequence[str],
    *,
    prompts: Sequence[str | list[int]] = PROMPTS,
    tokens: int = 12,
    proposed: int = 0,
    **options: Any,
) -> None:
    """Decode greedily without drafts and with each of `drafts`: the same tokens, and more than `proposed` were proposed each time.

    tokens: of each text. options: of `build_engine`; without them weights are float32, so that no tie is broken by rounding.
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    texts = {}
    for draft in ("none", *drafts):
        one = build_engine(target, draft, **{"dtype": "float32", "slots": len(prompts)} | options)
        texts[draft] = [result.outputs[0].token_ids for result in one.generate(prompts, greedy)]
        assert all(len(text) == tokens for text in texts[draft])
        assert texts[draft] == texts["none"], draft
        assert draft == "none" or one.counts.proposed > proposed, draft
