"""What an answer must look like: JSON, a regular expression, a grammar, a choice, tagged pieces. Values."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from asyncengine.errors import InvalidRequestError

Whitespace = Literal["none", "bounded", "any"]
"""White space between the tokens of JSON: none; one space, or one line break with up to 16 spaces; or without limit."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object.

    Attributes:
        whitespace: ``"none"``, ``"bounded"`` or ``"any"``. Without a limit a weak model may pad until `max_tokens`.
    """

    whitespace: Whitespace = "bounded"

    def __post_init__(self) -> None:
        _whitespace(self.whitespace)


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that a schema accepts.

    Attributes:
        schema: A mapping, a bool, their JSON as text, or a pydantic model class. Kept as JSON text.
        whitespace: As in `JsonObject`.
    """

    schema: Any
    whitespace: Whitespace = "bounded"

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", _schema("response_format.schema", self.schema))
        _whitespace(self.whitespace)


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that a regular expression matches from its beginning to its end.

    Attributes:
        regex: In the syntax of Rust's regex crate, without look-around and back references.
    """

    regex: str

    def __post_init__(self) -> None:
        _text("response_format.regex", self.regex)


@dataclass(frozen=True, slots=True)
class EbnfGrammar:
    """Text of a context-free language.

    Attributes:
        grammar: In Lark's syntax (it begins at ``start``), or in the GBNF of llama.cpp (it begins at ``root``).
    """

    grammar: str

    def __post_init__(self) -> None:
        _text("response_format.grammar", self.grammar)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several texts.

    Attributes:
        choices: At least one; none empty.
    """

    choices: Iterable[str]

    def __post_init__(self) -> None:
        choices = self.choices
        if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
            raise InvalidRequestError(f"response_format.choice is {choices!r:.80}; expected a list of strings")
        choices = tuple(choices)
        if not choices:
            raise InvalidRequestError("response_format.choice is empty; allowed: at least one string")
        for choice in choices:
            if not isinstance(choice, str) or not choice:
                raise InvalidRequestError(f"response_format.choice has {choice!r}; allowed: non-empty strings")
        object.__setattr__(self, "choices", choices)


@dataclass(frozen=True, slots=True)
class StructuralTag:
    """A tagged piece: `begin`, JSON that `schema` accepts, `end`.

    Attributes:
        begin: Starts with one of the triggers.
        schema: As in `JsonSchema`.
        end: May be empty.
    """

    begin: str
    schema: Any
    end: str

    def __post_init__(self) -> None:
        _text("response_format.structures.begin", self.begin)
        if not isinstance(self.end, str):
            raise InvalidRequestError(f"response_format.structures.end is {self.end!r:.80}; expected a string")
        object.__setattr__(self, "schema", _schema("response_format.structures.schema", self.schema))


@dataclass(frozen=True, slots=True)
class StructuralTags:
    """Free text, in which a trigger begins a tagged piece; after it, free text again.

    Attributes:
        tags: At least one.
        triggers: Texts that cannot appear but as the beginning of a tag. None takes each tag's whole beginning.
        whitespace: As in `JsonObject`.
        free_text: Whether there may be text around the pieces. Without, the text is tagged pieces and nothing else.
        at_least_one: Whether there must be a piece before the text may end.
        stop_after_first: Whether the text ends with its first piece.
        otherwise: JSON that the text may be instead, whole; without `free_text` and `at_least_one`.
    """

    tags: Iterable[StructuralTag]
    triggers: Iterable[str] | None = None
    whitespace: Whitespace = "bounded"
    free_text: bool = True
    at_least_one: bool = False
    stop_after_first: bool = False
    otherwise: JsonObject | JsonSchema | None = None

    def __post_init__(self) -> None:
        tags = tuple(self.tags) if isinstance(self.tags, Iterable) else ()
        if not tags or not all(isinstance(tag, StructuralTag) for tag in tags):
            raise InvalidRequestError(
                f"response_format.structures is {self.tags!r:.80}; expected at least one StructuralTag"
            )
        if isinstance(self.triggers, str) or not isinstance(self.triggers, (Iterable, type(None))):
            raise InvalidRequestError(f"response_format.triggers is {self.triggers!r:.80}; expected a list of strings")
        triggers = tuple(dict.fromkeys(tag.begin for tag in tags) if self.triggers is None else self.triggers)
        for trigger in triggers:
            _text("response_format.triggers", trigger)
        for tag in tags:
            if not any(tag.begin.startswith(trigger) for trigger in triggers):
                raise InvalidRequestError(
                    f"response_format.structures has begin {tag.begin!r}; it must start with one of the triggers "
                    f"{', '.join(map(repr, triggers)) or '(none)'}"
                )
        object.__setattr__(self, "tags", tags)
        object.__setattr__(self, "triggers", triggers)
        _whitespace(self.whitespace)
        for name in _TAG_SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(
                    f"response_format.{name} is {getattr(self, name)!r:.80}; allowed: True, False"
                )
        if self.otherwise is None:
            return
        if not isinstance(self.otherwise, (JsonObject, JsonSchema)):
            raise InvalidRequestError(
                f"response_format.otherwise is {self.otherwise!r:.80}; expected JsonObject, JsonSchema or None"
            )
        if self.free_text or self.at_least_one:
            raise InvalidRequestError("response_format.otherwise is given; allowed without free_text and at_least_one")


ResponseFormat = JsonObject | JsonSchema | Regex | EbnfGrammar | Choice | StructuralTags


def response_format(value: object) -> ResponseFormat | None:
    """One of the classes above, from itself or from a mapping in the shape of OpenAI's API and vLLM's additions to it.

    Raises:
        InvalidRequestError: Anything else; the message names the key.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"response_format is {value!r:.80}; expected a mapping with 'type', or one of "
            f"{', '.join(known.__name__ for known in get_args(ResponseFormat))}"
        )
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise InvalidRequestError(
            f"response_format.type is {kind!r:.80}; allowed: {', '.join(map(repr, _KEYS))}{_near(kind, _KEYS)}"
        )
    _known(f"response_format ({kind})", value, _KEYS[kind])
    space = value.get("whitespace", "bounded")
    match kind:
        case "text":
            return None
        case "json_object":
            return JsonObject(space)
        case "json_schema":
            inner = _need(value, "json_schema")
            if not isinstance(inner, Mapping):
                raise InvalidRequestError(
                    f"response_format.json_schema is {inner!r:.80}; expected a mapping with 'schema'"
                )
            _known("response_format.json_schema", inner, ("schema", "name", "strict", "description"))
            return JsonSchema(_need(inner, "schema", "json_schema."), space)
        case "regex":
            return Regex(_need(value, "regex"))
        case "grammar":
            return EbnfGrammar(_need(value, "grammar"))
        case "choice":
            return Choice(_need(value, "choice"))
    structures = _need(value, "structures")
    if isinstance(structures, (str, Mapping)) or not isinstance(structures, Iterable):
        raise InvalidRequestError(f"response_format.structures is {structures!r:.80}; expected a list of mappings")
    switches = {name: value[name] for name in _TAG_SWITCHES if name in value}
    return StructuralTags([_tag(entry) for entry in structures], value.get("triggers"), space, **switches)


_TAG_SWITCHES = ("free_text", "at_least_one", "stop_after_first")
_KEYS: dict[str, tuple[str, ...]] = {
    "text": ("type",),
    "json_object": ("type", "whitespace"),
    "json_schema": ("type", "json_schema", "whitespace"),
    "regex": ("type", "regex"),
    "grammar": ("type", "grammar"),
    "choice": ("type", "choice"),
    "structural_tag": ("type", "structures", "triggers", "whitespace", *_TAG_SWITCHES),
}


def _tag(entry: object) -> StructuralTag:
    if isinstance(entry, StructuralTag):
        return entry
    if not isinstance(entry, Mapping):
        raise InvalidRequestError(f"response_format.structures has {entry!r:.80}; expected a mapping with 'begin'")
    _known("response_format.structures", entry, ("begin", "schema", "end"))
    where = "structures."
    return StructuralTag(_need(entry, "begin", where), entry.get("schema", True), _need(entry, "end", where))


def _need(values: Mapping[str, Any], key: str, where: str = "") -> Any:
    if key not in values:
        raise InvalidRequestError(f"response_format.{where}{key} is missing")
    return values[key]


def _known(where: str, values: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise InvalidRequestError(
                f"{where} has unknown key {key!r:.80}; known: {', '.join(map(repr, known))}{_near(key, known)}"
            )


def _near(key: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{name} is {value!r:.80}; expected a non-empty string")


def _whitespace(value: object) -> None:
    if value not in get_args(Whitespace):
        allowed = ", ".join(map(repr, get_args(Whitespace)))
        raise InvalidRequestError(f"response_format.whitespace is {value!r:.80}; allowed: {allowed}")


def _schema(name: str, value: Any) -> str:
    """The schema's JSON. Keys keep their order: it is the order in which properties are generated."""
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{name} is {value!r:.80}; it is not JSON: {error}") from error
    if not isinstance(value, (Mapping, bool)):
        raise InvalidRequestError(f"{name} is {value!r:.80}; expected a mapping, True, or JSON text of one")
    try:
        return json.dumps(value if isinstance(value, bool) else dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} cannot be written as JSON: {error}") from error
