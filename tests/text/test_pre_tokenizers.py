"""Every name of a pre-tokenizer cuts odd texts as llama.cpp or the model's own pattern does (a stored golden)."""

import json
import time

import pytest
from vocabularies import DATA, byte_level_metadata, spell

from minillm.errors import MinillmError
from minillm.text.pre_tokenizers import PRE_TOKENIZERS
from minillm.text.tokenizer import Tokenizer
