"""Run by `test_resting.py`, in a process of its own: METHOD prints accepted tokens and texts of each way as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from benchmarks.vllm_inside import speculative, started

WAYS = ("rests", "reads", "forgets")
LENGTHS = (*[0] * 15, *[4] * 5, 0, 2, *[0] * 9, 1)


def main() -> None:
    """Texts of `LENGTHS` with a drafter that rests, with one that reads every token, and with one whose rest is thrown away."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to stderr
    llm = started(speculative(sys.argv[1], 4))
    from vllm import SamplingParams  # type: ignore[reportAttributeAccessIssue]

    from outrider.assets import HERE
    from outrider.integrations.vllm import plain_steps
    from outrider.integrations.vllm.lengths import Cycle, SeenStep
    from outrider.integrations.vllm.rest import Resting, Waiting

    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    resting, before, plain = runner.drafter.propose, Waiting.before, plain_steps.needs_no_drafter
    assert isinstance(resting, Resting)
    rows = (HERE / "pycode" / "prompts.jsonl").read_text().splitlines()[:8]
    out: dict[str, Any] = {}
    for way in WAYS:
        accepted: list[list[int]] = []

        class Counted(Cycle):
            def saw(self, step: SeenStep, accepted: list[list[int]] = accepted) -> None:
                accepted.append(list(step.accepted))

        runner.drafter.propose = resting.inner if way == "reads" else resting
        plain_steps.needs_no_drafter = (lambda _: False) if way == "reads" else plain
        Waiting.before = (lambda self, names, positions: [[] for _ in names]) if way == "forgets" else before
        core.scheduler.lengths = Counted(list(LENGTHS))
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
        done = llm.generate([json.loads(row)["prompt"] for row in rows], params, use_tqdm=False)
        texts = [list(o.outputs[0].token_ids) for o in done]
        out[way] = {"accepted": accepted, "texts": texts}
    print(json.dumps(out), file=reply, flush=True)


if __name__ == "__main__":
    main()
