"""A drafter of one's own in twenty lines: it proposes that the last line of code is repeated. Any rule, any batch."""

import torch

from outrider import Engine, SamplingParams
from outrider.types import Draft


class RepeatLine:
    """Proposes the tokens that followed the previous newline. Point masses: lossless whatever they are."""

    name, layers, trees, max_nodes, max_depth = "repeat-line", (), False, 6, 6

    def bind(self, slots, length):
        pass

    def release(self, slots):
        pass

    def draft(self, evidence, budget):
        chains = []
        for view, depth in zip(evidence.sequences, budget, strict=True):
            text = view.tokens
            same = [i for i in range(len(text) - 1) if text[i] == text[-1]]
            chains.append(text[same[-1] + 1 :][:depth] if same else [])
        starts = [sum(map(len, chains[:b])) for b in range(len(chains))]
        parent = tuple(s + i - 1 if i else -1 for s, c in zip(starts, chains, strict=True) for i in range(len(c)))
        token = torch.tensor([t for c in chains for t in c], dtype=torch.int64)
        return Draft(token, parent, tuple(map(len, chains)))


def main() -> None:
    engine = Engine.build(draft=RepeatLine(), length=6, slots=2)
    for result in engine.generate(
        ["import os\nimport sys\n", "x = [1, 2, 3]\n"], SamplingParams(seed=0, max_tokens=48)
    ):
        print(result.text, "\n---")
    print(f"accepted {engine.counts.accepted} of {engine.counts.proposed} proposed")


if __name__ == "__main__":
    main()
