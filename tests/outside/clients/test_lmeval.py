"""lm-eval's own client of completions: log-likelihoods are those of its own Hugging Face model, generation is greedy decoding."""

from __future__ import annotations

import math

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from tests.outside.clients.conftest import PAIR

PAIRS = [("def add(a, b):\n    return", " a + b\n"), ("import os\n", "import sys\n"), ("for i in", " range(10):"), ("x =", " 1"),
         ("class A:\n    def __init__(self", "):\n        pass"), ("return", " zebra crossing")]  # fmt: skip


def asked(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_likelihoods_are_those_of_transformers(pair_url: str) -> None:
    served = get_model("local-completions")(model="pycode", base_url=f"{pair_url}/v1/completions", tokenizer_backend="remote",
                                            tokenized_requests=True, num_concurrent=1, batch_size=2, max_retries=1)  # fmt: skip
    here = get_model("hf")(pretrained=PAIR, dtype="float32", device="cpu", batch_size=1)
    given = served.loglikelihood(asked("loglikelihood", PAIRS))
    own = here.loglikelihood(asked("loglikelihood", PAIRS))
    for (a, greedy), (b, too), pair in zip(given, own, PAIRS, strict=True):
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-3) and greedy == too, (pair, a, b)
    assert len({round(a, 3) for a, _ in given}) == len(PAIRS)  # a control: they differ from one another


def test_generation_is_greedy_decoding(pair_url: str) -> None:
    served = get_model("local-completions")(model="pycode", base_url=f"{pair_url}/v1/completions", tokenizer_backend="remote",
                                            tokenized_requests=False, num_concurrent=1, max_retries=1)  # fmt: skip
    here = get_model("hf")(pretrained=PAIR, dtype="float32", device="cpu", batch_size=1)
    how = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    texts = [(context, dict(how)) for context, _ in PAIRS[:3]]
    assert served.generate_until(asked("generate_until", texts)) == here.generate_until(asked("generate_until", texts))
