"""The model ``oscar-hf`` of lm-evaluation-harness: its ``hf`` model over a cache of our choice.

    import oscar_kv.evaluation.lm_eval  # registers the name
    lm_eval.simple_evaluate(model="oscar-hf", model_args="pretrained=...,preset=compact", ...)

What is measured, and on which side of the cache, is in docs/evaluation.md.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache

from oscar_kv.evaluation.harness import CacheChoice, take_cache_arguments
from oscar_kv.evaluation.teacher import forced
from oscar_kv.integrations.models import cache_argument

SCORED_STEP = 32
"""Tokens of a continuation that are fed at once. They see each other exactly; with one at a time
the same would hold of the 128 newest tokens of most presets."""

HarnessModel: Any = HFLM  # its decorator says it is any model of the harness
Request = tuple[Any, list[int], list[int]]
"""What the result is filed under, a context and a continuation."""
Answer = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding would produce it."""


class OscarLM(HarnessModel):
    """``hf`` with keys and values in the cache that is asked for, in every task.

    Generation goes the harness's way, with that cache for every batch. For a log-likelihood the
    context up to its last token is a prompt; that token and the continuation are fed over what the
    cache has stored of it, :data:`SCORED_STEP` at a time.

    Args:
        pretrained: as in ``hf``; attention is ``"oscar"`` unless ``attn_implementation`` says
            otherwise or nothing is quantized.
        prefill_chunk_size: read prompts in chunks of so many tokens, each over what is packed of
            those before. At once if omitted, attending over the exact prompt.
        arguments: those of :class:`CacheChoice`, and of ``hf``.

    Raises:
        ValueError: for a cache that does not exist, or that the model cannot have.
    """

    def __init__(
        self, pretrained: Any, *, prefill_chunk_size: int | None = None, **arguments: Any
    ) -> None:
        self.cache_choice = CacheChoice(**take_cache_arguments(arguments))
        if prefill_chunk_size is not None and (
            not isinstance(prefill_chunk_size, int) or prefill_chunk_size < 1
        ):
            raise ValueError(f"prefill_chunk_size={prefill_chunk_size!r}: expected an integer > 0")
        self.prefill_chunk_size = prefill_chunk_size
        if self.cache_choice.config is not None and isinstance(pretrained, str):
            arguments.setdefault("attn_implementation", "oscar")
        super().__init__(pretrained, **arguments)
        self.make_cache = self.cache_choice.maker(self.model.config)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = self.make_cache()
        if self.prefill_chunk_size is not None:
            kwargs["prefill_chunk_size"] = self.prefill_chunk_size
        kwargs[cache_argument(self.model)] = cache
        tokens = super()._model_generate(context, *args, **kwargs)
        self.cache_choice.count(cache)
        return tokens

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Every context is read once, alone; its continuations of one length form batches, so
        nothing is padded and no result depends on the size of a batch."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {number}: a context of {len(context)} and a continuation of "
                    f"{len(continuation)} tokens, expected 1 or more, and 1 to {self.max_length}"
                )
            fed = (context + continuation)[-(self.max_length + 1) :]
            by_context[tuple(fed[: len(fed) - len(continuation)])].append(number)
        answers: dict[int, Answer] = {}
        progress = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        )
        limit = self.max_batch_size if self.batch_size == "auto" else self.batch_size
        for context in sorted(by_context, key=len, reverse=True):
            cache = self._read(context[:-1])
            self.cache_choice.count(cache)
            batches = _batches(requests, by_context[context], int(limit))
            for left, numbers in zip(reversed(range(len(batches))), batches):
                continuations = [requests[number][2] for number in numbers]
                mine = copy.deepcopy(cache) if left else cache
                for number, answer in zip(numbers, self._score(context, continuations, mine)):
                    answers[number] = answer
                    if (name := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", name, answer)
                progress.update(len(numbers))
        progress.close()
        return [answers[number] for number in range(len(requests))]

    def _read(self, prompt: Sequence[int]) -> Cache:
        """A cache that holds ``prompt``."""
        cache = self.make_cache()
        options: dict[str, Any] = {cache_argument(self.model): cache, "use_cache": True}
        if self.model._supports_logits_to_keep():
            options["logits_to_keep"] = 1
        if prompt:
            ids = torch.tensor([prompt], device=self.device)
            with self._autocast():
                for part in ids.split(self.prefill_chunk_size or len(prompt), dim=1):
                    self.model(part, **options)
        return cache

    def _score(
        self, context: Sequence[int], continuations: list[list[int]], cache: Cache
    ) -> list[Answer]:
        """Answers for continuations of one length over a ``cache`` of all but the last token of
        their context, which is used up."""
        if len(continuations) > 1:
            cache.batch_repeat_interleave(len(continuations))
        tokens = torch.tensor([[*context, *one] for one in continuations])
        sums = torch.zeros(len(continuations))
        greedy = torch.ones(len(continuations), dtype=torch.bool)
        with self._autocast():
            steps = forced(self.model, tokens, cache, len(context) - 1, SCORED_STEP)
            for logits, expected in steps:
                scores = logits.log_softmax(-1, dtype=self.softmax_dtype)
                chosen = scores.gather(-1, expected[..., None])[..., 0]
                sums += chosen.sum(-1).float().cpu()
                greedy &= (scores.argmax(-1) == expected).all(-1).cpu()
        return list(zip(sums.tolist(), greedy.tolist()))

    def _autocast(self) -> torch.autocast:
        wanted = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=wanted, enabled=wanted is not None)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results, the cache included."""
        return {**super().get_model_info(), "kv_cache": self.cache_choice.to_dict()}


register_model("oscar-hf")(OscarLM)  # as a decorator it would hide the class's type


def _batches(requests: Sequence[Request], numbers: list[int], limit: int) -> list[list[int]]:
    """``numbers`` of requests whose continuations are equally long, at most ``limit`` together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        by_length[len(requests[number][2])].append(number)
    return [
        alike[begin : begin + limit]
        for alike in by_length.values()
        for begin in range(0, len(alike), limit)
    ]
