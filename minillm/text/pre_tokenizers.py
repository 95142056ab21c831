"""How BPE cuts a text before it merges: the kinds that `tokenizer.ggml.pre` of a GGUF file names.

The patterns are those of the models' own tokenizer.json, which the models were trained with. llama.cpp, whose names
these are, has no classes such as \\p{Lu}: where it only comes near to such a pattern, minillm follows the model.
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """One kind of cut. Each pattern in turn cuts what those before it left; what none matches stays together."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is itself a token is that token, whatever the merges say
    adds_bos: bool = False  # a prompt begins with BOS, where the file does not say
    nfc: bool = False  # characters are composed first
    byte_level: bool = True  # pieces are bytes in GPT-2's spelling; else text with U+2581 for a space

    def build(self) -> pre_tokenizers.PreTokenizer:
        """For the library. Its pieces are spelled as the vocabulary spells them."""
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        if self.byte_level:
            cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(cuts)


_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_BLANKS}"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"


def _words(digits: str, suffix: str = _SUFFIX + "|", rest: str = rf"{_SIGNS}[\r\n]*|{_LINES}") -> str:
    """Llama 3's pattern: words with the character before them, numbers, signs, line ends, blanks."""
    return rf"{suffix}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{rest}"


def _cased(digits: str, suffix: str = "", but: str = "", rest: str = rf"{_SIGNS}[\r\n/]*|{_LINES}") -> str:
    """GPT-4o's pattern: as Llama 3's, and a word ends where a capital follows a small letter. but: no such letters."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{suffix}|{before}{upper}+{lower}*{suffix}|{digits}|{rest}"


def _marks(rest: str) -> str:
    """DeepSeek's pattern: an ASCII sign joins the ASCII letters after it, and combining marks are parts of words."""
    return r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+" + rf"{rest}|{_BLANKS}"


def _thousands(run: str, digit: str) -> tuple[str, ...]:
    """A run of digits in threes, counted from its end. Three patterns, as one lookahead for every three would take the
    square of a long run."""
    return run, rf"\A{digit}{{1,2}}(?=(?:{digit}{{3}})+\z)", rf"{digit}{{3}}"


_GPT_2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|{_BLANKS}"
_LLAMA_3, _QWEN = _words(_DIGITS), _words(_DIGIT)
_GPT_4O = _cased(_DIGITS, _SUFFIX + "?")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_NEWLINES = r"[^\n]+|\n+"
_CJK, _DEEPSEEK_CJK = r"[一-龥぀-ヿ]+", r"[一-龥ࠀ-一가-퟿]+"
# Letters that have a case, of the scripts and the Unicode version that DeepSeek's own list of ranges knows
_DEEPSEEK_LETTERS = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2F}\x{A790}-\x{A7FF}"
    r"\x{AB30}-\x{AB6F}\x{10570}-\x{105BF}\x{16E40}-\x{16E7F}\x{1D400}-\x{1DFFF}]]+"
)
_JAIS_BLANKS = "|".join(rf"\s{{{2**i}}}(?!\S)" for i in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s"

_KINDS = (
    (
        "gpt-2 phi-2 jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling modern-bert roberta-bpe "
        "jina-v1-en jina-v2-code jina-es jina-de jina-v2-es jina-v2-de",
        PreTokenizer((_GPT_2,)),
    ),
    ("olmo mpt", PreTokenizer((_GPT_2,), nfc=True)),
    ("smollm starcoder refact codeshell exaone minerva-7b mellum2", PreTokenizer((_DIGIT, _GPT_2))),
    ("command-r", PreTokenizer((_DIGIT, _GPT_2), nfc=True)),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT_2, r"[0-9]{3}"))),
    (
        "chameleon",
        PreTokenizer(
            (r"<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", "[\t\n]|    |  ", _DIGIT, r"[\p{P}!-/:-@\[-`{-~]", _GPT_2),
            adds_bos=True,
        ),
    ),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((_LLAMA_3,), ignore_merges=True, adds_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA_3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA_3,), ignore_merges=True)),
    ("jais-2", PreTokenizer((_words(_DIGITS, rest=rf"{_SIGNS}[\r\n]*|\s*[\r\n]+|{_JAIS_BLANKS}"),))),
    ("minicpm5", PreTokenizer((_DIGITS, _words(r"\p{N}+")), ignore_merges=True)),
    ("qwen2 deepseek-r1-qwen megrez kormo f2llmv2", PreTokenizer((_QWEN,), nfc=True)),
    ("stablelm2 hunyuan solar-open grok-2", PreTokenizer((_QWEN,))),
    ("ufakzeka", PreTokenizer((_words(_DIGIT, suffix=""),))),
    ("laguna", PreTokenizer((_NEWLINES, _QWEN))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((_words(_DIGIT, rest=rf"{_SIGNS}[\r\n]*|\s*[\r\n]|{_BLANKS}"),))),
    ("seed-coder", PreTokenizer((_words(_DIGIT, rest=rf" ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"),))),
    (
        "qwen35",
        PreTokenizer(
            (
                rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",
            ),
        ),
    ),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                rf"|{_SIGNS}[\r\n/]?|\s*[\r\n]|{_BLANKS}",
            )
        ),
    ),
    ("tekken", PreTokenizer((_cased(_DIGIT),), ignore_merges=True, adds_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT_4O,))),
    ("granite-embed-multi-97m", PreTokenizer((_GPT_4O,), ignore_merges=True)),
    ("tiny_aya cohere2moe", PreTokenizer((*_thousands(r"(?<!\d)\d++\b", r"\d"), _GPT_4O))),
    ("superbpe", PreTokenizer(_thousands(r"\p{N}+", r"\d"))),
    (
        "kimi-k2",
        PreTokenizer(
            (r"\p{Han}+|" + _cased(_DIGITS, _SUFFIX + "?", r"&&[^\p{Han}]", rf"{_SIGNS}[\r\n]*|{_LINES}"),),
        ),
    ),
    (
        "youtu",
        PreTokenizer(
            (rf"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_CJK}", _cased(_DIGIT, _SUFFIX + "?")),
            ignore_merges=True,
        ),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer((_DIGITS, _CJK, _marks(r"[\r\n]*|\s*[\r\n]+")))),
    ("spark2_5", PreTokenizer((_DIGITS, _CJK, _marks(r"|[\r\n]"), _DIGIT))),
    (
        "afmoe",
        PreTokenizer(
            (
                *_thousands(r"\p{N}+", r"\p{N}"),
                r"[一-鿿㐀-䶿\x{F900}-\x{FAFF}぀-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
                _marks(r"[\r\n]*|\s*[\r\n]+"),
            )
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT))),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                r"\s?" + _DEEPSEEK_LETTERS,
                r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+",
                r"\s+\z",
                _DEEPSEEK_CJK,
                _DIGIT,
            )
        ),
    ),
    ("bloom poro-chat gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, _DIGIT))),
    ("gemma4 granite-embed-multi-311m", PreTokenizer((_NEWLINES,), adds_bos=True, byte_level=False)),
    ("sarvam-moe", PreTokenizer((_NEWLINES,), byte_level=False)),
)
PRE_TOKENIZERS = {name: kind for names, kind in _KINDS for name in names.split()}
