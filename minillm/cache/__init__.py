"""The key-value cache: pages of memory, which of them a sequence has, and a cache as plain arrays."""
