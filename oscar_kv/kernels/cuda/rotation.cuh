// The Hadamard rotation of one row in a warp: lane l has channels kMine l .. kMine l + kMine - 1.
#pragma once
#include <warp.cuh>

// In Sylvester's order, without the factor (32 kMine)**-0.5.
template <int kMine>
__device__ inline void hadamard(float (&x)[kMine], int lane) {
#pragma unroll
  for (int step = 1; step < kMine; step *= 2) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b;
      x[i + step] = a - b;
    }
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float other = shuffle_xor(x[i], mask);
      x[i] = lane & mask ? other - x[i] : x[i] + other;
    }
  }
}
