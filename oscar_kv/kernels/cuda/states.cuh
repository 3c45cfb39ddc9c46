// What is common to attention: numbers of 16 bits, bfloat16 or float16, as keys, values, queries
// and outputs have them, and two of its constants.
#pragma once
#include <warp.cuh>

#if BFLOAT
__device__ inline float to_float(u16 x) { return as_float(static_cast<u32>(x) << 16); }
__device__ inline u32 pack_states(float low, float high) { return pack_bf16(low, high); }
__device__ inline void mma_states(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_bf16(sum, a0, a1, a2, a3, b0, b1);
}
#else
__device__ inline float to_float(u16 x) { return low_f16(x); }
__device__ inline u32 pack_states(float low, float high) { return pack_f16(low, high); }
__device__ inline void mma_states(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma_f16(sum, a0, a1, a2, a3, b0, b1);
}
#endif

constexpr float kBlind = -1.0e20f;  // the maximum of no logits
constexpr float kLog2E = 1.4426950408889634f;
