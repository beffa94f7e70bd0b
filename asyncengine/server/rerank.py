"""``/score`` and ``/rerank``: vLLM's and Jina's, for models that say how far a document answers a query."""

from __future__ import annotations

import itertools

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asyncengine.outputs import Relevance
from asyncengine.server.answer import now
from asyncengine.server.reading import CUT, ReadingBody, ReadingUsage, check_count, found, options_of
from asyncengine.server.refusal import Refusal
from asyncengine.server.service import Service, reply
from asyncengine.server.wire import Body

_FORMS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""What vLLM calls the two sides."""

_SAME = {name: name for name in ("instruction", CUT)}
"""Fields that the engine calls as the routes do."""

Texts = str | list[str]


class RelevanceBody(ReadingBody, kw_only=True):
    """What both take."""

    instruction: str | None = None
    use_activation: bool = True


class ScoreBody(RelevanceBody, kw_only=True):
    """What ``/score`` takes: the two sides, by one of the pairs of names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class DocumentText(msgspec.Struct, forbid_unknown_fields=True):
    """A document as Jina's clients may send it, and as it comes back."""

    text: str


class RerankBody(RelevanceBody, kw_only=True):
    """What ``/rerank`` takes."""

    query: str
    documents: list[str | DocumentText]
    top_n: int = 0
    return_documents: bool = True


class ScoreItem(msgspec.Struct):
    """How far the second of two texts answers the first."""

    index: int
    score: float
    object: str = "score"


class Scores(msgspec.Struct):
    """The answer of ``/score``."""

    id: str
    created: int
    model: str
    data: list[ScoreItem]
    usage: ReadingUsage
    object: str = "list"


class RankedDocument(msgspec.Struct, omit_defaults=True):
    """One document of the answer."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class Ranking(msgspec.Struct):
    """The answer of ``/rerank``: the most relevant first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: ReadingUsage


_REFUSED = {"max_tokens_per_doc": "use truncate_prompt_tokens, which counts the query as well"}
SCORE = Body(ScoreBody, ignored=frozenset({"user"}), refused=_REFUSED)
RERANK = Body(RerankBody, ignored=frozenset({"user"}), refused=_REFUSED)


def routes(service: Service) -> list[Route]:
    """The routes, each under the names that clients look for it by."""

    async def score(request: Request) -> Response:
        body, headers = await service.read(request, SCORE)
        pairs, names = _sides(body)
        request.state.names = names
        answer = await _found(request, body, pairs, "score")
        if answer is None:
            return Response(status_code=499)
        id, model, read = answer
        items = [ScoreItem(each.index, _number(each, body)) for each in read]
        return reply(Scores(id, now(), model, items, _usage(read)), headers=headers)

    async def rerank(request: Request) -> Response:
        request.state.names = {"prompt": "documents", "prompts": "documents", **_SAME}
        body, headers = await service.read(request, RERANK)
        if body.top_n < 0:
            raise Refusal(
                400, f"top_n is {body.top_n}; allowed: integers >= 0, where 0 is all", "invalid_field", "top_n"
            )
        if not body.documents:
            raise Refusal(400, "documents is []; expected at least one", "invalid_field", "documents")
        check_count(len(body.documents), "documents")
        documents = [each if isinstance(each, str) else each.text for each in body.documents]
        answer = await _found(request, body, [(body.query, document) for document in documents], "rerank")
        if answer is None:
            return Response(status_code=499)
        id, model, read = answer
        ranked = sorted(read, key=lambda each: -each.logit)[: body.top_n or None]
        results = [
            RankedDocument(
                each.index,
                _number(each, body),
                DocumentText(documents[each.index]) if body.return_documents else None,
            )
            for each in ranked
        ]
        return reply(Ranking(id, model, results, _usage(read)), headers=headers)

    async def _found(
        request: Request, body: RelevanceBody, pairs: list[tuple[str, str]], prefix: str
    ) -> tuple[str, str, list[Relevance]] | None:
        served = service.check_serving(body.model)
        options = options_of(body, prefix, request, served)
        assert options.request_id is not None
        asked = service.engine.relevances(
            pairs,
            service.settings.rerank_prompt,
            instruction=body.instruction,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            options=options,
        )
        read = await found(service, request, asked)
        return None if read is None else (options.request_id, served.name, read)

    scores = [Route(path, score, methods=["POST"]) for path in ("/score", "/v1/score")]
    return scores + [Route(path, rerank, methods=["POST"]) for path in ("/rerank", "/v1/rerank", "/v2/rerank")]


def _sides(body: ScoreBody) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The pairs that are to be scored, and what the engine's names of fields are in the body.

    Raises:
        Refusal: There are not two sides, or they do not go together.
    """
    given = {name for form in _FORMS for name in form if getattr(body, name) is not None}
    form = next((form for form in _FORMS if given == set(form)), None)
    if form is None:
        forms = ", ".join(" and ".join(form) for form in _FORMS)
        raise Refusal(400, f"expected one of {forms}; found {sorted(given)}", "invalid_field", _FORMS[0][0])
    one, other = (
        [side] if isinstance(side, str) else side for side in (getattr(body, form[0]), getattr(body, form[1]))
    )
    for name, side in zip(form, (one, other), strict=True):
        if not side:
            raise Refusal(400, f"{name} is []; expected at least one text", "invalid_field", name)
        check_count(len(side), name)
    if len(one) not in (1, len(other)):
        message = f"{form[0]} has {len(one)} entries; allowed: 1, or as many as {form[1]}, {len(other)}"
        raise Refusal(400, message, "invalid_field", form[0])
    names = {"prompt": form[1], "prompts": form[1], **_SAME}
    return list(zip(itertools.islice(itertools.cycle(one), len(other)), other, strict=True)), names


def _number(each: Relevance, body: RelevanceBody) -> float:
    return each.score if body.use_activation else each.logit


def _usage(read: list[Relevance]) -> ReadingUsage:
    tokens = sum(each.usage.prompt_tokens for each in read)
    return ReadingUsage(tokens, tokens)
