"""What 2-bit caches gain on a GPU. ``python -m benchmarks.gpu.kernel | prefill | model | plots``.

No speed-up is recorded or printed unless the outputs of the very run that was timed agree with the
float64 oracle (`oracle.py`); how times are taken is in `timing.py`, what they are compared with in
`baselines.py`.
"""
