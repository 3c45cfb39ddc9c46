"""What is evaluated on: a model, and token windows that every method gets alike."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oscar_kv.evaluation.capture import capture
from oscar_kv.evaluation.methods import LayerStates, Method
from oscar_kv.evaluation.sensitivity import layer_sensitivity
from oscar_kv.generation import Loaded, load

CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 4, 1024
ROW_LENGTH = 2048
"""Tokens of a piece of text."""


class Subject:
    """A model and the text it is tried on.

    Args:
        model: folder or Hugging Face id.
        rows: pieces of text never trained on, int ``[N, T]``, or a UTF-8 file that is cut into
            them. The last :data:`CALIBRATION_WINDOWS` are set aside for methods that need
            calibration.
        row_length: tokens of a piece of a file.
        dtype: of the model; ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` ...

    Raises:
        ValueError: if the model cannot be loaded, or there is too little text, or another's.
    """

    def __init__(
        self,
        model: str | Path,
        rows: Tensor | Path,
        *,
        row_length: int = ROW_LENGTH,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        self.loaded: Loaded = load(model, dtype, device)
        if isinstance(rows, Path):
            rows = rows_of_text(rows, self.tokenizer, row_length)
        if rows.ndim != 2 or len(rows) <= CALIBRATION_WINDOWS:
            raise ValueError(
                f"text of shape {tuple(rows.shape)}: expected more than {CALIBRATION_WINDOWS} rows "
                f"of tokens, of which {CALIBRATION_WINDOWS} are set aside for calibration; give "
                "more text, or cut it into shorter rows (--row-length)"
            )
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if not 0 <= rows.min() <= rows.max() < vocabulary:
            raise ValueError(
                f"tokens from {rows.min()} to {rows.max()}: this model has those from 0 to "
                f"{vocabulary - 1}; expected text in the model's own tokens"
            )
        self.name = Path(model).name
        self.rows = rows[:-CALIBRATION_WINDOWS]
        self._calibration_rows = rows[-CALIBRATION_WINDOWS:, :CALIBRATION_TOKENS]
        self._folder = Path(model)
        self._sensitivity: dict[Method, Sequence[float]] = {}

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def windows(self, count: int, length: int) -> Tensor:
        """``count`` windows ``[count, length]``, evenly spread over the text.

        Raises:
            ValueError: if the text does not have them.
        """
        available, longest = self.rows.shape
        if not 1 <= count <= available or not 1 <= length <= longest:
            raise ValueError(
                f"{count} windows of {length} tokens: the text has {available} of {longest}; "
                "expected windows= and length= within these"
            )
        return self.rows[torch.linspace(0, available - 1, count).long(), :length]

    def require_context(self, tokens: int) -> None:
        """Raises ValueError if the model's context cannot hold so many."""
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit and tokens > limit:
            raise ValueError(f"windows of {tokens} tokens: this model's context is {limit}")

    @functools.cached_property
    def calibration(self) -> Sequence[LayerStates]:
        """States of every full-attention layer on the text that was set aside."""
        return list(capture(self.model, self._calibration_rows).values())

    def sensitivity(self, method: Method) -> Sequence[float]:
        """What ``method`` does to the model in each full-attention layer, on the same text."""
        if method not in self._sensitivity:
            found = layer_sensitivity(self.model, self._calibration_rows, method)
            self._sensitivity[method] = found
        return self._sensitivity[method]

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Name, dtype and hashes of the model's weights and of the text."""
        digest = hashlib.sha256()
        for file in sorted(self._folder.glob("*.safetensors")):
            digest.update(file.read_bytes())
        found = digest.hexdigest()[:16] if self._folder.is_dir() else "not local"
        text = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]
        return {
            "name": self.name,
            "dtype": self.loaded.dtype,
            "device": self.model.device.type,
            "weights": found,
            "text": text,
        }


def source(text: str | Path | None, tokens: str | None) -> Tensor | Path:
    """What a :class:`Subject` takes: a file, which can be read, or the rows ``FILE.npz:NAME``.

    Raises:
        ValueError: if not one of them is given, or it cannot be read.
    """
    if (text is None) == (tokens is None):
        raise ValueError("expected one of text and tokens")
    if tokens is not None:
        return rows_of_array(tokens)
    read_text(path := Path(str(text)))  # now, before a model is loaded
    return path


def rows_of_array(source: str) -> Tensor:
    """The integer array ``NAME`` ``[N, T]`` of ``FILE.npz``, given as ``FILE.npz:NAME``.

    Raises:
        ValueError: if there is none.
    """
    path, _, name = source.rpartition(":")
    try:
        with np.load(path) as arrays:
            if arrays[name].dtype.kind not in "iu":
                raise ValueError(f"its {name} is {arrays[name].dtype}, and token ids are integers")
            return torch.from_numpy(arrays[name].astype(np.int64))
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{source!r}: expected FILE.npz:NAME ({error})") from error


def rows_of_text(path: Path, tokenizer: Any, length: int) -> Tensor:
    """A UTF-8 file cut into rows of ``length`` tokens, int ``[N, length]``.

    Every row begins as ``tokenizer`` begins a text, mostly with one special token: many models
    are far off without it. What it puts behind a text is left out.

    Raises:
        ValueError: if it cannot be read, or that leaves no token of a row for the text.
    """
    found = tokenizer(read_text(path), return_special_tokens_mask=True)
    marked = list(zip(found["input_ids"], found["special_tokens_mask"]))
    begin = [token for token, _ in takewhile(lambda one: one[1], marked)]
    body = [token for token, special in marked if not special]
    each = length - len(begin)
    if each < 1:
        raise ValueError(f"rows of {length} tokens: expected more than the {len(begin)} in front")
    count = len(body) // each
    rows = torch.tensor(body[: count * each], dtype=torch.long).view(count, each)
    return torch.cat([torch.tensor(begin, dtype=torch.long).expand(count, -1), rows], 1)


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {str(path)!r}: {why}") from error
