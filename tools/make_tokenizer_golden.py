"""Writes tests/data/tokenizer: how the references cut and encode odd texts.

    cuts.json             the pieces of each text, by the models' own regular expressions and the `regex` module
    tokenizer.model       a small SentencePiece BPE model with byte fallback, control and user-defined pieces
    sentencepiece.json    [text, ids, text decoded] by the sentencepiece package with that model

python tools/make_tokenizer_golden.py        (needs regex and sentencepiece; minillm itself needs neither)
"""

import io
import json
import random
from pathlib import Path

import regex
import sentencepiece

OUT = Path(__file__).parents[1] / "tests" / "data" / "tokenizer"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": lambda text: regex.findall(GPT2, text),
    "smollm": lambda text: [p for part in regex.findall(r"\p{N}|[^\p{N}]+", text) for p in regex.findall(GPT2, part)],
    "llama-bpe": lambda text: regex.findall(LLAMA3, text),
    "qwen2": lambda text: regex.findall(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), text),
    "tekken": lambda text: regex.findall(TEKKEN, text),
}
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n\n",
    " \n \n",
    "\r\n\r\n \r \t\n",
    "\n" * 17,
    " " * 37 + "x",
    "Hello, world!",
    " leading",
    "trailing ",
    "   three   spaces   ",
    "\t\tif x:\n\t\t\treturn  y\r\n\r\n",
    "....!!!???;;;:::,,,",
    "It's I'LL we've THEY'RE don\u2019t 'sup 'S",
    "3.14159 1,000,000 12345678 \u0663\u0664\u0665 \u2167 \xbd \xb2",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\uff0c\u6d4b\u8bd5\uff01\ud55c \ubb38\uc7a5",
    "e\u0301 n\u0303 \u0928\u093f \u0e01\u0e33",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f1e9\U0001f1ea emoji\U0001f389!",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "def f(a, b=[1,2]):\n    return {**a, 'b': b}  # ok\n\n\n",
    "http://x.y/z?q=1&r=%20#frag",
    "don't//can't/'/\n/\n",
    "ABCdefGHI camelCaseString XMLHttpRequest",
    "a\xa0b\u3000c\u2028d\u200be",
    "\u2581under\u2581score",
    "\xdf \u017f K \xc5 \ufb01 \u0130stanbul \u01c5",
    "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 \U00010348 \U0010ffff",
    "\xdcn\xefc\xf6d\xe9 \xc0\xc9\xce",
    "<0x0A> <|im_end",
    "x" * 50,
    "ab" * 30,
    "\x01\x7f",
]
POOLS = [
    "abcdefgh ijk ",
    "ABCxyz' s t re LL",
    "0123456789.,",
    " \t\n\r\xa0\u3000",
    "\u65e5\u672c\u8a9e\u3002\uff0c\xe9\xe8\xfc\xf1",
    "\U0001f600\U0001f389\U0001f469\u200d",
    "!?;:#$%/'\"()",
]


def random_texts(count):
    rng = random.Random(0)
    for _ in range(count):
        runs = [(rng.choice(POOLS), rng.randint(1, 7)) for _ in range(rng.randint(1, 12))]
        yield "".join(rng.choice(pool) for pool, length in runs for _ in range(length))


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    texts = TEXTS + list(random_texts(40))
    cuts = {name: [cut(text) for text in texts] for name, cut in CUTS.items()}
    write("cuts.json", cuts)

    corpus = (Path(__file__).parents[1] / "LICENSE").read_text().splitlines() + TEXTS * 2
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.98,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    (OUT / "tokenizer.model").write_bytes(model.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    encoded = [[text, ids, reference.decode(ids)] for text in texts for ids in [reference.encode(text)]]
    write("sentencepiece.json", encoded)


def write(name, value):
    (OUT / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
