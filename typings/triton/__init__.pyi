# To pyright everything in Triton is Any: in a kernel a `tl.constexpr` argument is a plain value, a
# loop over `tl.static_range` runs, and a device function takes what its constants unpack to.
from typing import Any

def __getattr__(name: str) -> Any: ...
