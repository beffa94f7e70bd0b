"""`EngineReadings`: what an engine reads off prompts without writing to them. Lives on event loops."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio.to_thread

from asyncengine.classifier import sigmoid
from asyncengine.errors import InvalidRequestError, RequestDroppedError
from asyncengine.generation import GenerationConfig
from asyncengine.loop.embedding import ClassificationOptions, EmbeddingOptions, Reading
from asyncengine.loop.encoding import AnyPrompt, Conversation, Cut, Prompt, PromptedText
from asyncengine.loop.many import ManyStream
from asyncengine.loop.pairs import Pair, TextPair, how_to_rank, instruction_of, log_odds, yes_or_no
from asyncengine.loop.prefixes import EnginePrefixes
from asyncengine.loop.prepare import GENERATION, Purpose, RequestOptions
from asyncengine.loop.stream import RequestStream
from asyncengine.media import AudioPrompt, ImagePrompt, VideoPrompt
from asyncengine.outputs import Classification, Embedding, FinishReason, Pooling, PromptScore, Relevance, Usage
from asyncengine.reranking import RerankPrompt
from asyncengine.step.model import ModelView
from asyncengine.tokenizer import Message

DEFAULTS = RequestOptions()

Configured = GenerationConfig | None | Callable[[ModelView], GenerationConfig]
"""How to generate; or what says so of the model that there is."""

_INLINE_PRODUCTS = 1 << 22
"""Of heads, that are computed on the loop: about a millisecond."""
_PROMPT_ALONE = GenerationConfig(max_tokens=0, detokenize=False)


class EngineReadings(EnginePrefixes):
    """Scores, embeds, classifies and ranks; nothing is generated that a caller would read."""

    @abstractmethod
    async def _add(
        self,
        prompts: Sequence[AnyPrompt],
        configs: Sequence[Configured],
        options: RequestOptions,
        purpose: Purpose = GENERATION,
        many: bool = False,
    ) -> list[RequestStream]:
        """Adds requests and returns their streams once they are admitted.

        Args:
            prompts: One of each.
            configs: Another.
            options: For all; of `many`, their ids get the index appended.
            purpose: Of all.
            many: Whether they are of a call that is given several, so that an error names the prompt that is wrong.
        """

    async def score(
        self, prompts: Sequence[Prompt], top_logprobs: int = 0, options: RequestOptions = DEFAULTS
    ) -> list[PromptScore]:
        """How likely texts are under the model; nothing is generated.

        Args:
            prompts: Text or token ids, each.
            top_logprobs: 0 to 20. How many of the likeliest tokens to name at each position.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Raises:
            AsyncEngineError: As `generate`.

        Cancelling it ends the requests.
        """
        config = GenerationConfig(max_tokens=0, prompt_logprobs=top_logprobs, detokenize=False)
        wanted = checked_prompts(prompts)
        scores = []
        for result in await ManyStream(lambda: self._add(wanted, [config] * len(wanted), options, many=True)):
            check_computed(result.request_id, result.finish_reason is FinishReason.LENGTH)
            assert result.prompt_token_ids is not None and result.prompt_logprobs is not None
            scores.append(PromptScore(result.prompt_token_ids, result.prompt_logprobs))
        return scores

    async def embed(
        self,
        prompts: Sequence[Prompt],
        pooling: Pooling | None = None,
        *,
        normalize: bool = True,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> list[Embedding]:
        """Texts as vectors: the model's hidden states behind its last norm, pooled. Nothing is generated.

        The prompts are computed in the same steps as everything else. A mean is over all tokens that the tokenizer
        makes of a text, those that it adds included.

        Args:
            prompts: Text or token ids, each.
            pooling: ``"mean"``, ``"last"``, the last token's, or, of an encoder, ``"cls"``, the first one's. None is
                what the checkpoint says (``1_Pooling/config.json``), and without that the mean.
            normalize: Whether the vectors have length 1.
            dimensions: How many numbers are kept of each vector, from the front; None keeps all.
            prompt_name: What the texts are for: ``"query"``, ``"document"``, or what else the checkpoint has a text for
                that is put in front of them (``config_sentence_transformers.json``). None puts nothing there.
            truncate_prompt_tokens: How many tokens a prompt may have, special ones included: the end of what is longer
                is left out. -1 is as many as the model takes; None refuses what is longer than that.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Raises:
            AsyncEngineError: As `generate`.

        Cancelling it ends the requests.
        """
        wanted = EmbeddingOptions(pooling=pooling, normalize=normalize, dimensions=dimensions)
        texts = _prompted(checked_prompts(prompts), prompt_name)
        found = await self._read(await self._cut(texts, truncate_prompt_tokens), wanted, options)
        return [Embedding(wanted.vector(_pooled(stream)), usage) for stream, usage in found]

    async def classify(
        self,
        prompts: Sequence[Prompt | Sequence[Message] | tuple[str, str]],
        options: RequestOptions = DEFAULTS,
        *,
        truncate_prompt_tokens: int | None = None,
        **template_arguments: Any,
    ) -> list[Classification]:
        """What a model with a classification head says of texts or conversations: labels, guards, rewards.

        The hidden state of each prompt's last token, behind the model's last norm, goes through the head, in float32;
        an encoder has a head of its own. The prompts are computed in the same steps as everything else, and take what
        they can from the prefix cache.

        Args:
            prompts: Text, token ids, a conversation or, for an encoder, a tuple of two texts, each. A conversation is a
                list of messages as of `chat`; it is written by the chat template without the beginning of another turn
                (``add_generation_prompt=False``).
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.
            truncate_prompt_tokens: How many tokens a prompt may have, special ones included: the end of what is longer
                is left out. -1 is as many as the model takes; None refuses what is longer than that.
                A conversation cannot be cut.
            **template_arguments: Passed to the chat template.

        Returns:
            One per prompt, in order: ``logits`` and ``probs`` of shape ``(labels,)``, and the labels.

        Raises:
            InvalidRequestError: The model has no such head; or as `generate`.
            AsyncEngineError: As `generate`.

        Cancelling it ends the requests.
        """
        said = [_said(prompt, template_arguments) for prompt in checked_prompts(prompts)]
        wanted = await self._cut(said, truncate_prompt_tokens)
        return await _classified(await self._read(wanted, ClassificationOptions(), options))

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        prompt: RerankPrompt | None = None,
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> list[Relevance]:
        """How far documents answer a query: by a classification head of one label, or by the model's "yes" or "no".

        Each document is a prompt of its own, in the same steps as everything else; what they have in common at the
        front, the query, is in the prefix cache for those that come after the first ones. A model without such a head
        is asked for the logits of two tokens after the prompt, as the Qwen3-Reranker models are.

        Args:
            query: What is looked for.
            documents: Where.
            prompt: How the two become a prompt. None is what the checkpoint says, if it does: the files of Sentence
                Transformers (``modules.json`` with a ``LogitScore``).
            instruction: What makes a document relevant; None is that of `prompt`.
            truncate_prompt_tokens: How many tokens query and document may come to, with all that is around them: the
                end of a document that is longer is left out. -1 is as many as the model takes; None refuses it.
            options: For all; ``request_id`` gets ``-0``, ``-1``, ... appended.

        Returns:
            One per document, the most relevant first; equal ones in their order.

        Raises:
            InvalidRequestError: The model cannot rank, or it is not known how; or as `generate`.
            AsyncEngineError: As `generate`.

        Cancelling it ends the requests.
        """
        found = await self.relevances(
            _pairs(query, documents),
            prompt,
            instruction=instruction,
            truncate_prompt_tokens=truncate_prompt_tokens,
            options=options,
        )
        return sorted(found, key=lambda each: -each.logit)

    async def relevances(
        self,
        pairs: Sequence[tuple[str, str]],
        prompt: RerankPrompt | None = None,
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
        options: RequestOptions = DEFAULTS,
    ) -> list[Relevance]:
        """How far the second of each two texts answers the first, in their order; else as `rerank`.

        Args:
            pairs: A query and a document, each.
            prompt: As in `rerank`.
            instruction: As in `rerank`.
            truncate_prompt_tokens: As in `rerank`.
            options: As in `rerank`.

        Raises:
            AsyncEngineError: As `rerank`.

        Cancelling it ends the requests.
        """
        if prompt is not None and not isinstance(prompt, RerankPrompt):
            raise InvalidRequestError(f"prompt is {prompt!r:.80}; expected RerankPrompt(...) or None")
        view = await self._view()
        instruction_of(how_to_rank(prompt, view), instruction)
        # Another model may be loaded before they are admitted: each of these settles for itself how to rank.
        asked_of = [Pair(*pair, prompt, instruction) for pair in checked_pairs(pairs)]
        prompts = await self._cut(asked_of, truncate_prompt_tokens)
        if view.classifier is not None:
            read = await self._read(prompts, ClassificationOptions(), options)
            logits = [(_only(each, view).score, each.usage) for each in await _classified(read)]
        else:
            asked: dict[int, GenerationConfig] = {}  # of each model that the requests were prepared for

            def ask(view: ModelView) -> GenerationConfig:
                if view.epoch not in asked:
                    asked[view.epoch] = yes_or_no(how_to_rank(prompt, view), view)
                return asked[view.epoch]

            logits = []
            for result in await ManyStream(lambda: self._add(prompts, [ask] * len(prompts), options, many=True)):
                check_computed(result.request_id, bool(result.token_ids))
                logits.append((log_odds(asked[max(asked)], result), result.usage))
        return [Relevance(index, logit, sigmoid(logit), usage) for index, (logit, usage) in enumerate(logits)]

    async def _cut(self, prompts: list[Any], most: int | None) -> list[Any]:
        """Prompts that are cut if they are too long.

        Raises:
            InvalidRequestError: `most` is no number of tokens that the model takes, or there is a prompt that cannot be
                cut, or has in front of it what the model's checkpoint does not know.
        """
        if prompts and isinstance(prompts[0], PromptedText):
            prompts[0].written(await self._view())
        if most is None:
            return prompts
        if isinstance(most, bool) or not isinstance(most, int) or most < -1 or not most:
            raise InvalidRequestError(f"truncate_prompt_tokens is {most!r:.80}; allowed: integers >= 1, -1, or None")
        for prompt in prompts:
            if isinstance(prompt, (Conversation, ImagePrompt, AudioPrompt, VideoPrompt)):
                what = "conversations" if isinstance(prompt, Conversation) else "prompts with images, audio or videos"
                raise InvalidRequestError(f"truncate_prompt_tokens is {most}; {what} cannot be cut")
        Cut("", most).within(await self._view())
        return [Cut(prompt, most) for prompt in prompts]

    async def _read(
        self, prompts: Sequence[AnyPrompt], reading: Reading, options: RequestOptions
    ) -> list[tuple[RequestStream, Usage]]:
        """Requests that have ended, whose hidden states are wanted, and what they cost."""
        configs = [_PROMPT_ALONE] * len(prompts)
        many = ManyStream(lambda: self._add(prompts, configs, options, Purpose(reading=reading), many=True))
        results = await many
        return [(stream, result.usage) for stream, result in zip(many.streams, results, strict=True)]


def check_computed(request_id: str, computed: bool) -> None:
    """Raises RequestDroppedError if a request has ended before its prompt was computed."""
    if not computed:
        raise RequestDroppedError(f"request {request_id}: it was aborted before its prompt was computed")


def _prompted(prompts: list[Any], name: str | None) -> list[Any]:
    """Texts behind what the checkpoint puts in front of them for a purpose.

    Raises:
        InvalidRequestError: The name is no string, or a prompt is no text.
    """
    if name is None:
        return prompts
    if not isinstance(name, str):
        raise InvalidRequestError(f"prompt_name is {name!r:.80}; expected a string or None")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InvalidRequestError(
                f"prompt_name is {name!r:.80}; it is for texts alone, and there is {prompt!r:.40}"
            )
    return [PromptedText(prompt, name) for prompt in prompts]


def checked_prompts(prompts: Any) -> list[Any]:
    """A list of prompts; raises InvalidRequestError if it is something else."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequestError(f"prompts is {prompts!r:.80}; expected a list of prompts")
    return list(prompts)


def _pooled(stream: RequestStream) -> Any:
    check_computed(stream.request_id, stream.pooled is not None)
    return stream.pooled


async def _classified(read: Sequence[tuple[RequestStream, Usage]]) -> list[Classification]:
    """What the heads make of hidden states: on another thread, if there is much to multiply."""

    def one(stream: RequestStream, usage: Usage) -> Classification:
        hidden, classifier = _pooled(stream), stream.classifier
        assert classifier is not None
        logits = classifier.logits(hidden)
        return Classification(logits, classifier.probs(logits), classifier.labels, usage)

    def all_of_them() -> list[Classification]:
        return [one(*each) for each in read]

    heads = [stream.classifier for stream, _ in read if stream.classifier is not None]
    products = sum(head.weight.size for head in heads if head.weight is not None)
    if products <= _INLINE_PRODUCTS:
        return all_of_them()
    return await anyio.to_thread.run_sync(all_of_them, abandon_on_cancel=True)


def _only(found: Classification, view: ModelView) -> Classification:
    """What has one label; raises InvalidRequestError if a model with others was loaded since."""
    if len(found.labels) != 1:
        raise InvalidRequestError(
            f"a head of {len(found.labels)} labels took the place of that of {view.config.model!r}; one ranks"
        )
    return found


def _said(prompt: Any, template_arguments: Mapping[str, Any]) -> Any:
    """A prompt; a list of messages as a conversation.

    Raises:
        InvalidRequestError: There are arguments for a chat template, and the prompt is none of its own.
    """
    if isinstance(prompt, tuple) and len(prompt) == 2 and all(isinstance(text, str) for text in prompt):
        prompt = TextPair(*prompt)
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(message, Mapping) for message in prompt):
        return Conversation(tuple(prompt), {"add_generation_prompt": False, **template_arguments})
    if template_arguments:
        named = ", ".join(template_arguments)
        raise InvalidRequestError(f"{named} given; arguments of the chat template are for conversations alone")
    return prompt


def checked_pairs(pairs: Any) -> list[tuple[str, str]]:
    """A list of pairs of strings; raises InvalidRequestError if it is something else."""
    if isinstance(pairs, (str, bytes, Mapping)) or not isinstance(pairs, Iterable):
        raise InvalidRequestError(f"pairs is {pairs!r:.80}; expected a list of pairs of strings")
    found = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InvalidRequestError(f"pairs has {pair!r:.80}; expected a query and a document, two strings")
        found.append((pair[0], pair[1]))
    return found


def _pairs(query: Any, documents: Any) -> list[tuple[str, str]]:
    if isinstance(documents, (str, bytes, Mapping)) or not isinstance(documents, Iterable):
        raise InvalidRequestError(f"documents is {documents!r:.80}; expected a list of strings")
    return [(query, document) for document in documents]
