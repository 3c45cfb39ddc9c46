"""vLLM: an attention backend whose KV cache is packed pages. Start with ``backend.py``.

vLLM is imported by the modules that define something for it (``plugin``, ``backend``, ``cpu``,
``recent``, ``attention``); ``rows`` and ``step`` are plain torch.
"""
