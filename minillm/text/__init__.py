"""Text <-> token ids: tokenizers and their files, chat templates, delimiters, decoding as tokens come."""
