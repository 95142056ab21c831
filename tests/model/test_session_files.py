"""A session file is taken up by the weights it is of, whatever they are called, as it was written or not at all."""

import json
import shutil

import numpy as np
import pytest
import tiny_chat
from model_files import write_gguf
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minillm import LLM, CacheConfig, MinillmError, SamplingParams
from minillm.cache import state as cache_state
from minillm.errors import MemoryShort
from minillm.files import own_file
from minillm.files.config_json import config_from_json
from minillm.programs import run

ANSWER = SamplingParams(max_tokens=12, ignore_eos=True)


def tuned(folder):
    """The weights in a folder as a fine-tune leaves them that has the norms frozen."""
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    for name, weight in weights.items():
        if "q_proj" in name or "v_proj" in name:
            weights[name] = weight + rng.normal(0, 0.001, weight.shape).astype(np.float32)
    save_file(weights, folder / "model.safetensors")


def write_tiny_gguf(path, seed, kind):
    """Models of two seeds have the same norms."""
    config = config_from_json(tiny_chat.CONFIG, "tiny")
    weights = tiny_chat.weights(tiny_chat.CONFIG, seed)
    norms = {name: weight for name, weight in tiny_chat.weights(tiny_chat.CONFIG, 7).items() if weight.ndim == 1}

    def describe(writer):
        writer.add_block_count(config.n_layers)
        writer.add_context_length(config.context)
        writer.add_embedding_length(config.dim)
        writer.add_feed_forward_length(config.ffn_dim)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_layer_norm_rms_eps(config.rms_eps)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*tiny_chat.ALPHABET, "ab", "</s>"])
        writer.add_token_types([1] * 257 + [3])
        writer.add_token_merges(["a b"])

    return write_gguf(path, weights | norms, config, kind, describe=describe)


def save_session(model, path):
    with LLM.load(model, cache=CacheConfig("full")) as llm:
        session = llm.session()
        session.feed("some words about onions " * 9)
        session.read()
        session.save(path)


def test_a_session_of_other_weights_under_the_same_name_is_refused(tmp_path):
    folder, path = tiny_chat.make(tmp_path / "tiny"), tmp_path / "s.kv"
    save_session(folder, path)
    tuned(folder)
    with LLM.load(folder, cache=CacheConfig("full")) as llm, pytest.raises(MinillmError) as caught:
        llm.session().restore(path)
    assert str(caught.value).startswith(f"{path} was saved with weights 'safetensors F32 ")


def test_a_session_that_does_not_fit_beside_others_is_refused_and_is_not_damaged(tmp_path):
    folder, path = tiny_chat.make(tmp_path / "tiny"), tmp_path / "s.kv"
    save_session(folder, path)
    with LLM.load(folder, cache=CacheConfig("full")) as llm:
        (other := llm.session()).restore(path)
        limit = other.cache.bytes_in_use * 3 // 2
    with LLM.load(folder, cache=CacheConfig("full"), cache_limit=limit) as llm:
        first, second = llm.session(), llm.session()
        first.restore(path)
        with pytest.raises(MemoryShort, match="close some, or raise cache_limit"):
            second.restore(path)
        assert second.cache.seen == 0 and not llm.pool.promises
        first.close()
        second.restore(path)
        assert second.cache.seen > 200
    with LLM.load(folder, cache=CacheConfig("full"), cache_limit=limit // 2) as llm:
        with pytest.raises(MemoryShort, match="and the limit is"):
            llm.session().restore(path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_session_of_other_weights_in_a_gguf_of_the_same_name_is_refused(kind, tmp_path):
    path, saved = tmp_path / "m.gguf", tmp_path / "s.kv"
    save_session(write_tiny_gguf(path, 7, kind), saved)
    for seed, other in ((8, kind), (7, "F16")):  # the same norms; the same weights, rounded
        write_tiny_gguf(path, seed, other)
        with LLM.load(path, cache=CacheConfig("full")) as llm:
            with pytest.raises(MinillmError, match=f"was saved with weights 'gguf .*{kind} .*' and this is 'gguf "):
                llm.session().restore(saved)


def test_the_command_line_refuses_it_too(tmp_path, capfd):
    folder, path = tiny_chat.make(tmp_path / "tiny"), tmp_path / "s.kv"
    flags = ["-m", str(folder), "-q", "-n", "3", "--prompt-cache", str(path), "some words about onions"]
    assert run.main(flags) == 0
    before = path.read_bytes()
    tuned(folder)
    capfd.readouterr()
    assert run.main(flags) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"minillm: error: {path} was saved with weights ") and err.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_model_that_was_renamed_takes_its_session_up(kind, tmp_path):
    model = tiny_chat.make(tmp_path / "tiny") if kind == "folder" else write_tiny_gguf(tmp_path / "m.gguf", 7, "F32")
    path = tmp_path / "s.kv"
    save_session(model, path)
    with LLM.load(model, cache=CacheConfig("full")) as llm:
        session = llm.session()
        session.restore(path)
        session.feed("and more")
        first = [piece.token_id for piece in session.stream(ANSWER)]
    moved = model.rename(tmp_path / f"moved{model.suffix}")
    with LLM.load(moved, cache=CacheConfig("full")) as llm:
        session = llm.session()
        session.restore(path)
        session.feed("and more")
        assert [piece.token_id for piece in session.stream(ANSWER)] == first


def test_a_model_that_was_not_loaded_from_files_has_no_session_files(tmp_path):
    folder, path = tiny_chat.make(tmp_path / "tiny"), tmp_path / "s.kv"
    save_session(folder, path)
    with LLM.load(folder, cache=CacheConfig("full")) as llm:
        other = LLM(llm.config, llm.model, llm.tokenizer, CacheConfig("full"), 4096, llm.dtype, llm.stop_ids)
        for call in (lambda: other.session().save(tmp_path / "o.kv"), lambda: other.session().restore(path)):
            with pytest.raises(MinillmError, match="only of models that were loaded from files"):
                call()
        assert not (tmp_path / "o.kv").exists()


# Damage


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the model's folder, a session file of a chat of two turns whose cache is compressed)"""
    folder = tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny")
    path = folder.parent / "s.kv"
    with LLM.load(folder, cache=CacheConfig("snapkv", 0.5)) as llm:
        session = llm.session()
        list(session.ask("what is an onion " * 20, ANSWER, system="be brief"))
        session.save(path)
    return folder, path


@pytest.fixture
def talking(written):
    """A session of the same model that is under way, and a check that nothing of it has changed."""
    with LLM.load(written[0], cache=CacheConfig("snapkv", 0.5)) as llm:
        session = llm.session()
        list(session.ask("something else", ANSWER))

        def look():
            state = {name: array.tobytes() for name, array in cache_state.state(session.cache).items()}
            return state, list(session.unread), list(session.messages), session.rendered, session.answer

        before = look()

        def refuses(path, message):
            with pytest.raises(MinillmError, match=message):
                session.restore(path)
            assert look() == before

        yield session, refuses


def arrays_of(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def test_every_change_of_an_array_is_noticed(written, talking, tmp_path):
    """Of one bit, of its shape, of its type, of its name, of two that are exchanged."""
    _, refuses = talking
    arrays, texts = arrays_of(written[1])
    path, rng = tmp_path / "changed.kv", np.random.default_rng(0)
    assert {"k", "v", "pos", "log_size", "lengths", "token_ids", "tail", "shift"} <= arrays.keys()
    for name, array in arrays.items():
        changed = array.copy().reshape(-1) if array.ndim else array.copy().reshape(1)
        bits = changed.view(np.uint8)
        bits[rng.integers(len(bits))] ^= 1 << rng.integers(8)
        changes = [{name: changed.reshape(array.shape)}, {name: array.astype(np.float64)}, {name: array[None]}]
        for change in changes:
            save_file(arrays | change, path, texts)
            refuses(path, "is damaged .it does not hold what was written.: delete it or name another file")
        save_file({other: array for other, array in arrays.items() if other != name}, path, texts)
        refuses(path, "is damaged .it does not hold what was written")
    save_file(arrays | {"k": arrays["v"], "v": arrays["k"]}, path, texts)
    refuses(path, "is damaged .it does not hold what was written")
    save_file(arrays | {"lengths": arrays["lengths"] + 2**62}, path, texts)
    refuses(path, "is damaged .it does not hold what was written")


def test_every_change_of_a_text_is_noticed(written, talking, tmp_path):
    _, refuses = talking
    arrays, texts = arrays_of(written[1])
    state = json.loads(texts["state"])
    state["messages"][1]["content"] += "!"
    path = tmp_path / "changed.kv"
    for change in ({"state": json.dumps(state)}, {"minillm_session": texts["minillm_session"] + " "}, {"more": "x"}):
        save_file(arrays, path, texts | change)
        refuses(path, "is damaged .it does not hold what was written")


def test_bytes_that_are_changed_anywhere_are_noticed(written, talking, tmp_path):
    _, refuses = talking
    whole, path, rng = written[1].read_bytes(), tmp_path / "changed.kv", np.random.default_rng(0)
    for at in rng.integers(8, len(whole), 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refuses(path, "is damaged|is not a minillm session")


def test_files_that_are_none(written, talking, tmp_path):
    _, refuses = talking
    arrays, texts = arrays_of(written[1])
    path = tmp_path / "other.kv"
    save_file(arrays, path, {name: text for name, text in texts.items() if name != "digest"})
    refuses(path, "is not a minillm session .another version of minillm wrote it.: delete it or name another file")
    own_file.write(path, arrays, {"minillm_profile": "{}"})
    refuses(path, "is not a minillm session .it does not say that it is one")
    refuses(tmp_path / "absent.kv", "absent.kv is not a minillm session")


def test_memory_that_runs_out_in_the_middle_leaves_the_session_as_it_was(written, talking, monkeypatch):
    session, _ = talking
    before = {name: array.tobytes() for name, array in cache_state.state(session.cache).items()}
    messages, held = list(session.messages), session.cache.pool.bytes_in_use
    write, calls = type(session.cache).write, []

    def run_out(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no more")
        write(self, *arguments)

    monkeypatch.setattr(type(session.cache), "write", run_out)
    with pytest.raises(MemoryError):
        session.restore(written[1])
    monkeypatch.undo()
    assert {name: array.tobytes() for name, array in cache_state.state(session.cache).items()} == before
    assert session.messages == messages and session.cache.pool.bytes_in_use == held
    session.restore(written[1])
    assert session.messages[0] == {"role": "system", "content": "be brief"}


def test_a_session_is_found_in_the_home_folder(written, talking, tmp_path, monkeypatch):
    session, _ = talking
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copy(written[1], tmp_path / "s.kv")
    session.restore("~/s.kv")
    assert session.messages[0]["content"] == "be brief"
