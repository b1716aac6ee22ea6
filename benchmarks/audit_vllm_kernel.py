"""vLLM's rejection sampler on the CPU, alone, on distributions that are known: where does the text's distribution go wrong?

    .venvs/vllm/bin/python benchmarks/audit_vllm_kernel.py

Every request has LENGTH drafts drawn from the draft distributions (or the most likely tokens). Whatever is drafted, the first
emitted token must have the target's distribution at the first position, and the second one, where the first draft was accepted,
that of the second position. Prints the total variation distance of what comes out, for several vocabulary sizes. Then the step
before it: the temperatures of the requests, spread over their draft tokens, which the target's logits are divided by.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import vllm._custom_ops  # noqa: F401 - loads the kernels
from vllm.platforms import current_platform
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens, rejection_sample

LENGTH, REQUESTS, ROUNDS = 3, 200, 40


def one(vocab: int, greedy: bool, noise: torch.Generator) -> tuple[list[float], float]:
    """Total variation at both positions, and the share of first drafts accepted (predicted less observed)."""
    target = 1.5 * torch.randn(LENGTH, vocab, generator=noise)
    target = target.contiguous()
    draft = (target + 0.7 * torch.randn(LENGTH, vocab, generator=noise)).softmax(-1)
    p = target.softmax(-1)
    seen = torch.zeros(2, vocab)
    kept = 0.0
    for _ in range(ROUNDS):
        if greedy:
            tokens = draft.argmax(-1).repeat(REQUESTS)
        else:
            tokens = torch.multinomial(draft, REQUESTS, replacement=True, generator=noise).T.reshape(-1)
        out = rejection_sample(
            tokens.to(torch.int32),
            [LENGTH] * REQUESTS,
            LENGTH,
            torch.arange(1, REQUESTS + 1, dtype=torch.int32) * LENGTH,
            None if greedy else draft.repeat(REQUESTS, 1).contiguous(),
            target.repeat(REQUESTS, 1).contiguous(),
            torch.zeros(REQUESTS, 1, dtype=torch.int32),
            SimpleNamespace(all_greedy=False, all_random=True, temperature=torch.ones(REQUESTS), generators={}),
        )
        seen[0] += torch.bincount(out[:, 0].long(), minlength=vocab)
        second = out[:, 1][out[:, 1] >= 0].long()
        seen[1] += torch.bincount(second, minlength=vocab)
        kept += len(second)
    distribution = seen / seen.sum(1, keepdim=True)
    best = draft.argmax(-1)[0]
    expected = float(p[0, best]) if greedy else float(torch.minimum(p[0], draft[0]).sum())
    return [float(0.5 * (distribution[i] - p[i]).abs().sum()) for i in (0, 1)], expected - kept / (ROUNDS * REQUESTS)


def main() -> None:
    """A table."""
    current_platform.register_triton_kernel_overrides()  # what a CPU worker does when it starts
    for vocab in (16, 64, 2048):
        for greedy in (True, False):
            noise = torch.Generator().manual_seed(vocab)
            (first, second), off = one(vocab, greedy, noise)
            p = (1.5 * torch.randn(LENGTH, vocab, generator=torch.Generator().manual_seed(vocab))).softmax(-1)[0]
            honest = torch.bincount(torch.multinomial(p, REQUESTS * ROUNDS, replacement=True), minlength=vocab)
            floor = float(0.5 * (honest / (REQUESTS * ROUNDS) - p).abs().sum())
            kind = "greedy drafts " if greedy else "sampled drafts"
            print(
                f"vocabulary {vocab:5d}, {kind}: TV first {first:.3f} (honest draws {floor:.3f}), second {second:.3f}, "
                f"acceptance off by {off:+.3f}"
            )
    torch.full((64,), 7.25)  # memory that the next small tensor is likely to get
    spread = expand_batch_to_tokens(torch.tensor([1.0, 0.5]), torch.tensor([3, 6], dtype=torch.int32), 6, -1, 1)
    print(f"temperatures 1.0 and 0.5 over 3 tokens each: {spread.tolist()}")


if __name__ == "__main__":
    main()
