"""`GenerationConfig`: what one request asks for, and its resolved form. Values; no torch, no asyncio."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args

from asyncengine.errors import InvalidRequestError
from asyncengine.generation_fields import (
    bad_words_of,
    bias_of,
    check_integer,
    check_number,
    processors_of,
    stop_strs_of,
    token_ids_of,
)
from asyncengine.grammar.protocol import Grammar
from asyncengine.logits_processor import LogitsProcessor
from asyncengine.response_format import ResponseFormat, response_format

LogprobsMode = Literal["raw", "masked", "processed"]
EarlyStopping = bool | Literal["never"]

MAX_BRANCHES = 1024
MAX_BEAMS = 64
GREEDY_BELOW = 1e-5
"""Temperatures below it mean 0: dividing by them would overflow."""
MAX_FACTOR = 1e20
"""Largest temperature and repetition penalty, and one over the smallest penalty. Logits times it fit into float32."""
MAX_LENGTH_PENALTY = 5.0
"""Of a beam search: the length of a long text to this power fits into float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How to generate. A field that is None takes the model's default, then the one named here.

    The order of logit processing: logit bias; presence, frequency and repetition penalty; logits processors; the masks
    (min-tokens, allowed tokens, bad words, grammar); temperature; top-k; min-p; top-p; draw.

    Attributes:
        n: Number of branches, 1 to 1024. The prompt is computed once and shared.
        temperature: In [0, 1e20]; 0 (and anything below 1e-5) takes the most likely token. Default 1.
        top_p: In (0, 1]. Nucleus sampling (Holtzman et al., 2019). Default 1.
        top_k: >= 1, or None for off.
        min_p: In [0, 1]. Tokens below min_p times the likeliest are dropped (Nguyen et al., 2024). Default 0.
        frequency_penalty: In [-2, 2], as in OpenAI's API. Default 0.
        presence_penalty: In [-2, 2], as in OpenAI's API. Default 0.
        repetition_penalty: In [1e-20, 1e20] (Keskar et al., 2019). Counts prompt and output. Default 1.
        logprobs: Whether to return the log-probability of each generated token.
        top_logprobs: 0 to 20. How many alternatives to return beside it; needs ``logprobs=True``.
        logprobs_mode: ``"raw"``: of the model's own distribution. ``"masked"``: of what may be drawn, so behind bias,
            penalties, processors and masks, before temperature and filters. ``"processed"``: of the one drawn from.
        logit_bias: Token id to a bias in [-100, 100].
        max_tokens: >= 0. Most tokens to generate per branch; None is as many as fit.
        min_tokens: >= 0. No stop token may be drawn before this many tokens; stop strings still end a branch.
        seed: Any integer. Branch i draws from the stream seed + i. None takes a fresh one.
        stop_strs: One string or several (at most 128 of at most 1024 characters), none empty. The text ends before
            the first that appears.
        stop_token_ids: Further tokens that end a branch. Like the end-of-sequence token, the one that stopped the
            branch is part of `token_ids` and `logprobs` but not of the text.
        ignore_eos: Whether to go on after the end-of-sequence token.
        skip_special_tokens: Whether special tokens are left out of the text.
        detokenize: Whether outputs carry text.
        response_format: What the text must look like: `JsonObject`, `JsonSchema`, `Regex`, `EbnfGrammar`, `Choice`,
            `StructuralTags`, or a mapping in OpenAI's shape. Where nothing can follow, the branch ends with "stop".
        jump_forward: Whether tokens that the response format leaves no choice about are taken together in one step. It
            changes no token. Requests with logprobs or logits processors do not jump.
        allowed_token_ids: The only tokens that may be drawn; None allows all. An end-of-sequence token is not added.
        bad_words: Sequences that must not appear, each as token ids or as text. A text stands for the tokens that the
            tokenizer makes of it, with and without a space before it. Its last token is never drawn after the others.
        logits_processors: Called in turn with the logits of each of the request's rows; see `LogitsProcessor`.
        prompt_logprobs: 0 to 20. Returns the log-probability of each token of the prompt but the first, and this many
            of the likeliest beside it. None does not.
        num_beams: 1 to 64. More than 1 is a beam search of that width, as transformers has it: nothing is drawn, the n
            likeliest texts that it finds are the branches, best first, and all of them come when it is over. Without
            temperature, top-k, top-p, min-p and stop strings.
        length_penalty: In [-5, 5], only with a beam search. What a text's log-probability is divided by is its number
            of tokens to this power. Default: the checkpoint's, then 1.
        early_stopping: Only with a beam search: when it is over. True: when there are as many texts as beams. False:
            when none of the beams, as they are, is likelier than the texts. ``"never"``: when none can become so.
            Default: the checkpoint's, then False.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    logprobs_mode: LogprobsMode = "raw"
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None
    stop_strs: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    response_format: ResponseFormat | Mapping[str, Any] | None = None
    jump_forward: bool = True
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str | Iterable[int]] = ()
    logits_processors: Iterable[LogitsProcessor] = ()
    prompt_logprobs: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1, MAX_BRANCHES)
        check_number("temperature", self.temperature, 0.0, MAX_FACTOR)
        check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_integer("top_k", self.top_k, 1, None, optional=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 1 / MAX_FACTOR, MAX_FACTOR)
        for name in ("logprobs", "ignore_eos", "skip_special_tokens", "detokenize", "jump_forward"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}; expected True or False")
        check_integer("top_logprobs", self.top_logprobs, 0, 20)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(f"top_logprobs is {self.top_logprobs}; it needs logprobs=True")
        if self.logprobs_mode not in get_args(LogprobsMode):
            modes = ", ".join(map(repr, get_args(LogprobsMode)))
            raise InvalidRequestError(f"logprobs_mode is {self.logprobs_mode!r}; allowed: {modes}")
        object.__setattr__(self, "logit_bias", bias_of(self.logit_bias))
        check_integer("max_tokens", self.max_tokens, 0, None, optional=True)
        check_integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens is {self.min_tokens}; allowed: 0..max_tokens = {self.max_tokens}")
        check_integer("seed", self.seed, None, None, optional=True)
        object.__setattr__(self, "stop_strs", stop_strs_of(self.stop_strs))
        object.__setattr__(self, "stop_token_ids", token_ids_of("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "response_format", response_format(self.response_format))
        if self.allowed_token_ids is not None:
            allowed = token_ids_of("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise InvalidRequestError("allowed_token_ids is empty; allowed: at least one token id, or None")
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(allowed)))
        object.__setattr__(self, "bad_words", bad_words_of(self.bad_words))
        object.__setattr__(self, "logits_processors", processors_of(self.logits_processors))
        check_integer("prompt_logprobs", self.prompt_logprobs, 0, 20, optional=True)
        check_integer("num_beams", self.num_beams, 1, MAX_BEAMS)
        check_number("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        early = self.early_stopping
        if not (early is None or isinstance(early, bool) or (isinstance(early, str) and early == "never")):
            raise InvalidRequestError(f"early_stopping is {self.early_stopping!r:.80}; allowed: True, False, 'never'")
        _check_search(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Builds a configuration from a mapping of field names.

        Raises:
            InvalidRequestError: An unknown key (with the nearest known one), or a wrong value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                begun = [name for name in known if name.startswith(f"{key}_")]  # OpenAI's "stop" is "stop_strs"
                near = begun or difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise InvalidRequestError(f"unknown generation key {key!r}{hint}")
        return cls(**values)

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with some fields changed.

        Raises:
            InvalidRequestError: As `from_dict`.
        """
        return GenerationConfig.from_dict({f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes)

    def without_search(self) -> GenerationConfig:
        """A copy without a beam search: its tokens are drawn."""
        return self.replace(num_beams=1, length_penalty=None, early_stopping=None)


@dataclass(frozen=True, slots=True)
class SearchParams:
    """A beam search with every default filled in.

    Attributes:
        num_beams: Its width, at least 2.
        length_penalty: As in `GenerationConfig`.
        early_stopping: As in `GenerationConfig`.
        forced: Tokens at the end of the prompt that count as a text's: those that a checkpoint forces to be written.
    """

    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    forced: int = 0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """A `GenerationConfig` with every default filled in: what the step thread and the sampler see.

    Attributes:
        top_k: 0 is off.
        max_tokens: Exact number of tokens that may still be drawn per branch; already capped by every length limit.
        stop_token_ids: Everything that ends a branch, the end-of-sequence tokens included unless they are ignored.
        seed: In [0, 2**64).
        num_logprobs: -1: none. 0: of the drawn token only. k: with the k likeliest beside it.
        ignore_eos: Whether the end-of-sequence tokens do not end a branch.
        grammar: The compiled `response_format`.
        jumps: Whether tokens without a choice are taken together.
        allowed_token_ids: None allows all.
        bad_words: Token sequences.
        num_prompt_logprobs: As `num_logprobs`, of the prompt's tokens.
        search: The beam search; None where tokens are drawn.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    num_logprobs: int
    logprobs_mode: LogprobsMode
    logit_bias: tuple[tuple[int, float], ...]
    max_tokens: int
    min_tokens: int
    seed: int
    stop_strs: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    skip_special_tokens: bool
    detokenize: bool
    ignore_eos: bool = False
    grammar: Grammar | None = None
    jumps: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()
    num_prompt_logprobs: int = -1
    search: SearchParams | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences are computed at the same time: the branches, or the beams."""
        return self.n if self.search is None else self.search.num_beams

    @property
    def num_candidates(self) -> int:
        """How many of each beam's likeliest tokens a search looks at: so many that enough of them do not end a text."""
        return self.num_sequences * max(2, 1 + len(self.ending_token_ids))

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text of a search: the stop tokens, and those by which its grammar ends."""
        more = () if self.grammar is None else self.grammar.end_token_ids
        return tuple(dict.fromkeys((*self.stop_token_ids, *more)))

    @property
    def remembers(self) -> bool:
        """Whether what may be written depends on what was written before."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty)
        return self.follows_tokens or penalties != (0.0, 0.0, 1.0)

    @property
    def follows_tokens(self) -> bool:
        """Whether what may be drawn depends, on the host, on the tokens that were drawn before."""
        return self.grammar is not None or bool(self.bad_words or self.logits_processors)


def resolve(
    config: GenerationConfig,
    defaults: GenerationConfig,
    *,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    max_tokens: int,
    seed: int,
    grammar: Grammar | None = None,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """Fills `config` with `defaults` and the model's limits.

    Args:
        config: What the caller asked for.
        defaults: The model's own defaults.
        vocab_size: Token ids must lie below it.
        eos_token_ids: End a branch unless `config.ignore_eos`.
        max_tokens: The most that any length limit leaves room for.
        seed: Taken when the caller gave none.
        grammar: The compiled `config.response_format`.
        bad_words: `config.bad_words` as tokens.

    Raises:
        InvalidRequestError: A token id outside the vocabulary, or no token that may be drawn.
    """

    def value(name: str, otherwise: float) -> float:
        own = getattr(config, name)
        own = getattr(defaults, name) if own is None else own
        return float(otherwise if own is None else own)

    assert isinstance(config.stop_token_ids, tuple) and isinstance(config.stop_strs, tuple)
    assert isinstance(config.allowed_token_ids, (tuple, NoneType)) and isinstance(config.logits_processors, tuple)
    bias = tuple(sorted((config.logit_bias or {}).items()))
    for name, ids in (
        ("stop_token_ids", config.stop_token_ids),
        ("logit_bias", tuple(i for i, _ in bias)),
        ("allowed_token_ids", config.allowed_token_ids or ()),
        ("bad_words", tuple(i for word in bad_words for i in word)),
    ):
        for token_id in ids:
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"{name} has token id {token_id}; allowed: 0..{vocab_size - 1} (vocabulary of {vocab_size})"
                )
    stop_ids = config.stop_token_ids if config.ignore_eos else config.stop_token_ids + eos_token_ids
    top_k = config.top_k if config.top_k is not None else defaults.top_k
    temperature = value("temperature", 1.0) if config.num_beams == 1 else 0.0
    if config.max_tokens is not None:
        max_tokens = min(config.max_tokens, max_tokens)
    min_tokens = min(config.min_tokens, max_tokens)
    if config.allowed_token_ids is not None:
        never = {word[0] for word in bad_words if len(word) == 1} | set(stop_ids if min_tokens else ())
        if not set(config.allowed_token_ids) - never:
            raise InvalidRequestError(
                f"allowed_token_ids has {_some(config.allowed_token_ids)}; all of them are forbidden by bad_words or, "
                f"with min_tokens = {config.min_tokens}, as stop tokens"
            )
    if grammar is not None and config.num_beams > 1 and not grammar.end_token_ids:
        raise InvalidRequestError(
            f"num_beams is {config.num_beams} and response_format is given: a beam search ends texts by an "
            "end-of-sequence token, and the model has none"
        )
    return SamplingParams(
        n=config.n,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=value("top_p", 1.0),
        top_k=0 if top_k is None or top_k >= vocab_size else top_k,
        min_p=value("min_p", 0.0),
        frequency_penalty=value("frequency_penalty", 0.0),
        presence_penalty=value("presence_penalty", 0.0),
        repetition_penalty=value("repetition_penalty", 1.0),
        num_logprobs=config.top_logprobs if config.logprobs else -1,
        logprobs_mode=config.logprobs_mode,
        logit_bias=bias,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=(seed if config.seed is None else config.seed) % 2**64,
        stop_strs=config.stop_strs,
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        skip_special_tokens=config.skip_special_tokens,
        detokenize=config.detokenize,
        ignore_eos=config.ignore_eos,
        grammar=grammar,
        jumps=grammar is not None
        and config.jump_forward
        and config.num_beams == 1
        and not config.logprobs
        and not config.logits_processors,
        allowed_token_ids=config.allowed_token_ids,
        bad_words=bad_words,
        logits_processors=config.logits_processors,
        num_prompt_logprobs=-1 if config.prompt_logprobs is None else config.prompt_logprobs,
        search=_search(config, defaults),
    )


def _search(config: GenerationConfig, defaults: GenerationConfig) -> SearchParams | None:
    if config.num_beams == 1:
        for name in ("length_penalty", "early_stopping"):
            if (value := getattr(config, name)) is not None:
                raise InvalidRequestError(f"{name} is {value!r}; it needs a beam search: num_beams of 2 or more")
        return None
    penalty = defaults.length_penalty if config.length_penalty is None else config.length_penalty
    stopping = defaults.early_stopping if config.early_stopping is None else config.early_stopping
    return SearchParams(config.num_beams, 1.0 if penalty is None else float(penalty), stopping or False)


def _check_search(config: GenerationConfig) -> None:
    """Raises InvalidRequestError where the fields of a beam search do not go together with others."""
    if config.num_beams == 1:
        return
    if config.n > config.num_beams:
        raise InvalidRequestError(f"n is {config.n}; allowed: 1..num_beams = {config.num_beams}")
    if config.stop_strs:
        raise InvalidRequestError(
            f"stop_strs is {config.stop_strs!r:.80}; a beam search (num_beams = {config.num_beams}) has stop_token_ids "
            "alone"
        )
    drawn = (("temperature", 0), ("top_p", 1), ("top_k", None), ("min_p", 0))
    for name, off in drawn:
        if (value := getattr(config, name)) not in (None, off):
            raise InvalidRequestError(
                f"{name} is {value!r}; a beam search (num_beams = {config.num_beams}) draws nothing: leave it out"
            )
    if config.logprobs_mode != "raw":
        raise InvalidRequestError(
            f"logprobs_mode is {config.logprobs_mode!r}; a beam search (num_beams = {config.num_beams}) has those that "
            "it adds up: leave it out"
        )


def _some(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids[:8])) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")
