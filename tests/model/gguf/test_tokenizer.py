"""Small vocabularies in GGUF's terms: what is written of them must treat every text as the original does."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from asyncengine.errors import CheckpointError, UnsupportedModelError
from asyncengine.model import kept_tokenizer
from asyncengine.model.gguf import pre_tokenizers as gguf_pre_tokenizers
from asyncengine.model.gguf.pre_tokenizers import pre_tokenizer_of
from asyncengine.model.gguf.tokenizer import write_tokenizer
from asyncengine.model.tokenizer import FastTokenizer, load_tokenizer

CORPUS = [
    "The x horse isn't here, they've said; we'll see it in 1234567 days, at 12:30 or 2024-05-06.",
    "def add(first, second):\n    return first + second  # 3.14159\n\n\n\tIT'S OK, I'M SURE\r\n",
    "東京都は日本の首都です。人口は1400万人。 中文和한국어 Việt résumé naïve Ελληνικά русский हिन्दी",
    "camelCase HTTPServer snake_case   several    spaces     here 🦙🎉 $1,000.00 <tag/> ... !!!",
] * 3
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  ",
    "\n",
    " \n\n \t x",
    "Hello world",
    " Hello  world ",
    "don't DON'T We'Ve",
    "1 12 123 1234 12345 123456 1234567 ١٢٣",
    "e\u0301 re\u0301sume\u0301",
    "👩\u200d🚀 \u0fff \ufffd ÿ",
    "ABCdefGHI/\n//\n==!!\n",
    "漢字かな交じり文123",
    "a" * 40 + " " * 40 + "b",
]
MARKS = ["<|begin|>", "<|end|>"]
BOS, EOS = 0, 1
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(*patterns: str) -> list[Any]:
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
ORIGINALS = {
    "gpt-2": [BYTE_LEVEL],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL],
    "falcon": [pre_tokenizers.Punctuation("contiguous"), BYTE_LEVEL, *split("[0-9][0-9][0-9]")[:1]],
    "llama-bpe": split(CL100K),
    "qwen2": split(CL100K.replace("{1,3}", "")),
    "gpt-4o": split(CASED),
    "tekken": split(CASED.replace("{1,3}", "").replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "")),
}


def trained(pre: str, corpus: Sequence[str] = CORPUS) -> Tokenizer:
    """A byte-level BPE that cuts text as the original of that name."""
    backend = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = pre_tokenizers.Sequence(ORIGINALS[pre])
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*corpus, "<think> <think> think"], trainer)
    return backend


def metadata_of(backend: Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    about = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<think>", f"[PAD{len(tokens) + 1}]"],
        "token_type": [3, 3, *[1] * (len(tokens) - 2), 4, 4],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **more,
    }
    return {"general.architecture": "llama"} | {f"tokenizer.ggml.{name}": value for name, value in about.items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return metadata_of(trained("gpt-2"), "gpt-2")


def pieces(**more: Any) -> dict[str, Any]:
    """A vocabulary of SentencePiece's kind: pieces' scores fall with their ids."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    backend.train_from_iterator(CORPUS[:2], trainer)
    model = json.loads(backend.to_str())["model"]
    learned = sorted((token for token in model["vocab"]), key=lambda token: (len(token) == 1, model["vocab"][token]))
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    last = ["<|user|>", "  ", "<tool>"]
    about = {
        "model": "llama",
        "tokens": first + learned + last,
        "scores": [0.0] * len(first) + [-float(index) for index in range(len(learned))] + [-1000.0] * len(last),
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(learned), 3, 4, 4],
        **more,
    }
    return {"general.architecture": "llama"} | {f"tokenizer.ggml.{name}": value for name, value in about.items()}


def joined(metadata: dict[str, Any], text: str) -> list[str]:
    """The pieces of a text, by SentencePiece's rule: join the neighbours whose piece has the highest score."""
    scores = {
        token: (metadata["tokenizer.ggml.scores"][index], -index)
        for index, token in enumerate(metadata["tokenizer.ggml.tokens"])
        if metadata["tokenizer.ggml.token_type"][index] == 1
    }
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    spelled = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [token for tokens in spelled for token in tokens]


def read(metadata: dict[str, Any], path: Path, model_type: str = "llama") -> Any:
    path.mkdir(exist_ok=True)
    write_tokenizer(metadata, path)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.10.0"}))
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def ids(tokenizer: Any, text: str) -> list[int]:
    encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


@pytest.mark.parametrize("pre", list(ORIGINALS))
def test_byte_level_vocabularies_encode_as_the_original(pre: str, tmp_path: Path) -> None:
    original = trained(pre)
    tokenizer = read(metadata_of(original, pre), tmp_path)
    for text in TEXTS:
        assert ids(tokenizer, text) == original.encode(text).ids
        assert tokenizer.decode(ids(tokenizer, text)) == original.decode(original.encode(text).ids)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "qwen3_5", "gemma3_text", "mistral", "phi3", "made_up"]
)
def test_no_class_of_a_model_puts_it_together_otherwise(model_type: str, tmp_path: Path) -> None:
    pre = {"qwen2": "qwen2", "qwen3_5": "qwen2"}.get(model_type, "gpt-4o")
    original = trained(pre)
    metadata = metadata_of(original, pre)
    tokenizer = read(metadata, tmp_path, model_type)
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"])
    for text in TEXTS:
        assert ids(tokenizer, text) == original.encode(text).ids
    assert tokenizer("x")["input_ids"] == ids(tokenizer, "x")


@pytest.mark.parametrize("name", list(gguf_pre_tokenizers._KNOWN))
def test_every_way_of_cutting_leaves_the_text_whole(name: str) -> None:
    for text in [*TEXTS, "".join(CORPUS[:4])]:
        words = cut(name, text)
        assert "".join(words) == text
        assert len(words) >= len(text) / 100


def cut(name: str, text: str) -> list[str]:
    patterns = pre_tokenizer_of(name).patterns
    chain = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])
    return [word for word, _ in chain.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("superbpe", "of 1234567", ["of ", "1", "234", "567"]),
        ("afmoe", "1234567漢字 it", ["1", "234", "567", "漢字", " it"]),
        ("tiny_aya", "12345 a", ["12", "345", " a"]),
        ("deepseek-v3", "12345 漢字 (it)", ["123", "45", " ", "漢字", " (", "it", ")"]),
        ("deepseek-llm", "It costs  12。\n", ["It", " costs", "  ", "12", "。", "\n"]),
        ("deepseek-coder", "x12", ["x", "1", "2"]),
        ("kimi-k2", "漢字 helloWorld's漢", ["漢字", " hello", "World's", "漢"]),
        ("minimax-m2", "helloWorld 1234", ["hello", "World", " ", "123", "4"]),
        ("tekken", "helloWorld's 12", ["hello", "World", "'s", " ", "1", "2"]),
        ("qwen35", "हिन्दी 12", ["हिन्दी", " ", "1", "2"]),
        ("qwen2", "हिन्दी", ["ह", "िन", "्द", "ी"]),
        ("bailingmoe", "a\n\nb", ["a", "\n\n", "b"]),
        ("seed-coder", "x)\n", ["x", ")", "\n"]),
        ("exaone-moe", "to be 1", ["to be", " ", "1"]),
        ("jais-2", "a" + " " * 8 + "b", ["a", " " * 4, " " * 2, " ", " b"]),
        ("viking", "On 12. Ei", ["On", " ", "1", "2", ".", " Ei"]),
        ("youtu", "漢字、かな hi", ["漢字", "、", "かな", " hi"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
        ("laguna", "a \n b", ["a", " ", "\n", " b"]),
        ("glm4", "12345", ["123", "45"]),
        ("gpt-2", "12345 We'Ve", ["12345", " We", "'", "Ve"]),
        ("command-r", "12", ["1", "2"]),
        ("falcon", "1234 it's", ["123", "4", " it", "'", "s"]),
    ],
)
def test_text_is_cut_as_the_model_learned_it(name: str, text: str, words: list[str]) -> None:
    assert cut(name, text) == words


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_joined_by_their_scores(prefix: bool, tmp_path: Path) -> None:
    metadata = pieces(add_space_prefix=prefix)
    tokenizer = read(metadata, tmp_path)
    for text in TEXTS:
        text = re.sub(" {2,}", " ", text)  # two spaces are a token that the user defined
        expected = joined(metadata, f" {text}" if prefix and text else text)
        assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == expected
        assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma2", "gemma3_text", "mistral", "phi3", "qwen3"])
def test_no_class_of_a_model_joins_pieces_otherwise(model_type: str, tmp_path: Path) -> None:
    metadata = pieces()
    tokenizer = read(metadata, tmp_path, model_type)
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"])
    for text in (" the horse", "x 🦙\n", "12 days"):
        assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == joined(metadata, f" {text}")


def test_a_space_is_put_before_what_follows_a_special_token(tmp_path: Path) -> None:
    tokenizer = read(pieces(), tmp_path)
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "<|user|>x<tool>x")) == ["<|user|>", "▁x", "<tool>", "▁x"]


def test_spaces_that_the_user_defined_are_one_token(tmp_path: Path) -> None:
    tokenizer = read(pieces(add_space_prefix=False), tmp_path)
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "x  x")) == ["x", "  ", "x"]
    assert tokenizer.decode(ids(tokenizer, "x  x")) == "x  x"


def test_bytes_make_the_characters_that_no_piece_has(tmp_path: Path) -> None:
    write_tokenizer(pieces(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path, None)
    assert isinstance(tokenizer, FastTokenizer)
    encoded = tokenizer.encode_piece("🦙")
    assert [tokenizer.token_bytes(token) for token in encoded] == [b" ", *(bytes([byte]) for byte in "🦙".encode())]
    assert tokenizer.decode(encoded, True) == "🦙"
    assert tokenizer.decode(encoded[:-1], True) == "�" * 3


def test_phi_3_s_tokens_take_the_spaces_after_them(tmp_path: Path) -> None:
    tokens = pieces()["tokenizer.ggml.tokens"]
    tokenizer = read(pieces() | {"general.architecture": "phi3"}, tmp_path)
    assert ids(tokenizer, "<|user|>\nthe") == ids(tokenizer, "<|user|>the")
    assert ids(tokenizer, "<s>\nthe") != ids(tokenizer, "<s>the")
    assert ids(tokenizer, "<|user|>\n") == [tokens.index("<|user|>")]


def test_special_tokens_are_found_in_text_and_left_out_of_it(plain: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = read(plain, tmp_path)
    think = tokenizer.convert_tokens_to_ids("<think>")
    text = "<|begin|>Hello<think>world<|end|>"
    encoded = ids(tokenizer, text)
    assert (encoded[0], encoded[-1]) == (BOS, EOS) and think in encoded
    assert tokenizer.decode(encoded) == text
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "Hello<think>world"


def test_names_for_ids_without_a_token_are_not_found_in_text(plain: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = read(plain, tmp_path)
    name = plain["tokenizer.ggml.tokens"][-1]
    assert name == f"[PAD{len(tokenizer) - 1}]"
    assert len(ids(tokenizer, name)) > 1


@pytest.mark.parametrize(
    ("more", "bos", "eos"),
    [
        ({}, False, False),
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
        ({"add_bos_token": True}, True, False),
        ({"add_eos_token": True}, False, True),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_texts_get_the_tokens_that_the_file_says(
    plain: dict[str, Any], more: dict[str, Any], bos: bool, eos: bool, tmp_path: Path
) -> None:
    tokenizer = read(plain | {f"tokenizer.ggml.{name}": value for name, value in more.items()}, tmp_path)
    whole, within = tokenizer("Hello")["input_ids"], ids(tokenizer, "Hello")
    assert whole == [BOS] * bos + within + [EOS] * eos
    assert tokenizer("Hello", "Hello")["input_ids"] == whole + whole
    ours = load_tokenizer(tmp_path, None)
    assert ours is not None and ours.encode("Hello") == whole


def test_sentencepiece_s_texts_begin_with_bos_if_the_file_does_not_say(tmp_path: Path) -> None:
    tokenizer = read(pieces(), tmp_path / "silent")
    assert tokenizer("the")["input_ids"] == [1, *ids(tokenizer, "the")]
    tokenizer = read(pieces(add_bos_token=False), tmp_path / "denied")
    assert tokenizer("the")["input_ids"] == ids(tokenizer, "the")


def test_tokens_with_a_part_are_known_by_it(plain: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = read(plain | {"tokenizer.ggml.padding_token_id": EOS}, tmp_path / "merges")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|end|>")
    assert tokenizer.unk_token is None
    tokenizer = read(pieces(), tmp_path / "pieces")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.pad_token is None


def test_a_word_that_a_file_calls_special_by_mistake_stays_in_texts(plain: dict[str, Any], tmp_path: Path) -> None:
    quote = plain["tokenizer.ggml.tokens"].index('"')
    wrong = {"tokenizer.ggml.bos_token_id": quote, "tokenizer.ggml.padding_token_id": quote}
    tokenizer = read(plain | wrong, tmp_path)
    assert tokenizer.decode(ids(tokenizer, 'a "b"'), skip_special_tokens=True) == 'a "b"'
    assert tokenizer.bos_token is None and tokenizer.pad_token is None


def test_files_without_types_have_their_end_recognised(plain: dict[str, Any], tmp_path: Path) -> None:
    old = {name: value for name, value in plain.items() if not name.endswith("token_type")}
    tokenizer = read(old, tmp_path)
    assert ids(tokenizer, "<|end|>") == [EOS]


def test_padding_that_is_no_token_is_none(plain: dict[str, Any], tmp_path: Path) -> None:
    assert read(plain | {"tokenizer.ggml.padding_token_id": 32000}, tmp_path).pad_token is None


def test_a_chat_template_writes_with_the_special_tokens(plain: dict[str, Any], tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    write_tokenizer(plain | {"tokenizer.chat_template": template}, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path, None)
    assert tokenizer is not None
    assert tokenizer.encode_chat([{"role": "user", "content": "Hi"}], {}) == [BOS, *tokenizer.encode("Hi"), EOS]


def test_further_templates_have_their_names(plain: dict[str, Any], tmp_path: Path) -> None:
    templates = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools {{ tools }}"}
    tokenizer = read(plain | templates | {"tokenizer.chat_templates": ["tool_use"]}, tmp_path)
    assert tokenizer.chat_template == {"default": "plain", "tool_use": "tools {{ tools }}"}


@pytest.mark.parametrize("kind", ["merges", "pieces"])
def test_it_is_kept_for_the_next_load(kind: str, plain: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = read({"merges": plain, "pieces": pieces()}[kind], tmp_path / "model")
    assert kept_tokenizer.keep(tmp_path / "kept", tokenizer)
    again = kept_tokenizer.recall(tmp_path / "kept")
    assert [ids(again, text) for text in TEXTS] == [ids(tokenizer, text) for text in TEXTS]


def test_text_of_gemma_4_s_kind_is_joined_by_merges(tmp_path: Path) -> None:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<eos>", "<bos>", *names, "▁", "a", "b", "\n", "▁a", "ab", "\n\n", "▁▁"]
    about = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": [3, 3, *[6] * 256, *[1] * 8],
        "merges": ["▁ ▁", "▁ a", "a b", "\n \n"],
        "bos_token_id": 1,
        "eos_token_id": 0,
        "add_bos_token": False,
    }
    tokenizer = read({f"tokenizer.ggml.{name}": value for name, value in about.items()}, tmp_path, "gemma3_text")
    encoded = tokenizer("ab a\n\n  é")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded) == ["<bos>", "ab", "▁a", "\n\n", "▁▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "ab a\n\n  é"


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_without_a_tokenizer_nothing_is_written(kind: str | None, tmp_path: Path) -> None:
    write_tokenizer({} if kind is None else {"tokenizer.ggml.model": kind}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "rwkv"}, "'rwkv'"),
        ({"pre": "unheard-of"}, "'unheard-of'"),
        ({"pre": None}, "converted again"),
        ({"pre": "default"}, "converted again"),
    ],
)
def test_an_unknown_kind_is_refused_by_name(
    plain: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        write_tokenizer(plain | {f"tokenizer.ggml.{name}": value for name, value in more.items()}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["never seen"]}, "do not fit"),
        ({"merges": ["alone"]}, "do not fit"),
        ({"token_type": [1, 1]}, "2 entries in tokenizer.ggml.token_type"),
        ({"eos_token_id": 9999}, "eos token is 9999"),
        ({"eos_token_id": None, "add_eos_token": True}, "none: eos"),
    ],
)
def test_metadata_that_does_not_fit_together_is_refused(
    plain: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(plain | {f"tokenizer.ggml.{name}": value for name, value in more.items()}, tmp_path)


def test_pieces_need_scores(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.ggml\.scores"):
        write_tokenizer(pieces(scores=None), tmp_path)
