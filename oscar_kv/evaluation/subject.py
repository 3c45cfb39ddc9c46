"""What is evaluated on: a model, and token windows that every method gets alike."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
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


class Subject:
    """A model and the text it is tried on.

    Args:
        model: folder or Hugging Face id.
        rows: int ``[N, T]``: pieces of text never trained on. The last
            :data:`CALIBRATION_WINDOWS` are set aside for methods that need calibration.
        dtype: of the model; ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` ...

    Raises:
        ValueError: if the model cannot be loaded, or there is too little text.
    """

    def __init__(
        self, model: str | Path, rows: Tensor, *, dtype: str = "auto", device: str = "auto"
    ) -> None:
        if rows.ndim != 2 or len(rows) <= CALIBRATION_WINDOWS:
            raise ValueError(
                f"text of shape {tuple(rows.shape)}: expected more than {CALIBRATION_WINDOWS} rows"
            )
        self.loaded: Loaded = load(model, dtype, device)
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
                f"{count} windows of {length} tokens: the text has {available} of {longest}"
            )
        return self.rows[torch.linspace(0, available - 1, count).long(), :length]

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


def rows_of_array(source: str) -> Tensor:
    """The integer array ``NAME`` ``[N, T]`` of ``FILE.npz``, given as ``FILE.npz:NAME``.

    Raises:
        ValueError: if there is none.
    """
    path, _, name = source.rpartition(":")
    try:
        with np.load(path) as arrays:
            return torch.from_numpy(arrays[name].astype(np.int64))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{source!r}: expected FILE.npz:NAME ({error})") from error


def rows_of_text(path: Path, tokenizer: Any, length: int) -> Tensor:
    """A UTF-8 text file cut into rows of ``length`` tokens, int ``[N, length]``.

    Raises:
        ValueError: if it cannot be read.
    """
    text = read_text(path)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
