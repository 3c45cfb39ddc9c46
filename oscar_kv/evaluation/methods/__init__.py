"""Every method under its name, and how to name one with other parameters.

``"kivi"`` is a method as published, ``"kivi:recent_tokens=128"`` the same with a parameter
changed, ``"ablation:rotation=false,key_fit=minmax"`` ours with a step left out,
``"mine:Rounded"`` a class of your own.
"""

from __future__ import annotations

from oscar_kv.config import PRESETS, OscarConfig
from oscar_kv.evaluation.methods.ablation import Ablation
from oscar_kv.evaluation.methods.base import (
    Coded,
    LayerStates,
    Method,
    Quantized,
    View,
    bits_per_element,
    view,
)
from oscar_kv.evaluation.methods.fp8 import FP8
from oscar_kv.evaluation.methods.int4 import Int4
from oscar_kv.evaluation.methods.kitty import Kitty
from oscar_kv.evaluation.methods.kivi import KIVI
from oscar_kv.evaluation.methods.kvarn import KVarN
from oscar_kv.evaluation.methods.oscar import Oscar
from oscar_kv.evaluation.methods.oscar_eigen import OscarEigen
from oscar_kv.evaluation.methods.ott import OTT
from oscar_kv.evaluation.methods.own import load_class, origin
from oscar_kv.evaluation.methods.quarot import QuaRot
from oscar_kv.evaluation.methods.rotatekv import RotateKV
from oscar_kv.evaluation.methods.turboquant import TurboQuant
from oscar_kv.evaluation.names import parse_name, require_fields

METHODS: dict[str, Method] = {
    "fp8": FP8(),
    "fp8-token": FP8(scale="token"),
    "int4": Int4(),
    "kivi": KIVI(),
    "ott": OTT(),
    "quarot": QuaRot(),
    "rotatekv": RotateKV(),
    "turboquant-2": TurboQuant(bits=2),
    "turboquant-2.5": TurboQuant(bits=2.5),
    "turboquant-3": TurboQuant(bits=3),
    "kvarn": KVarN(),
    "kitty": Kitty(),
    "oscar-eigen": OscarEigen(),
    **{preset: Oscar(config=OscarConfig.preset(preset)) for preset in PRESETS},
    "ablation": Ablation(),
}


def method(name: str) -> Method:
    """The method called ``name``, see :func:`oscar_kv.evaluation.names.parse_name`; or, for
    ``module:Class``, one of that class.

    Raises:
        ValueError: for an unknown name, parameter or value.
    """
    base, parameters = parse_name(name)
    if base not in METHODS and ":" not in base:
        known = ", ".join(METHODS)
        raise ValueError(f"method {base!r}: expected one of {known}, or module:Class of your own")
    try:
        if base in METHODS:
            return METHODS[base].replaced(**parameters)
        kind = load_class(base)
        require_fields(kind, parameters)
        return kind(**parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {name!r}: {error}") from error


__all__ = [
    "FP8",
    "KIVI",
    "METHODS",
    "OTT",
    "Ablation",
    "Coded",
    "Int4",
    "KVarN",
    "Kitty",
    "LayerStates",
    "Method",
    "Oscar",
    "OscarEigen",
    "QuaRot",
    "Quantized",
    "RotateKV",
    "TurboQuant",
    "View",
    "bits_per_element",
    "method",
    "origin",
    "view",
]
