"""Load a causal language model and continue a prompt with a given cache, token by token."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.cache_utils import Cache
from transformers.utils import logging

from oscar_kv.checkpoints import local_or_id, require_complete
from oscar_kv.integrations.graph import DecodeGraph, require_kernels
from oscar_kv.integrations.layer import OscarLayer, layer_memory
from oscar_kv.integrations.models import (
    DroppedCacheWarning,
    cache_argument,
    cache_layers,
    reread_beyond,
)
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.planner import layer_shape
from oscar_kv.sampling import greedy
from oscar_kv.storage.layout import PageLayout

DTYPES = ("auto", "bfloat16", "float16", "float32")

Message = dict[str, str]
"""Of a conversation: ``role`` and ``content``."""


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and its tokenizer.

    Attributes:
        processor: of a model that was loaded to see images.
        unused: names of the checkpoint's weights that the model has no place for.
    """

    model: Any
    tokenizer: Any
    processor: Any = None
    unused: tuple[str, ...] = ()

    @property
    def attends_packed(self) -> bool:
        """Whether attention reads packed pages; otherwise it gets dequantized states."""
        return self.model.config._attn_implementation == "oscar"

    @property
    def dtype(self) -> str:
        """The model's dtype by its short name, such as ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")

    def encode(self, prompt: str) -> Tensor:
        """Token ids ``[1, T]``.

        Raises:
            ValueError: if the prompt has no tokens.
        """
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        if not ids.shape[1]:
            raise ValueError("the prompt is empty")
        return ids.to(device=self.model.device, dtype=torch.long)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer knows how the model was taught to write conversations."""
        return bool(self.tokenizer.chat_template)

    def encode_chat(self, messages: list[Message]) -> Tensor:
        """Token ids ``[1, T]`` of a conversation in the chat template, up to the next answer.

        Raises:
            ValueError: if the template does not take it.
        """
        from jinja2 import TemplateError  # as late as Transformers imports it

        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template does not take this: {error}") from error
        return encoded["input_ids"].to(device=self.model.device, dtype=torch.long)


def load(
    path: str | Path, dtype: str = "auto", device: str = "auto", *, images: bool = False
) -> Loaded:
    """Loads a local folder or a Hugging Face model id.

    Attention is ``"oscar"`` where the model takes attention functions, else the model's own.

    Args:
        images: load a model that sees images, and its processor.

    Raises:
        ValueError: for an unknown dtype or device, or a model that cannot be loaded whole.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {DTYPES}")
    target = _device(device)
    try:
        path = local_or_id(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        reader: Any = (AutoProcessor if images else AutoTokenizer).from_pretrained(
            path, trust_remote_code=False
        )
        kind: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
        model, loading_info = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused here, by name
        )
        require_complete(loading_info)
        model.to(target).eval()
    except Exception as error:  # Transformers and its backends raise almost anything here
        raise ValueError(f"cannot load {str(path)!r}: {error or type(error).__name__}") from error
    model.set_attn_implementation("oscar")  # no effect where the model has attention of its own
    unused = tuple(sorted(loading_info["unexpected_keys"]))
    if images:
        return Loaded(model, reader.tokenizer, reader, unused)
    return Loaded(model, reader, unused=unused)


def quiet() -> None:
    """Silences warnings and progress bars of Transformers and the Hugging Face hub.

    And ours of what ``generate`` does, which nothing here calls.
    """
    warnings.simplefilter("ignore", DroppedCacheWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    disable_progress_bars()


def check_length(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raises ValueError if a model's context cannot hold so many tokens."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's context "
            f"of {limit}"
        )


@dataclass(frozen=True)
class Token:
    """One generated token and the time it took; the first one's includes the prompt."""

    id: int
    seconds: float


def can_be_captured(model: Any, cache: Cache) -> bool:
    """Whether decode steps can run as a CUDA graph: packed attention on a GPU, every layer ours."""
    if (
        model.device.type != "cuda"
        or model.config._attn_implementation != "oscar"
        or cache.offloading
        or not all(isinstance(layer, OscarLayer) for layer in cache.layers)
    ):
        return False
    shapes = [layer_shape(*layer) for layer in cache_layers(model.config)]
    configs = [cast(OscarLayer, layer).config for layer in cache.layers]
    for config, shape in set(zip(configs, shapes)):
        assert shape is not None  # of a quantized layer
        try:
            layout = PageLayout(config, shape.head_dim, shape.num_kv_heads, shape.value_head_dim)
            require_kernels(layout, model.device)
        except ValueError:
            return False
    return True


def decode_graph(model: Any, cache: Cache, wanted: bool | None = None) -> DecodeGraph | None:
    """What runs decode steps over ``cache`` as a CUDA graph.

    Args:
        wanted: a graph or none; one wherever that is possible if omitted.

    Raises:
        ValueError: if a graph is wanted and cannot be had.
    """
    possible = can_be_captured(model, cache)
    if wanted and not possible:
        raise ValueError(
            "--cuda-graph: needs a GPU, a preset, and a model whose layers all are full attention; "
            "cannot be had with --offload"
        )
    return DecodeGraph(model, cache) if possible and wanted is not False else None


@torch.no_grad()
def continuation(
    model: Any,
    prompt: Tensor,
    cache: Cache,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] = greedy,
    *,
    graph: DecodeGraph | None = None,
    spare: int = 0,
    before: Tensor | None = None,
) -> Iterator[Token]:
    """Yields the tokens that follow ``prompt``, up to an end-of-text token or the limit.

    Args:
        prompt: ids ``[1, T]``.
        cache: may hold what comes before; afterwards it holds all tokens but the last.
        choose: what takes the next token from logits ``[1, V]``: ids ``[1, 1]``.
        graph: of ``model`` and ``cache``, for the steps after the prompt.
        spare: tokens to reserve for later prompts and continuations with the same graph.
        before: ids ``[1, T]`` that the cache holds, for models that have to read a text again once
            it is longer than :func:`reread_beyond` says. They do so here as in ``generate``.

    Raises:
        MemoryError: if the device runs out of memory.
        ValueError: if a key or value is NaN or Inf, or ``before`` is not what the cache holds.
    """
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if model._supports_logits_to_keep():
        options["logits_to_keep"] = 1
    limit = reread_beyond(model.config)
    ids, text = prompt, prompt if before is None else torch.cat([before, prompt], 1)
    step = 0  # since the text was read
    for _ in range(max_new_tokens):
        begin = time.perf_counter()
        new = ids.shape[1]
        if limit is not None and 0 < (held := cache.get_seq_length()) <= limit < held + new:
            if text.shape[1] != held + new:
                raise ValueError(f"before: expected the {held} tokens that the cache holds")
            cache.crop(-held)
            ids, step = text, 0
        try:
            if graph is not None and step:
                if step == 1:
                    graph.reserve(max_new_tokens, spare)
                logits = graph(ids)
            else:
                logits = model(ids, **options).logits[:, -1]
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"out of memory: {error}") from error
        ids = choose(logits)
        token = int(ids)  # waits for the device
        if graph is not None and step:
            graph.require_finite()
        yield Token(token, time.perf_counter() - begin)
        if token in ends:
            return
        if limit is not None:
            text = torch.cat([text, ids], 1)
        step += 1


def tokens_per_second(tokens: list[Token]) -> float | None:
    """Speed after the first token, ``None`` if there was only one."""
    seconds = sum(token.seconds for token in tokens[1:])
    return (len(tokens) - 1) / seconds if seconds else None


def cache_nbytes(cache: Cache) -> int:
    """Bytes that ``cache`` has allocated for keys, values and other states."""
    if isinstance(cache, OscarCache):
        return cache.nbytes
    return sum(sum(layer_memory(layer).values()) for layer in cache.layers)


def full_precision_nbytes(cache: Cache) -> int:
    """Bytes that the same tokens would take with nothing quantized, in the model's dtype."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, OscarLayer) and layer.packed is not None:
            packed = layer.packed
            channels = packed.layout.head_dim + packed.layout.value_dim
            per_token = packed.layout.num_kv_heads * channels * packed.dtype.itemsize
            total += sum(packed.lengths) * per_token
        else:
            total += sum(layer_memory(layer).values())
    return total


@dataclass(frozen=True)
class Footprint:
    """What a cache takes, in bytes."""

    tokens: int
    allocated: int
    used: int
    """Those not set aside for tokens to come."""
    on_host: int
    """Those in CPU memory because of offloading."""
    full_precision: int
    """What the same tokens take with nothing quantized."""

    @classmethod
    def of(cls, cache: Cache) -> Footprint:
        ours = isinstance(cache, OscarCache)
        allocated, full = cache_nbytes(cache), full_precision_nbytes(cache)
        used = allocated - cache.memory().get("unused", 0) if ours else allocated
        on_host = cache.host_nbytes if ours else 0
        return cls(cache.get_seq_length(), allocated, used, on_host, full)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r}: {error}") from error
    return device
