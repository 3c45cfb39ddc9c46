"""Dense attention over plain tensors, in the precision of its input: the oracle of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_QUERY_BLOCK = 512


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of the newest ``Tq`` tokens of each sequence.

    Query ``i`` of sequence ``b`` sits at position ``lengths[b] - Tq + i`` and sees the positions
    ``starts[b] <= j <= `` its own, the last ``sliding_window`` of them. A query that may see
    nothing gets zeros.

    Args:
        query: ``[B, Hq, Tq, D]``.
        keys: ``[B, H, T, D]`` with ``Hq`` a multiple of ``H``.
        values: ``[B, H, T, Dv]``.
        scaling: logit factor, ``D ** -0.5`` if omitted.
        lengths: int ``[B]``, tokens of each sequence including the new ones; ``T`` if omitted.
        starts: int ``[B]``, first visible position (left padding).
        sliding_window: how many newest positions a query sees, itself included.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        s_aux: ``[Hq]`` attention-sink logits that join the softmax and carry no value.
        mask: bool (True = visible) or additive, broadcastable to ``[B, Hq, Tq, T]``; it then
            replaces causality and ``starts``.

    Returns:
        ``[B, Hq, Tq, Dv]`` in the dtype of ``query``.
    """
    batch, _, num_queries, head_dim = query.shape
    num_kv_heads, total = keys.shape[1:3]
    factor = head_dim**-0.5 if scaling is None else scaling
    grouped = query.unflatten(1, (num_kv_heads, -1))
    position = torch.arange(total, device=query.device)
    if lengths is None:
        lengths = torch.full((batch,), total, device=query.device)
    last = lengths.view(-1, 1, 1, 1, 1) - num_queries
    out = []
    for begin in range(0, num_queries, _QUERY_BLOCK):
        block = grouped[..., begin : begin + _QUERY_BLOCK, :]
        logits = block @ keys.unsqueeze(2).mT * factor
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        own = last + torch.arange(begin, begin + block.shape[-2], device=query.device)[:, None]
        if mask is not None:
            part = mask.expand(batch, -1, num_queries, total)[..., begin : begin + _QUERY_BLOCK, :]
            heads = (1, 1) if part.shape[1] == 1 else (num_kv_heads, -1)
            part = part.unflatten(1, heads)
            if part.dtype == torch.bool:
                logits = logits.masked_fill(~part, -torch.inf)
            else:
                logits = logits + part
        else:
            visible = position <= own
            if starts is not None:
                visible = visible & (position >= starts.view(-1, 1, 1, 1, 1))
            logits = logits.masked_fill(~visible, -torch.inf)
        if sliding_window is not None:
            logits = logits.masked_fill(position <= own - sliding_window, -torch.inf)
        if s_aux is not None:
            sink = s_aux.to(logits).view(1, num_kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            probs = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
        else:
            blind = logits.amax(-1, keepdim=True) == -torch.inf
            probs = logits.softmax(-1).masked_fill(blind, 0.0)
        out.append(probs @ values.unsqueeze(2))
    return torch.cat(out, dim=-2).flatten(1, 2)
