"""minillm: Llama and Mistral models without torch, with a key-value cache that is small and gives its memory back."""

from minillm.compress.config import CacheConfig
from minillm.constraint import Constraint
from minillm.errors import MinillmError, UsageError
from minillm.llm import LLM
from minillm.sampling import SamplingParams

__all__ = ["LLM", "CacheConfig", "Constraint", "MinillmError", "SamplingParams", "UsageError"]
