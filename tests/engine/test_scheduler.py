"""The scheduler with a scripted model and a clock: order, promises, cancels, failures."""

import random

import pytest
from scripted import LAYERS, ScriptedModel, pool_of, request_of

from minillm.engine import scheduler as scheduling
from minillm.engine.admission import promise
from minillm.engine.scheduler import Scheduler
from minillm.errors import MinillmError
from minillm.sampling import SamplingParams


def run(scheduler, steps=10_000):
    for _ in range(steps):
        if not scheduler.wanted():
            return
        scheduler.step()
    raise AssertionError("it does not end")


def test_the_oldest_reads_block_by_block_while_others_generate():
    model, pool, scheduler = ScriptedModel(), pool_of(), Scheduler()
    requests = [request_of(model, pool, [100 * i] * 5, n=8) for i in (1, 2, 3)]
    for request in requests:
        scheduler.submit(request)
    run(scheduler)
    reads = [entry[1:] for entry in model.log if entry[0] == "read"]
    assert reads == [(100 * i, index) for i in (1, 2, 3) for index in range(LAYERS)]
    first_of_last = model.log.index(("read", 300, 0))
    assert ("decode", (101,)) in model.log[:first_of_last]  # the first did not wait for the readings
    assert [request.token_ids for request in requests] == [[100 * i + j for j in range(1, 9)] for i in (1, 2, 3)]


def test_those_that_generate_are_decoded_together_by_pool():
    model, pools, scheduler = ScriptedModel(), [pool_of(), pool_of()], Scheduler()
    for i in range(4):
        scheduler.submit(request_of(model, pools[i % 2], [1000 * i], n=40))
    run(scheduler)
    batches = [entry[1] for entry in model.log if entry[0] == "decode"]
    assert max(map(len, batches)) == 2
    assert all(len({token // 1000 % 2 for token in batch}) == 1 for batch in batches)


def test_without_a_runner_each_is_decoded_by_itself():
    model, pool, scheduler = ScriptedModel(together=False), pool_of(), Scheduler()
    for i in range(3):
        scheduler.submit(request_of(model, pool, [i]))
    run(scheduler)
    assert {len(entry[1]) for entry in model.log if entry[0] == "decode"} == {1}


def test_a_piece_that_is_pulled_is_made_when_it_is_asked_for():
    model, pool, scheduler = ScriptedModel(), pool_of(), Scheduler()
    pulled, free = request_of(model, pool, [1], pull=True), request_of(model, pool, [50], n=9)
    scheduler.submit(pulled)
    scheduler.submit(free)
    run(scheduler)
    assert free.over and pulled.state == "waiting" and not pulled.cache.seen
    for n in (1, 2):
        pulled.asked = True
        run(scheduler)
        assert (len(pulled.token_ids), pulled.cache.seen) == (n, n)
        assert pulled.pop().token_id == 1 + n


def test_one_that_fails_fails_alone():
    model, pool, scheduler = ScriptedModel(bad=(33, 52)), pool_of(), Scheduler()
    good, bad_prompt, bad_token, other = (request_of(model, pool, [i], n=5) for i in (10, 33, 50, 70))
    for request in (good, bad_prompt, bad_token, other):
        scheduler.submit(request)
    run(scheduler)
    assert (good.token_ids, other.token_ids) == ([11, 12, 13, 14, 15], [71, 72, 73, 74, 75])
    assert (bad_prompt.state, str(bad_prompt.error), bad_prompt.token_ids) == ("failed", "a bad prompt", [])
    assert (bad_token.state, str(bad_token.error), bad_token.token_ids) == ("failed", "a bad token", [51, 52])
    assert bad_token.cache.token_ids + bad_token.unread == [50, 51, 52] and bad_prompt.unread == [33]
    with pytest.raises(RuntimeError, match="a bad prompt"):
        bad_prompt.pop()


def test_who_never_fits_is_told_and_who_waits_in_vain_too():
    now = [0.0]
    model, pool, scheduler = ScriptedModel(), pool_of(40), Scheduler(clock=lambda: now[0])
    never = request_of(model, pool, [1] * 100)
    scheduler.submit(never)
    scheduler.step()
    assert never.state == "failed" and "the limit is" in str(never.error)
    left, waits = request_of(model, pool, [1] * 8, pull=True), request_of(model, pool, [2] * 8)
    left.asked = True
    scheduler.submit(left)
    while not left.pieces:
        scheduler.step()
    left.pop()
    scheduler.submit(waits)
    scheduler.step()
    assert waits.state == "waiting"
    now[0] = scheduling.PATIENCE + 1
    scheduler.step()
    assert waits.state == "failed" and isinstance(waits.error, MinillmError)


def test_idle_memory_is_given_back_for_who_does_not_fit():
    model, pool, scheduler = ScriptedModel(), pool_of(60), Scheduler()
    idle, given = [], []
    for i in range(3):
        request = request_of(model, pool, [100 * i] * 8, n=1)
        scheduler.submit(request)
        run(scheduler)
        idle.append(request.cache)

    class Idle:
        @property
        def bytes_in_use(self):
            return sum(cache.bytes_in_use for cache in idle)

        def drop(self):
            given.append(idle[0].token_ids[0])
            idle.pop(0).clear()

    scheduler.idle = Idle()
    scheduler.submit(large := request_of(model, pool, [1] * 10, n=1))
    scheduler.step()
    assert large.state == "reading" and given == [0]  # no more than is needed
    held = pool.alloc(30)
    scheduler.submit(larger := request_of(model, pool, [2] * 12, n=1))
    scheduler.step()
    assert larger.state == "waiting" and given == [0]  # all that is idle would not do, and stays
    pool.release(held)
    run(scheduler)
    assert larger.state == "done" and given == [0, 100, 200]


def test_who_has_read_goes_before_who_waits_for_its_memory():
    """Two answers to one prompt, and a request between that fits only once they are over."""
    model, pool, scheduler = ScriptedModel(), pool_of(90), Scheduler()
    read = request_of(model, pool, [7] * 8)
    read.params = None
    scheduler.submit(read)
    run(scheduler)
    scheduler.submit(large := request_of(model, pool, [1] * 46, n=1))
    scheduler.step()
    assert large.state == "waiting"
    answers = []
    for cache in (read.cache, read.cache.fork()):
        answers.append(request_of(model, pool, [], n=3))
        answers[-1].cache, answers[-1].hidden = cache, read.hidden[-1:]
        scheduler.submit(answers[-1])
    while not all(one.over for one in answers):
        scheduler.step()
    assert large.state == "waiting" and [one.token_ids for one in answers] == [[8, 9, 10]] * 2
    for one in answers:
        one.cache.clear()
    run(scheduler)
    assert large.state == "done"


def test_several_answers_to_each_of_several_prompts():
    """The memory of one answer is promised with that of the prompt: prompts that were read never wait for one another,
    and answers whose memory does not suffice for all come one after the other."""
    model, pool, scheduler = ScriptedModel(), pool_of(260), Scheduler(clock=lambda: 0.0)
    reads, answers = [request_of(model, pool, [100 * i] * 40) for i in range(3)], []
    for read in reads:
        read.params, read.answers = None, (SamplingParams(max_tokens=8),) * 2
    scheduler.submit(*reads)
    open_ = list(reads)
    for _ in range(200):
        scheduler.step()
        for read in [read for read in open_ if read.over]:
            open_.remove(read)
            forks = [request_of(model, pool, [], n=8) for _ in range(2)]
            for fork, cache in zip(forks, (read.cache, read.cache.fork()), strict=True):
                fork.cache, fork.hidden = cache, read.hidden[-1:]
            scheduler.submit(*forks)
            answers += forks
        for one in [one for one in answers if one.over]:
            one.cache.clear()
    assert [one.token_ids[-1] for one in answers] == [8, 8, 108, 108, 208, 208]
    assert not pool.promises and pool.pages_in_use == 0


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_arrivals_cancels_and_sizes(seed):
    """First come first served, no promise broken, the limit never passed, every page back."""
    rng = random.Random(seed)
    limit = rng.choice([None, 150, 300])
    pool, scheduler = pool_of(limit), Scheduler(clock=lambda: 0.0)
    model = ScriptedModel(bad=rng.sample(range(1000), 20))
    to_come = [
        request_of(model, pool, [rng.randrange(1000) for _ in range(rng.randint(1, 30))], n=rng.randint(1, 12))
        for _ in range(12)
    ]
    submitted, admitted, promised = [], [], {}
    for _ in range(3000):
        if to_come and rng.random() < 0.3:
            submitted.append(to_come.pop())
            promised[submitted[-1]] = promise(submitted[-1])
            scheduler.submit(submitted[-1])
        if submitted and rng.random() < 0.05:
            scheduler.end(gone := rng.choice(submitted), "cancelled")
            gone.cache.clear()
        scheduler.step()
        for request in submitted:
            if request.state in ("reading", "generating") and request not in admitted:
                admitted.append(request)
            assert request.cache.own_pages <= promised[request]
            if request.over:
                request.cache.clear()
        assert limit is None or pool.pages_in_use <= limit
        if not to_come and not scheduler.requests:
            break
    assert not to_come and all(request.over for request in submitted)
    arrivals = [request for request in submitted if request in admitted]
    assert admitted == arrivals
    assert pool.bytes_in_use == 0 and not len(pool.promises)
    for request in submitted:
        if request.state == "done":
            first = request.token_ids[0]
            assert request.token_ids == list(range(first, first + len(request.token_ids)))
            assert len(request.token_ids) == request.params.max_tokens
