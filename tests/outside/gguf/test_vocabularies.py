"""llama.cpp's own vocabularies and strings: every id of every string, for every kind of vocabulary that is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.models.gguf.tokenizer import read_gguf_tokenizer

FOLDER = Path(os.environ.get("VOCABULARIES", "vocabularies"))
READ = ("llama-spm", "llama-bpe", "phi-3", "qwen2", "gpt-2", "deepseek-coder", "starcoder", "refact", "mpt")
REFUSED = ("bert-bge", "command-r", "deepseek-llm", "falcon", "gemma-4", "nomic-bert-moe", "qwen35")


@pytest.mark.parametrize("name", READ)
def test_every_string_has_llama_cpps_ids(name: str) -> None:
    file = FOLDER / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text(encoding="utf-8").split("\n")[: len(texts)]
    tokenizer = read_gguf_tokenizer(file)
    ours = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert len(texts) == 47
    assert ours == [[int(i) for i in line.split()] for line in lines]


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json beside the file"):
        read_gguf_tokenizer(FOLDER / f"ggml-vocab-{name}.gguf")
