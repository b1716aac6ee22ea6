"""GGUF files in: header, configuration, tokenizer, weights. Nothing here trusts a length, a count or an offset of a file."""
