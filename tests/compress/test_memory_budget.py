"""A budget as a share of a full cache's memory: what that is in entries, and what they take."""

import argparse

import pytest
import tiny_chat

from minillm import LLM, CacheConfig, SamplingParams
from minillm.engine.admission import LEAST_LOST, in_entries
from minillm.errors import UsageError
from minillm.evaluate.tables import asked, budget_order, label
from minillm.programs import flags


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM.load(tiny_chat.make(tmp_path_factory.mktemp("model") / "model"), cache=CacheConfig("full")) as llm:
        yield llm


@pytest.mark.parametrize("dtype", ["auto", "int8", "q4"])
@pytest.mark.parametrize("memory", [0.1, 0.3])
def test_entries_take_the_memory_that_was_asked_for(llm, memory, dtype):
    config, ops = CacheConfig("random", memory=memory, dtype=dtype), llm.model.ops
    found = in_entries(config, ops, llm.config.head_dim)
    assert found.memory is None and found.dtype == (LEAST_LOST[0] if dtype == "auto" else dtype)
    llm.set_cache(config)
    assert llm.cache_config.as_dict() == found.as_dict()
    session = llm.session()
    session.feed("abcd efgh. " * 60)
    session.read()
    assert session.cache.memory == pytest.approx(memory, rel=0.01)
    floats, size = session.cache.full_bytes / session.cache.pool.float_page_bytes, session.cache.pool.page_size
    taken = session.cache.entries / size * session.cache.pool.page_bytes
    assert taken == pytest.approx(memory * floats * session.cache.pool.float_page_bytes, rel=0.05)
    session.close()


def test_more_memory_than_all_entries_take_keeps_them_all(llm):
    found = in_entries(CacheConfig("streaming", memory=0.9, dtype="int8"), llm.model.ops, llm.config.head_dim)
    assert found.budget.share == 1.0
    llm.set_cache(CacheConfig("streaming", memory=0.9, dtype="int8"))
    assert llm.generate("abcd efgh. " * 30, SamplingParams(max_tokens=4)) is not None


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"budget": 0.2, "memory": 0.1}, "budget and memory exclude each other"),
        ({"quality": 0.9, "memory": 0.1}, "quality and memory exclude each other"),
        ({"method": "full", "memory": 0.1}, "keeps everything: leave the memory out"),
        ({"memory": 0}, "memory: 0 is not a number from 0.0001 to 1"),
        ({"memory": 1.5}, "memory: 1.5 is not"),
    ],
)
def test_what_makes_no_sense_is_refused(keywords, message):
    with pytest.raises(UsageError, match=message):
        CacheConfig(**keywords)


def test_percents_are_understood():
    assert flags.budget("20%") == flags.budget("0.2") == 0.2 and flags.share("10%") == flags.share("0.1") == 0.1
    with pytest.raises(argparse.ArgumentTypeError, match="20% nor|20%, nor"):
        flags.budget("half%")


def test_tables_name_it():
    cache = CacheConfig("kvzip", memory=0.1).as_dict()
    assert label(cache) == "kvzip" and asked(cache) == "10 % of memory"
    assert budget_order(cache) < budget_order(CacheConfig("kvzip", memory=0.05).as_dict())
