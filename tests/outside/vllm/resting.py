"""Run by `test_resting.py`, in a process of its own: METHOD FOLDER prints accepted tokens and texts of each way as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

WAYS = ("rests", "reads", "forgets")
LENGTHS = (*[0] * 15, *[4] * 5, 0, 2, *[0] * 9, 1)


def main() -> None:
    """Texts of `LENGTHS` with a drafter that rests, with one that reads every token, and with one whose rest is thrown away."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to stderr
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams  # type: ignore[reportAttributeAccessIssue]

    from outrider.assets import HERE, shipped
    from outrider.integrations.vllm import plain_steps
    from outrider.integrations.vllm.lengths import Cycle, SeenStep
    from outrider.integrations.vllm.rest import Resting, Waiting

    method, folder = sys.argv[1:]
    llm = LLM(
        model=str(shipped("target")),
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        scheduler_cls="outrider.integrations.vllm.Scheduler",
        worker_cls="outrider.integrations.vllm.CpuWorker",
        speculative_config={
            "method": method,
            "model": str(shipped("target").parent / folder),
            "num_speculative_tokens": 4,
            "num_speculative_tokens_per_batch_size": [[1, 8, 4]],
        },
    )
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
