// From what the warps of a block found to what the block found.
#pragma once
#include <softmax.cuh>

// Merges what the warps of a block found into a slot: [rows, E] sums and their maxima.
//
// Output b holds channels first + b % 2 * odd + b / 2 * 32 of the lane's rows r, and of rows r + 8
// those `second` further on.
__device__ inline void merge(const Arguments& a, i64 slot, u8* memory, Softmax state,
                             const float (&output)[kBlocks][4], int first, int odd, int second,
                             int warp, int lane) {
  constexpr int kRow = VALUE_DIM + 4;
  float* sums = reinterpret_cast<float*>(memory);
  float* maxima = sums + kWarps * kColumns * kRow;
  const int c = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
      state.normalizer[i] += shuffle_xor(state.normalizer[i], mask);
    const int column = warp * kColumns + 2 * c + i;
    if (lane < 4) {
      maxima[2 * column] = state.maximum[i];
      maxima[2 * column + 1] = state.normalizer[i];
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float* target = sums + column * kRow + first + b % 2 * odd + b / 2 * 32;
      target[0] = output[b][i];
      target[second] = output[b][i + 2];
    }
  }
  sync_block();
  for (int i = thread(); i < a.rows * VALUE_DIM; i += 32 * kWarps) {
    const int row = i / VALUE_DIM, channel = i % VALUE_DIM;
    float maximum = kBlind, sum = 0.0f, normalizer = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = larger(maximum, maxima[2 * (w * kColumns + row)]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int column = w * kColumns + row;
      const float share = power_of_two(maxima[2 * column] - maximum);
      sum += share * sums[column * kRow + channel];
      normalizer += share * maxima[2 * column + 1];
    }
    const i64 place = slot * a.rows + row;
    a.sums[place * VALUE_DIM + channel] = sum;
    if (channel == 0) {
      a.maxima[2 * place] = maximum;
      a.maxima[2 * place + 1] = normalizer;
    }
  }
  sync_block();
}
