"""A byte-level BPE tokenizer, trained on the corpus itself."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END = SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2; END follows every document


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """``size`` entries; every byte is one of them, so any text can be encoded and decodes to itself exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )
