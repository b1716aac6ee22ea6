"""The rollout in TRL's own GRPO trainer: text of the model as it is at each step, with the log-probabilities of that model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from outrider.assets import shipped
from outrider.errors import ConfigError
from outrider.integrations.trl import rollout


def trainer(tmp_path: Path, function: Any, **changes: Any) -> GRPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(shipped("target"), dtype=torch.float32)
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        learning_rate=1e-4, report_to=[], use_cpu=True, bf16=False, logging_steps=1, gradient_checkpointing=False, **changes,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "def main("}, {"prompt": "class Parser:\n"}] * 2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(shipped("target")))
    return GRPOTrainer(model, lambda completions, **_: [float(len(c)) for c in completions], args, data,
                       processing_class=tokenizer, rollout_func=function)  # fmt: skip


def test_log_probabilities_are_those_of_the_model_at_its_step(tmp_path: Path) -> None:
    ours, gaps = rollout("ngram"), []

    def watched(prompts: list[Any], who: Any) -> dict[str, list[Any]]:
        found = ours(prompts, who)
        assert who.model.training  # as it was found
        for ids, new, told in zip(found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True):
            who.model.eval()
            with torch.no_grad():
                logits = who.model(input_ids=torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
            who.model.train()
            own = logits.log_softmax(-1)[torch.arange(len(new)), new]
            gaps.append(float((own - torch.tensor(told)).abs().max()))
        return found

    run = trainer(tmp_path, watched)
    before = run.model.lm_head.weight.detach().clone()
    run.train()
    assert run.state.global_step == 2 and not torch.equal(before, run.model.lm_head.weight)
    assert len(gaps) >= 4 and max(gaps) < 1e-3


def test_settings_that_would_change_the_distribution_are_refused() -> None:
    for changes, told in (
        ({"temperature": 0.7}, "temperature=1.0"),
        ({"top_k": 5}, "top_k=5"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "generation_kwargs="),
    ):
        args = SimpleNamespace(**{"temperature": 1.0, "max_completion_length": 4, **changes})
        with pytest.raises(ConfigError, match=told):
            rollout()(["x"], SimpleNamespace(args=args))


def test_messages_become_text_as_the_trainer_is_told(tmp_path: Path) -> None:
    run = trainer(tmp_path, None, chat_template_kwargs={"marked": True})
    run.processing_class.chat_template = "{% if marked %}class {% endif %}{{ messages[0]['content'] }}"
    found = rollout()([[{"role": "user", "content": "Parser:"}]], run)
    assert run.processing_class.decode(found["prompt_ids"][0]) == "class Parser:"
