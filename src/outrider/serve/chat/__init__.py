"""Chat completions: the fields, the prompt and the meaning of a conversation, the reply."""
