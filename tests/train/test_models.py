"""Growing, measuring and exporting a Llama of a few thousand weights."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from outrider.errors import ConfigError
from outrider.train import measure
from outrider.train.checkpoint import export_model, verify
from outrider.train.grow import multiply_layers, project_embeddings
from outrider.train.labels import read_labels, write_labels


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()


IDS = torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_more_layers_keep_the_function_and_every_layer_trains(factor):
    seed = llama()
    grown = multiply_layers(seed, factor).eval()
    assert grown.config.num_hidden_layers == 2 * factor
    torch.testing.assert_close(grown(IDS).logits, seed(IDS).logits)
    grown(IDS, labels=IDS).loss.backward()
    for layer in grown.model.layers:
        assert layer.self_attn.o_proj.weight.grad.abs().sum() > 0
        assert layer.mlp.down_proj.weight.grad.abs().sum() > 0


def test_export_is_tied_bfloat16_and_leaves_the_model_alone(tmp_path, capfd):
    model = llama()
    folder = tmp_path / "target"
    for _ in range(2):  # the second replaces the first
        export_model(model, _Tokenizer(), folder)
    assert capfd.readouterr().err == "", "no bar of transformers"
    verify(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.bfloat16())
    assert model.dtype == torch.float32
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


class _Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_a_model_accepts_itself_always_and_another_sometimes():
    same = measure.compare(llama(), llama(), IDS, (1.0, 0.5))
    assert [k.mean for k in same.acceptance] == pytest.approx([1.0, 1.0])
    assert same.greedy_agreement == 1.0
    assert torch.is_grad_enabled()  # measuring inside a training run must leave the mode as it was
    other = measure.compare(llama(), llama(1), IDS, (1.0,), skip=4).acceptance[0]
    assert 0 < other.mean < 1
    assert other.low_quarter <= other.mean + other.spread


def test_loss_is_the_mean_over_all_positions():
    model = llama()
    logits = model(IDS[:, :-1]).logits.log_softmax(-1)
    expected = -logits.gather(-1, IDS[:, 1:, None]).mean().item()
    assert measure.compare(model, llama(1), IDS).target_nats == pytest.approx(expected, rel=1e-5)


def test_labels_continue_after_a_kill_and_hold_the_targets_logits(tmp_path):
    model, lines = llama(), []
    with torch.no_grad():
        expected = model(IDS[:, :-1]).logits
    write_labels(model, IDS, tmp_path, rows=1, report=lines.append)
    (tmp_path / "done").write_text("2")
    write_labels(model, IDS, tmp_path, rows=1, report=lines.append)
    labels = read_labels(tmp_path, rows=3, seed=0)
    tokens, logits = labels(5)
    assert torch.equal(tokens, IDS)  # one batch holds all rows, in order
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)
    (tmp_path / "done").write_text("2")
    with pytest.raises(ConfigError, match="not finished"):
        read_labels(tmp_path, rows=3, seed=0)


def test_projected_embeddings_keep_inner_products_when_the_rank_allows_it():
    wide, narrow = llama(), llama(1)
    project_embeddings(wide, narrow)
    a, b = wide.model.embed_tokens.weight, narrow.model.embed_tokens.weight
    torch.testing.assert_close(a @ a.T, b @ b.T)


def test_bits_per_byte():
    assert measure.bits_per_byte(math.log(2), tokens=10, size=20) == pytest.approx(0.5)
