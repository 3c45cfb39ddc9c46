"""vLLM: an attention backend whose KV cache is packed pages. Start with ``backend.py``.

vLLM is imported by the modules that define something for it (``plugin``, ``backend``, ``cpu``,
``recent``, ``attention``). The others know nothing of it: ``rows`` is what a step consists of,
``step`` what a layer does with it, in plain torch (``torch_rows``) or in kernels (``triton_rows``).
"""
