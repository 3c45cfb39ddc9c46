"""Lists of contenders that belong together."""

from __future__ import annotations

from oscar_kv.config import FULL_PRECISION, PRESETS, OscarConfig

_PUBLISHED = (
    "fp8",
    "int4",
    "kivi",
    "ott",
    "quarot",
    "rotatekv",
    "turboquant-2",
    "turboquant-2.5",
    "turboquant-3",
    "kvarn",
    "kitty",
    "oscar-eigen",
)
_WITHOUT_WINDOW = tuple(
    f"{preset}:recent_tokens=0" for preset in PRESETS if OscarConfig.preset(preset).recent_tokens
)
# Ours with fewer bits than any preset, and between two of them. `mixed` of two presets has pages
# (`OscarCache(layers=)`), the others have none yet.
_BESIDE_PRESETS = (
    "ablation:recent_tokens=0,value_bits=1,token_scale=cross_head",
    "ablation:recent_tokens=0,value_bits=1",
    "ablation:recent_tokens=0,value_bits=1.6",
    "ablation:recent_tokens=0,key_bits=3",
    "mixed:recent_tokens=0,base=ablation:value_bits=1",
    "mixed:recent_tokens=0",
    "mixed",
)
PAPER_GRID = (
    "ablation:key_fit=minmax,value_fit=minmax,unbiased_norm=false,metadata=fp16,key_group=32"
)
PAPER_GRID += ",value_group=32,recent_tokens=0"
SAME_WINDOW = "sink_tokens=0,recent_tokens=128"


SUITES: dict[str, tuple[str, ...]] = {
    # Every method with the full-precision tokens that it was published with, and the presets
    # without their window as well: in a short context it weighs more than all else.
    "peers": (FULL_PRECISION, *_PUBLISHED, *PRESETS, *_WITHOUT_WINDOW, *_BESIDE_PRESETS),
    # Every method with the newest 128 tokens in full precision, and no others but its blocks'.
    "same-window": (
        FULL_PRECISION,
        *(f"{name}:{SAME_WINDOW}" for name in (*_PUBLISHED, *PRESETS)),
    ),
    # Ours taken apart. The first is `compact`; the paper's own ablation follows.
    "ablation": (
        FULL_PRECISION,
        "ablation",
        f"{PAPER_GRID},rotation=false,token_scale=none",
        f"{PAPER_GRID},token_scale=none",
        f"{PAPER_GRID},rotation=false,token_scale=cross_head",
        f"{PAPER_GRID},token_scale=cross_head",
        "ablation:rotation=false",
        "ablation:token_scale=none",
        "ablation:token_scale=cross_head",
        "ablation:exponent=0.5",
        "ablation:unbiased_norm=false",
        "ablation:key_fit=least_squares,unbiased_norm=false",
        "ablation:key_fit=least_squares",
        "ablation:key_fit=energy,unbiased_norm=false",
        "ablation:key_fit=minmax,unbiased_norm=false",
        "ablation:value_fit=least_squares",
        "ablation:value_fit=energy",
        "ablation:value_fit=minmax",
        "ablation:key_group=64",
        "ablation:key_group=32",
        "ablation:value_group=32",
        "ablation:metadata=fp16",
        "ablation:key_bits=3",
        "ablation:key_bits=4",
        "ablation:value_bits=1",
        "ablation:value_bits=1,value_fit=least_squares",
        "ablation:value_bits=1.6",
        "ablation:value_bits=3",
        "ablation:key_bits=3,value_bits=3",
        "ablation:key_bits=3,value_bits=1.6",
        "ablation:key_bits=3,value_bits=1",
        "mixed:layers=1",
        "mixed:layers=2",
        "mixed:layers=[0,1]",
        "mixed:layers=4",
        "mixed:layers=4,better=quality",
        "ablation:sink_tokens=4",
        "ablation:recent_tokens=0",
        "ablation:recent_tokens=256",
        "turboquant-2:norm=energy",
        "turboquant-2:norm=unbiased",
        "turboquant-2:norm=unbiased,recent_tokens=128",
    ),
}
