// The online softmax of a warp: 16-row tiles of logits whose columns are query rows.
#pragma once
#include <arguments.cuh>

// Softmax state of the columns 2c and 2c + 1 of a lane 4 r + c.
struct Softmax {
  float maximum[2] = {kBlind, kBlind};
  float normalizer[2] = {0.0f, 0.0f};
};

// Makes logits x * factor those in base 2 with softcap and mask; `position`: of x[0]'s first row.
template <int kCount>
__device__ inline void cap_and_hide(float (&x)[kCount][4], float (&factor)[2], float softcap,
                                    const Seen& seen, int position, int step, int second) {
  const float infinity = as_float(0x7f800000u);
  const float cap = softcap * kLog2E, steepness = 2.0f * reciprocal(softcap);
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float y = x[p][i] * factor[i % 2];
      if (softcap > 0.0f) {
        // cap * tanh(logit / cap); a logit in base 2 is log2(e) times as large
        y = cap - 2.0f * cap * reciprocal(power_of_two(y * steepness) + 1.0f);
      }
      const int at = position + p * step + i / 2 * second;
      x[p][i] = at >= seen.low[i % 2] && at < seen.high[i % 2] ? y : -infinity;
    }
  }
  factor[0] = factor[1] = 1.0f;
}

// Exponentials of x * factor relative to the new maximum; their sum joins the normalizer. Weights
// come times 2**(bias + exponent), of which the maximum holds the bias and the caller the exponent.
template <int kCount, int kSums>
__device__ inline void online_softmax(float (&x)[kCount][4], const float (&factor)[2], int bias,
                                      int exponent, Softmax& state, float (&output)[kSums][4],
                                      float (&constant)[VALUE_GROUPS][2]) {
  float base[2], rescale[2];
  bool grew = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float most = x[0][i];
#pragma unroll
    for (int p = 0; p < kCount; ++p) most = larger(most, larger(x[p][i], x[p][i + 2]));
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) most = larger(most, shuffle_xor(most, mask));
    const float maximum = larger(state.maximum[i], most * factor[i] + bias);
    rescale[i] = power_of_two(state.maximum[i] - maximum);
    grew = grew || maximum > state.maximum[i];
    state.maximum[i] = maximum;
    base[i] = maximum - static_cast<float>(bias + exponent);
  }
  if (any_lane(grew)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      state.normalizer[i] *= rescale[i];
#pragma unroll
      for (int b = 0; b < kSums; ++b) output[b][i] *= rescale[i], output[b][i + 2] *= rescale[i];
#pragma unroll
      for (int g = 0; g < VALUE_GROUPS; ++g) constant[g][i] *= rescale[i];
    }
  }
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[p][i] = power_of_two(x[p][i] * factor[i % 2] - base[i % 2]);
      sum[i % 2] += x[p][i];
    }
  }
  const float unit = as_float(static_cast<u32>(127 - bias) << 23);
#pragma unroll
  for (int i = 0; i < 2; ++i) state.normalizer[i] += sum[i] * unit;
}
