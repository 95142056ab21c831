"""Writes tests/data/tokenizer/pre_tokenizers.json: how llama.cpp cuts odd texts, for every name of a pre-tokenizer.

    {"texts": [...], "cuts": [[names that cut alike, [characters of each piece, for each text]], ...]}

In a vocabulary where any two neighbours can be joined, BPE leaves one token a piece: so its ids tell the cuts. Names
whose models have patterns that llama.cpp only comes near to are cut by those patterns and the `regex` module instead.

python tools/make_pre_tokenizer_golden.py     (needs gguf, regex and llama-cpp-python; minillm itself needs neither)
"""

import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as llama
import regex

from minillm.text.pre_tokenizers import PRE_TOKENIZERS

OUT = Path(__file__).parents[1] / "tests" / "data" / "tokenizer" / "pre_tokenizers.json"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SPELL = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(0x100 + i) for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}

TEXTS = [
    "Hello, world! It's I'LL we've 'Re don't",
    "  three   blanks \n \n\n\t\tx \r\n\r\n y  ",
    "\n\n\n  \n x\n",
    "1 22 333 4444 55555 3.14 1,000,000 x12y",
    "1234567 12345678 123456789a b1234567",
    "\u0663\u0664\u0665\u0666 \xbd\xb2 \u2167 \xbd34 \u096712",
    "camelCase XMLHttpRequest ABCdefGHI aB Ab",
    "\xc9cole\xc9t\xe9 stra\xdfe \u01c5ep \xdcN\xcfc \u0130st",
    "e\u0301te\u0301 n\u0303O\u0303 a\u0300a\u0300 \u0301x",
    "\u0928\u093f\u0938\u094d\u0924\u0947 \u0915\u093f\u092f\u093e \u0e01\u0e33\u0e49",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\uff0cA\u6d4b\u8bd5\uff01",
    "\ud55c\uae00 \u3131\u314f \u3105\u3106 \u2026\u201cx\u201d\u2014\u3001y",
    "\u3005\u3006\u3007\u4eba \u3400\u9fff \uff76\uff9e \u2f00a",
    "\U0001f600\U0001f469\u200d\U0001f467 \u2764\ufe0f a\U0001f389!",
    "....!!! ???;;: (a) [b] {c} <d> \u2026\xa1",
    "#define $x+y=<z>^~|`w` @me #tag \\n 'q'",
    "http://x.y/z?q=1&r=%20#f a/b/\n/\n//",
    "def f(a):\n    return {**a, 'b': 1}\n\n\n",
    "a\xa0b\u3000c\u2028d\u200be\x85f\u1680g",
    "\u0645\u0631\u062d\u0628\u0627\u060c \u0628\u06d4 \u0964 \u05e9\u05dc\u05d5\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442\u041c\u0438\u0440 \u03b1\u03b2\u0393 \u10d0\u10d1 \u0561",
    "\U0001d573\U0001d58a\u2113 \u210d \u01bb\u0294a \uff21\uff41 \ufb01",
    "IMGIMGABCZ <sentinel:12> IMGIMGZ  x",
    "'s'S'x 'LL'rE y'veZ 't!'d ''m",
    "\x01\x7f\x02 \ue000\ufffd\U0010ffff \u0378",
    "\n\r\n\ta\r b\x0bc\x0cd \t\n",
    " a b  c d e f\n g h i",
    "$1,234.56 -7 +8 1e-9 0x1F v2.0 10%",
    "\u2581a\u2581\u2581b <|end|> <s> [INST]",
    "                  x                 ",
    "_snake_case __init__ a_1 x__2 --flag",
    "\u0905\u0902\u0917\u094d\u0930\u0947\u091c\u0940 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "don\u2019t \u201cquoted\u201d \u2018s l\u2019\xe9t\xe9 O'Neil",
    "",
    " ",
    "x",
]

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KIMI = (
    r"(?V1)[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _O200K.replace(_SUFFIX + "?", "").replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK_LETTERS = (
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
OWN = {
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m": [_O200K],
    "tekken": [_TEKKEN],
    "kimi-k2": [_KIMI],
    "youtu": [
        "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
        "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _O200K.replace(r"\p{N}{1,3}", r"\p{N}"),
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"],
    "deepseek-llm": [
        r"[\r\n]",
        r"\s?" + _DEEPSEEK_LETTERS,
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}",
    ],
    "superbpe": [r"\p{N}+", r"(?=(\d{3})+(?!\d))"],
    "tiny_aya cohere2moe": [r"\d{1,3}(?=(?:\d{3})*\b)", _O200K],
}


def main():
    own = {name: patterns for names, patterns in OWN.items() for name in names.split()}
    llama.llama_backend_init()
    llama.llama_log_set(_silent, None)
    groups = {}
    for name in PRE_TOKENIZERS:
        cuts = [cut(name, text) for text in TEXTS]
        if name in own:
            theirs, cuts = cuts, [isolate(own[name], text) for text in TEXTS]
            differ = [text for text, a, b in zip(TEXTS, theirs, cuts, strict=True) if a != b]
            print(f"{name}: llama.cpp cuts {len(differ)} texts in another way")
        groups.setdefault(json.dumps(cuts), []).append(name)
    cuts = [[" ".join(names), json.loads(key)] for key, names in groups.items()]
    OUT.write_text(json.dumps({"texts": TEXTS, "cuts": cuts}, separators=(",", ":")) + "\n")
    print(f"{OUT}: {len(cuts)} ways to cut, {OUT.stat().st_size} bytes")


@llama.llama_log_callback
def _silent(level, text, data):
    pass


def isolate(patterns: list[str], text: str) -> list[int]:
    """Characters of each piece."""
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _parts(pattern, piece)]
    return [len(piece) for piece in pieces]


def _parts(pattern: str, text: str) -> list[str]:
    parts, at = [], 0
    for match in regex.finditer(pattern, text):
        parts += [text[at : match.start()], match[0]]
        at = match.end()
    return [part for part in [*parts, text[at:]] if part]


def cut(name: str, text: str) -> list[int]:
    """Characters of each piece, by llama.cpp."""
    if not text:
        return []
    raw = not PRE_TOKENIZERS[name].byte_level
    symbols = list(text.replace(" ", "\u2581")) if raw else [_SPELL[byte] for byte in text.encode()]
    n = len(symbols)
    joined = {(i, k): "".join(symbols[i:k]) for i in range(n) for k in range(i + 1, n + 1)}
    pairs = ((joined[i, j], joined[j, k]) for i in range(n) for k in range(i + 2, n + 1) for j in range(i + 1, k))
    tokens = list(dict.fromkeys(["<unused>", *joined.values()]))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        writer = gguf.GGUFWriter(file.name, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(list(dict.fromkeys(map(" ".join, pairs))) or ["a b"])
        writer.add_add_bos_token(False)
        writer.add_bos_token_id(0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        ids = _ids(file.name, text)
    sizes = [len(tokens[i]) for i in ids]
    return sizes if raw else _characters(text, sizes)


def _ids(path: str, text: str) -> list[int]:
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(path.encode(), params)
    data = text.encode()
    out = (llama.llama_token * (len(data) + 8))()
    count = llama.llama_tokenize(llama.llama_model_get_vocab(model), data, len(data), out, len(out), False, False)
    llama.llama_model_free(model)
    return list(out[:count])


def _characters(text: str, sizes: list[int]) -> list[int]:
    data, at, counts = text.encode(), 0, []
    for size in sizes:
        counts.append(len(data[at : at + size].decode()))
        at += size
    return counts


if __name__ == "__main__":
    main()
