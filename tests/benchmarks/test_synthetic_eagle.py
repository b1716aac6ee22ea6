"""Acceptance that is set: every step of another drafter keeps what the draft model's kept, and the text stays the target's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from outrider.build import build_engine, companion
from outrider.params import SamplingParams

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The benchmark and the maker of pairs, as modules: scripts import their neighbours by bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = []
    for name in ("synthetic", "synthetic_eagle"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        made.append(module)
    return made[0], made[1]


def test_a_script_gives_the_text_up_to_its_first_wrong_token(scripts) -> None:
    script = scripts[1].Script(text=(9, 9, 1, 2, 3, 4, 5), lengths=[3, 6])
    assert script.tokens(3, 4, 10) == [2, 3, 5, 6]  # two of the draft are kept, then comes the target's own token
    assert script.tokens(6, 2, 10) == [6, 1]  # none, and what is behind the text is anything
    assert scripts[1].Script(text=(1, 2, 3), lengths=[1]).tokens(1, 3, 4) == [2, 0, 1]


def test_every_step_keeps_what_the_draft_models_kept(scripts, tmp_path: Path) -> None:
    """Control: the same drafter's own tokens are accepted nowhere."""
    synthetic, bench = scripts
    size = synthetic.Size(layers=8, hidden=64, heads=4, inner=128, vocab=256)
    with torch.no_grad():
        pair = synthetic.Pair(size)
        pair.set(0.3, 4.0)
        for role, model in (("target", pair.target), ("draft", pair.draft)):
            synthetic.save(model, tmp_path / f"{role}-bfloat16", "bfloat16", size.vocab)
    plain = build_engine(tmp_path / "target-bfloat16", "none", slots=1, max_length=96)
    prompts = [torch.randint(256, (8,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)]
    texts = [r.outputs[0].token_ids for r in plain.generate(prompts, GREEDY)]

    model = companion(plain, str(tmp_path / "draft-bfloat16"), length=3)
    written = bench.write_down(model, prompts, GREEDY)
    for prompt in prompts:
        model.generate([prompt], GREEDY)
    known = model.counts
    assert 0 < known.accepted < known.judged
    target = plain.parts.target
    for name in bench.SHAPES:
        folder = bench.eagle_folder(tmp_path, name, target)
        eagle = companion(plain, f"eagle:{folder}", length=3)
        own = [eagle.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts]
        assert own == texts and eagle.counts.accepted < 0.2 * known.accepted
        eagle.reset()
        bench.rehearse(eagle, written, 8)
        assert [eagle.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts] == texts
        assert eagle.counts.accepted_at == known.accepted_at and eagle.counts.steps == known.steps
        size_of_level, draft = bench.eagle_alone(folder, target, 3)
        draft()
        assert size_of_level > 0
