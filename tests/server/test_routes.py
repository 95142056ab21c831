"""What stands before the questions: routes, keys, origins, sizes, the command line."""

import re
import sys

import pytest
import tiny_chat
from paths import ROOT
from serving import error_of, served

from minillm import LLM, CacheConfig, MinillmError, UsageError
from minillm.server import cli, serve
from minillm.server.app import Server
from minillm.server.fields import NOT_YET
from minillm.server.serve import bound, start_line
from minillm.server.settings import Settings


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM.load(tiny_chat.make(tmp_path_factory.mktemp("model") / "tiny"), cache=CacheConfig("full")) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(llm):
    with served(llm, aliases=("small", "tiny-1"), max_body=1000) as (_, client):
        yield client


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_health_and_models(prefix, client):
    assert client.get(prefix + "/health").json() == {"status": "ok"} == client.get(prefix + "/livez").json()
    models = client.get(prefix + "/models").json()
    (model,) = models["data"]
    assert models["object"] == "list" and model["object"] == "model" and model["aliases"] == ["small", "tiny-1"]
    assert model["id"] == "small" and model["meta"]["n_ctx"] == 4096 and model["meta"]["n_vocab"] == 258
    assert client.get(prefix + "/models/tiny-1").json() == model


def test_what_is_not_there(client):
    assert "there is no /v1/nothing here" in error_of(client.get("/v1/nothing"), 404, "not_found_error")
    assert "no model 'gpt-4' here, but 'small'" in error_of(client.get("/v1/models/gpt-4"), 404, "not_found_error")
    response = client.post("/v1/models")
    assert "/v1/models does not take POST" in error_of(response, 405, "invalid_request_error")
    assert "GET" in response.headers["allow"]


KEYED = [
    ({}, 401),
    ({"Authorization": "Bearer other"}, 401),
    ({"Authorization": "Bearer"}, 401),
    ({"X-Api-Key": ""}, 401),
    ({"Authorization": "Basic two"}, 401),
    ({"Authorization": "Bearer one"}, 404),
    ({"authorization": "bearer two"}, 404),
    ({"X-Api-Key": "two"}, 404),
]


def test_keys(llm):
    with served(llm, api_keys=("one", "two"), cors_origins=("https://a.example",)) as (_, client):
        for headers, status in KEYED:
            assert client.get("/v1/nothing", headers=headers).status_code == status, headers
        assert "Authorization: Bearer KEY" in error_of(client.get("/v1/nothing"), 401, "authentication_error")
        for path in ("/health", "/livez", "/v1/models", "/models"):
            assert client.get(path).status_code == 200
        here, there = {"Origin": "https://a.example"}, {"Origin": "https://b.example"}
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert client.options("/v1/chat/completions", headers=here | asks).status_code == 200
        assert client.get("/v1/nothing", headers=here).headers["access-control-allow-origin"] == here["Origin"]
        assert "access-control-allow-origin" not in client.get("/health", headers=there).headers


def test_every_origin_and_none(llm, client):
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    with served(llm, cors_origins=("*",)) as (_, open_client):
        assert open_client.get("/health", headers=origin).headers["access-control-allow-origin"] == origin["Origin"]


def test_the_command_line(tmp_path):
    (tmp_path / "keys").write_text("k2\n\nk3\n")
    environ = {"MINILLM_ARG_PORT": "1", "MINILLM_ARG_QUIET": "1", "MINILLM_ARG_VERBOSE": "0", "OTHER": "x"}
    args = cli.parse(["--port", "2", "--api-key", "k1", "--api-key-file", str(tmp_path / "keys"), "-np", "3"], environ)
    assert (args.port, args.quiet, args.verbose) == (2, True, False)
    assert args.settings.api_keys == ("k1", "k2", "k3") and args.settings.parallel == 3
    assert args.settings.params.temperature == 0.8 and cli.parse(["--temp", "0"], {}).settings.params.temperature == 0
    (tmp_path / "keys").write_text("\n")
    wrong = [
        (["--api-key-file", str(tmp_path / "keys")], {}, "holds no key"),
        (["--api-key-file", str(tmp_path / "none")], {}, "cannot be read"),
        ([], {"MINILLM_ARG_PROT": "1"}, "MINILLM_ARG_PROT is set and there is no such flag"),
        ([], {"MINILLM_ARG_QUIET": "maybe"}, "write 1 or 0"),
        ([], {"MINILLM_ARG_PORT": "-1"}, "must be in 0..65535"),
        (["--timeout", "nan"], {}, "must be more than 0"),
    ]
    for argv, environ, message in wrong:
        with pytest.raises(UsageError, match=message):
            cli.parse(argv, environ)


def test_a_port_that_is_taken():
    with bound("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(MinillmError, match=r"cannot be had \(Address already in use\): give another"):
            bound("127.0.0.1", first.getsockname()[1])


def test_the_start_line_counts_documents(llm, monkeypatch):
    """4,096 tokens are 128 pages of 32 in each of 2 x 2 heads, and cache_bytes adds an open one; a page is 32 x (2 x 8
    floats, a log size and a position) = 2,304 bytes."""
    monkeypatch.setattr(llm, "cache_limit", 10 * 129 * 4 * 2304 + 1)
    line = start_line(llm, "::1", 80)
    assert line.startswith("http://[::1]:80/v1 serves tiny; ") and line.endswith(": 10 documents of 4,096 tokens")


def test_the_page_names_what_there_is(llm):
    """docs/server.md has every route, every field that is refused, and no others; the core does not know the server."""
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    table = page.partition("## Routes")[2].partition("## Fields")[0]
    routes = {path.replace("{name:path}", "{id}") for path, _, _ in Server(llm, Settings()).routes()}
    assert set(re.findall(r"`(?:GET|POST|DELETE) (?:/v1)?([\w/{}-]+)`", table)) == routes
    refused = page.partition("Refused with a sentence")[2].partition("parts of other")[0].partition("):")[2]
    assert re.findall(r"`(\w+)`", refused) == list(NOT_YET)
    for file in (ROOT / "minillm").rglob("*.py"):
        if "server" not in file.parts:
            assert "minillm.server" not in file.read_text(encoding="utf-8"), file


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert serve.main(["--port", "0", "--offline"]) == 1
    assert capsys.readouterr().err == (
        'minillm: error: the server needs more packages: pip install "minillm-engine[server]"\n'
    )
