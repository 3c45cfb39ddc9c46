"""What tells one model from another: the settings it computes with, and a checksum of its weights.

What was computed with a model, such as a cache, is right for that model alone; sizes alone do not
tell a fine-tune, or another RoPE. Every byte of the weights counts, which takes as long as reading
them once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Fingerprint = dict[str, Any]
"""Plain values by name, as JSON has them: settings, ``dtype``, ``weights``."""

_ROW = 1024
"""Words of 8 bytes that are summed to one."""

# Fields of a config that change nothing a model computes from its tokens.
_IRRELEVANT = {
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",  # of the file; the model's own is stated
    "id2label",
    "initializer_range",
    "label2id",
    "name_or_path",
    "pretraining_tp",
    "problem_type",
    "quantization_config",  # the weights say what it did
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_IRRELEVANT_ENDS = ("_token_id", "dropout", "_pdrop", "aux_loss_coef", "jitter_noise")
_IRRELEVANT_BEGINNINGS = ("_", "output_")


def fingerprint(model: Any) -> Fingerprint:
    """The fingerprint of a model of Transformers.

    Weights may be on any devices, offloaded by ``device_map``, or quantized into other tensors.
    Adapters that are not merged count as weights.

    Raises:
        TypeError: if ``model`` is not a model.
        ValueError: if its weights are on the meta device, with nothing to load them from.
    """
    require_model(model)
    config: Any = model.config
    fields = _flat(config.get_text_config(decoder=True).to_dict())
    settings = {k: v for k, v in fields.items() if not _is_irrelevant(k.split(".")[0])}
    found = {
        "model_type": settings.pop("model_type", None),
        **settings,
        "dtype": str(model.dtype),
        "weights": _checksum_of(model),
    }
    return json.loads(json.dumps(found, default=str))


def require_model(model: Any) -> None:
    """Raises TypeError for anything but a model of Transformers."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model is a {type(model).__name__}: expected the model, not its config")


def difference(made: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """What tells the model that something was ``made`` by from one's ``own``, in one line.

    Settings that only one of two fingerprints states do not count: versions of Transformers differ
    in what they state. ``None`` if nothing else differs either.
    """
    for name, value in made.items():
        if name in own and own[name] != value:
            if name == "weights":
                return "made by a model with other weights"
            return f"made by a model with {name}={value}: this one has {own[name]}"
    return None


def _is_irrelevant(name: str) -> bool:
    return (
        name in _IRRELEVANT
        or name.endswith(_IRRELEVANT_ENDS)
        or name.startswith(_IRRELEVANT_BEGINNINGS)
    )


def _flat(fields: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of fields as ``outer.inner``."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _checksum_of(model: Any) -> str:
    """Of names, shapes, dtypes and bytes of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    stored = model.state_dict().keys()  # without what a model computes anew, such as frequencies
    for prefix, module in model.named_modules():
        with _in_reach(module):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                full_name = f"{prefix}.{name}" if prefix else name
                if full_name in stored:
                    digest.update(full_name.replace("_orig_mod.", "").encode())
                    for part in _parts(tensor):
                        _add(digest, full_name, part)
    return digest.hexdigest()[:32]


def _in_reach(module: nn.Module) -> AbstractContextManager[None]:
    """A context in which offloaded weights of ``module`` itself are on a device."""
    offloaded = any(weight.is_meta for weight in module.parameters(recurse=False))
    if not offloaded or not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that ``tensor`` is made of: more than one where a library quantized it."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    """Sums of rows and columns of the bytes, taken as a matrix: no single change leaves both."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: load the model's weights first")
    raw = tensor.reshape(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.storage_offset() % 8:
        raw = F.pad(raw, (0, -raw.numel() % 8))
    words = raw.view(torch.int64)
    whole = words.numel() // _ROW * _ROW
    rows = words[:whole].view(-1, _ROW)
    sums = torch.cat([rows.sum(0), rows.sum(1), words[whole:]])
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(sums.cpu().numpy().data)
