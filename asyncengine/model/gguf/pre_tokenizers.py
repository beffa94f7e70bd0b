r"""How text is cut into words before a vocabulary's merges apply, by the names that llama.cpp gives to each way.

A GGUF file has such a name and no pattern. The patterns are those of the models' own tokenizers; llama.cpp's are the
same as far as its regular expressions go, which know no `\p{Lu}` and none of `(?i:...)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from asyncengine.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way of cutting.

    Attributes:
        patterns: Each cuts what the ones before it left, into what it matches and what lies between.
        whole_words: Whether a word that is a token is that token, whatever the merges make of it.
        composed: Whether text is brought into Unicode's form NFC first.
        letters: Whether tokens are spelled in GPT-2's letters for bytes; else as text, with "▁" for spaces and names
            such as ``<0x0A>`` for bytes that no token has.
        begins: Whether texts get a bos token if the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    composed: bool = False
    letters: bool = True
    begins: bool = False


def pre_tokenizer_of(name: str | None) -> PreTokenizer:
    """The way of cutting that llama.cpp calls so.

    Args:
        name: `tokenizer.ggml.pre`; None if the file has none.

    Raises:
        UnsupportedModelError: It is not known here. Another one would give other tokens than the model has learned.
    """
    if not name or name == "default":
        raise UnsupportedModelError(
            "the GGUF file does not say how its vocabulary cuts text (tokenizer.ggml.pre): it was made before May 2024 "
            "and has to be converted again"
        )
    if name not in _KNOWN:
        raise UnsupportedModelError(f"the GGUF file's pre-tokenizer, {name!r}, is not known")
    return _KNOWN[name]


_SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_SHORT = rf"(?i:{_SHORT})"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _words(digits: str, short: str = f"{_ANY_SHORT}|", end: str = _ENDS) -> str:
    """As cl100k and what followed it: words with any sign before them, digits in groups."""
    return rf"{short}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{end}"


def _cased(digits: str, short: str = f"{_ANY_SHORT}?", without: str = "", breaks: str = r"[\r\n/]*") -> str:
    """As o200k: words are cut where a capital follows a small letter, and keep contractions."""
    first = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    later = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]"
    sign = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{sign}{first}*{later}+{short}|{sign}{first}+{later}*{short}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{breaks}|{_ENDS}"
    )


_THREE = r"\p{N}{1,3}"
_ONE = r"\p{N}"
_THREE_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_LINES = r"[^\n]+|\n+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_CJK}"
)
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄ"
    "ῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""Letters that have cases, as DeepSeek's first tokenizer lists them."""
_SENTENCES = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_MARKED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = rf"{_MARKED}[\r\n]*|{_ENDS}"
_JAIS2_ENDS = "|".join(
    [r"\s*[\r\n]+", *(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)), r"\s{1,2}(?!\S)", r"\s"]
)
_EXAONE_MOE = (
    rf"{_ANY_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_QWEN35 = rf"{_ANY_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_ANY_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_ENDS}"
_KIMI = r"\p{Han}+|" + _cased(_THREE, without=r"&&[^\p{Han}]", breaks=r"[\r\n]*")

_LLAMA3 = PreTokenizer((_words(_THREE),), whole_words=True, begins=True)
_QWEN2 = PreTokenizer((_words(_ONE),))
_GPT4O = PreTokenizer((_cased(_THREE),))
_PLAIN = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((_ONE, _GPT2))
_GLM = PreTokenizer((_words(_THREE),))
_DEEPSEEK_V3 = PreTokenizer((_THREE, _CJK, _DEEPSEEK3))
_BAILINGMOE = PreTokenizer((_BAILING,))
_TINY_AYA = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_THREE)))
_WHOLE_LINES = PreTokenizer((_LINES,), letters=False)

_KNOWN = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _LLAMA3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _GLM),
    **dict.fromkeys(("glm4", "glm5"), replace(_GLM, whole_words=True)),
    "jais-2": PreTokenizer((_words(_THREE, end=_JAIS2_ENDS),)),
    "minicpm5": PreTokenizer((_THREE, _words(r"\p{N}+")), whole_words=True),
    "qwen2": replace(_QWEN2, composed=True),
    "qwen35": PreTokenizer((_QWEN35,), composed=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2
    ),
    "ufakzeka": PreTokenizer((_words(_ONE, short=""),)),
    "laguna": PreTokenizer((_LINES, _words(_ONE))),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    "tekken": PreTokenizer((_cased(_ONE, short=""),), whole_words=True, begins=True),
    "kimi-k2": PreTokenizer((_KIMI,)),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _TINY_AYA),
    "youtu": PreTokenizer((_YOUTU, _cased(_ONE)), whole_words=True),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion", "granite-docling"), _PLAIN
    ),
    **dict.fromkeys(("olmo", "mpt"), replace(_PLAIN, composed=True)),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    "command-r": replace(_DIGITS, composed=True),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", _DEEPSEEK_SIGNS, r"\s+$", _HAN_AND_HANGUL, r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, _ONE)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK_V3),
    "spark2_5": PreTokenizer((_THREE, _CJK, rf"{_MARKED}|[\r\n]|\s+(?!\S)|\s+", _ONE)),
    "afmoe": PreTokenizer((_THREE_FROM_THE_RIGHT, _ASIAN, _DEEPSEEK3)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILINGMOE),
    "seed-coder": PreTokenizer((_SEED,)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), PreTokenizer((_SENTENCES,))),
    "viking": PreTokenizer((_SENTENCES, _ONE)),
    "gemma4": replace(_WHOLE_LINES, begins=True),
    "sarvam-moe": _WHOLE_LINES,
}
