"""Decode steps of a whole model as a CUDA graph: no Python, no launches, no waiting per token.

    cache = OscarCache(model.config)
    logits = model(prompt, past_key_values=cache).logits[:, -1]
    cache.reserve(1000)
    step = DecodeGraph(model, cache)
    for _ in range(1000):
        ids = logits.argmax(-1, keepdim=True)
        logits = step(ids)

The cache decides on the device when a page is complete, so one graph serves every step. In between
the cache may be used in other ways: more of a prompt, a rollback. A graph runs as many kernels as
the model does: `compile_layers` (``compile.py``) makes them fewer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oscar_kv.integrations.layer import OscarLayer
from oscar_kv.integrations.models import cache_argument
from oscar_kv.integrations.transformers import OscarCache
from oscar_kv.kernels.dispatch import choose
from oscar_kv.storage.layout import PageLayout
from oscar_kv.storage.packed import PackedKV


def require_kernels(layout: PageLayout, device: torch.device) -> None:
    """Raises ValueError unless a decode step over pages of ``layout`` needs nothing of the host."""
    backend, reason = choose(layout, device)
    if backend.name == "reference":
        raise ValueError(f"a CUDA graph needs GPU kernels: {reason}")
    if layout.config.token_scale == "cross_head" and layout.config.fit == "unbiased":
        raise ValueError('token_scale="cross_head" with fit="unbiased": no kernel appends that')


def require_cuda(device: torch.device) -> None:
    """Raises ValueError for any other device."""
    if device.type != "cuda":
        raise ValueError(f"the model is on {device}: a CUDA graph needs a CUDA device")


class DecodeGraph:
    """One decode step of a model over a cache that holds the prompt.

    The first call runs the step as it is, which compiles what there is to compile, and captures it;
    later calls replay it. If the cache has been used without the graph since and room reserved
    anew, the next call captures again only if memory has moved or the room has outgrown the graph.

    Args:
        model: a causal language model on a CUDA device; with an :class:`OscarCache` its attention
            has to be ``"oscar"``.
        cache: holds the prompt, and has room for what is to come (``reserve``), by the first call.
            Other caches than ours need an ``update`` that a graph can capture, ``advance(tokens)``,
            and to grow by this graph alone.
        starts: int ``[B]``, tokens of left padding of each sequence, if there is any; those of the
            cache if omitted.

    Raises:
        ValueError: if the model cannot be captured.
    """

    def __init__(self, model: Any, cache: Any, *, starts: Tensor | None = None) -> None:
        require_cuda(model.device)
        if isinstance(cache, OscarCache):
            if model.config._attn_implementation != "oscar":
                raise ValueError(
                    f"attn_implementation={model.config._attn_implementation!r}: expected "
                    '"oscar", which reads lengths on the device'
                )
            if cache.offloading:
                raise ValueError("offloading: a CUDA graph cannot fetch pages from CPU memory")
        self.model, self.cache = model, cache
        self.starts = None if starts is None else starts.to(model.device, torch.int32)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids: Tensor
        self._positions: Tensor
        self._logits: Tensor
        self._zeros: Tensor | None = None
        self._version: object = None
        """Of the cache that the graph and its positions are right for."""
        self._places: list[Any] = []
        self._most_pages = 0

    def reserve(self, tokens: int, spare: int = 0) -> None:
        """Sets memory of an :class:`OscarCache` aside for ``tokens`` more steps.

        Args:
            spare: so many more if the next call has to capture anyway: the graph then stays right
                while the cache grows by as many tokens.
        """
        self.cache.reserve(tokens)
        if spare and (self._graph is None or not self._is_current()):
            self.cache.reserve(tokens + spare)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """The logits ``[B, vocabulary]`` that follow ``ids``, int ``[B, 1]``, which are appended.

        The result is overwritten by the next call.

        Raises:
            ValueError: if the cache has no room left, or no kernels for what it holds.
        """
        if isinstance(self.cache, OscarCache):
            self.cache.end_pass()
        if self._graph is None or not self._is_current():
            return self._first(ids)
        self.cache.advance(1)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._logits

    def require_finite(self) -> None:
        """Waits for the device.

        Raises:
            ValueError: if keys or values held NaN or Inf; these tokens were stored as zeros.
        """
        if self._zeros is not None and (count := int(self._zeros)):
            raise ValueError(
                f"keys or values of {count} tokens (per layer and KV head) held NaN or Inf and "
                "were stored as zeros"
            )

    def _is_current(self) -> bool:
        """Whether the graph still fits the cache; if so, positions are up to date afterwards."""
        if not isinstance(self.cache, OscarCache):
            return True
        layers = self.cache.packed_layers()
        if layers[0].version is not self._version:
            if layers[0].most_pages > self._most_pages or self._places != _places(layers):
                return False
            self._version = layers[0].version
            self._set_positions()
        return True

    def _first(self, ids: Tensor) -> Tensor:
        """Runs the step, then captures it."""
        self._graph = None  # its memory, before there is another
        if isinstance(self.cache, OscarCache):
            layers = self.cache.packed_layers()
            devices = {str(device) for device in (self.model.device, *(x.device for x in layers))}
            if len(devices) > 1:
                raise ValueError(
                    f"layers are on {' and '.join(sorted(devices))}: a CUDA graph needs all of "
                    "them on one device"
                )
            for packed in layers:
                require_kernels(packed.layout, packed.device)
                if not packed.reserved_tokens:
                    raise ValueError("the cache has no room left: call reserve() first")
            for layer in self.cache.layers:
                if isinstance(layer, OscarLayer):
                    self._see_from_the_start(layer)
        self._ids = ids.clone()
        self._positions = torch.empty_like(ids)
        self._set_positions()
        logits = self._warm_up()
        self._graph = self._capture()
        if isinstance(self.cache, OscarCache):
            layers = self.cache.packed_layers()
            self._places, self._most_pages = _places(layers), layers[0].most_pages
            self._version = layers[0].version
        return logits

    def _see_from_the_start(self, layer: OscarLayer) -> None:
        """Has a layer see what is no padding, of which it holds all or, if it was told, none."""
        padding = torch.tensor(layer.padding, dtype=torch.int32, device=self.model.device)
        if self.starts is None and any(layer.padding):
            self.starts = padding
        layer.visible_from = None if self.starts is None else self.starts - padding

    def _warm_up(self) -> Tensor:
        side = torch.cuda.Stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            logits = self._step()
        torch.cuda.current_stream().wait_stream(side)
        return logits

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # What is compiled has been by now; while capturing it could not be.
        with torch.compiler.set_stance("fail_on_recompile"), torch.cuda.graph(graph):
            self._logits = self._step()
            if isinstance(self.cache, OscarCache):
                self._zeros = self.cache.stored_as_zeros
        return graph

    def _set_positions(self) -> None:
        self._positions.fill_(self.cache.get_seq_length())
        if self.starts is not None:
            self._positions -= self.starts[:, None]

    def _step(self) -> Tensor:
        """What is captured: the step, and the positions of the next one."""
        output = self.model(
            self._ids,
            position_ids=self._positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self.model): self.cache},
        )
        self._positions += 1
        return output.logits[:, -1]


def _places(layers: list[PackedKV]) -> list[Any]:
    """Where all that a graph was captured over lies."""
    return [packed.places for packed in layers]
