// The unbiased fit of core/grid.py, of numbers that are pairs of float16, and codes to words.
//
// Numbers come brought to a root mean square of one. x[t][h][i] is channel 2 r + i of 16 and slots
// 2 c and 2 c + 1 of 8; t counts tiles of slots for keys, blocks of channels for values.
#pragma once
#include <tile.cuh>

using Pairs = u32[2][2];  // [h][i]
constexpr float kTiny = 0x1p-126f;
constexpr u32 kOne = 0x3c003c00u;

// A channel over KEY_GROUP tokens. Column p is plane p, 16 tokens: up to two planes are in a lane.
struct KeyGroups {
  static constexpr int kBits = 2 * KEY_SETS, kCount = KEY_GROUP;
  static constexpr int kGroups = KEY_GROUP == 16 ? 4 : 2;                       // of a lane
  static constexpr int kFirst = 1, kEnd = KEY_GROUP > 32 ? KEY_GROUP / 32 : 1;  // other lanes' bits
  static constexpr bool kByRow = true;  // x[t][0][i] and x[t][1][i] are of the same groups
  // The group of column 2 c + j of row i.
  __device__ static constexpr int of(int i, int j) { return KEY_GROUP == 16 ? 2 * i + j : i; }
};

// All channels of a token.
struct ValueGroups {
  static constexpr int kBits = 2 * VALUE_SETS, kCount = VALUE_DIM;
  static constexpr int kGroups = 4;
  static constexpr int kFirst = 4, kEnd = 32;
  static constexpr bool kByRow = false;  // x[t][h][0] and x[t][h][1] are
  __device__ static constexpr int of(int h, int j) { return 2 * h + j; }
};

__device__ inline bool finite(float x) { return x < as_float(0x7f800000u); }  // of x >= 0 or NaN

// Products as pairs of float16, times a factor for each slot.
template <int kBlocks>
__device__ inline void narrow(const float (&x)[kBlocks][2][4], const float (&factor)[4],
                              Pairs (&out)[kBlocks]) {
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) {
    const int h = i / 2 % 2, row = i % 2;
    const float (&from)[4] = x[i / 4][h];
    out[i / 4][h][row] =
        pack_f16(from[2 * row] * factor[2 * h], from[2 * row + 1] * factor[2 * h + 1]);
  }
}

// Joins what the lanes of a group have found.
template <class Groups>
__device__ inline void sum_lanes(float (&x)[Groups::kGroups]) {
#pragma unroll
  for (int mask = Groups::kFirst; mask < Groups::kEnd; mask *= 2)
#pragma unroll
    for (int i = 0; i < Groups::kGroups; ++i) x[i] += shuffle_xor(x[i], mask);
}
__device__ inline u32 shuffle_pair(u32 pair, int mask) {
  return as_bits(shuffle_xor(as_float(pair), mask));
}

// The pairs of groups of(i, 0) and of(i, 1), in float16.
template <class Groups>
__device__ inline void pack_groups(const float (&x)[Groups::kGroups], u32 (&pairs)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) pairs[i] = pack_f16(x[Groups::of(i, 0)], x[Groups::of(i, 1)]);
}

// Sums over the groups of a lane: of keys by the matrix unit, in float32; of values, few and in
// few lanes, in float16.
template <class Groups>
struct Sums {
  float columns[4] = {};
  u32 pairs[2] = {};

  __device__ void add(const Pairs& x, u32 identity) {
    if (Groups::kByRow) {
      mma_f16(columns, x[0][0], x[0][1], x[1][0], x[1][1], identity, identity);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i / 2] = multiply_add(x[i / 2][i % 2], kOne, pairs[i / 2]);
    }
  }
  __device__ void add_products(const Pairs& x, const Pairs& y, u32 identity) {
    if (Groups::kByRow) {
      const Pairs products = {{multiply(x[0][0], y[0][0]), multiply(x[0][1], y[0][1])},
                              {multiply(x[1][0], y[1][0]), multiply(x[1][1], y[1][1])}};
      add(products, identity);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i / 2] = multiply_add(x[i / 2][i % 2], y[i / 2][i % 2], pairs[i / 2]);
    }
  }
  // Of all lanes.
  __device__ void finish(float (&sums)[Groups::kGroups]) const {
#pragma unroll
    for (int i = 0; i < Groups::kGroups; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[Groups::of(i, 0)] += Groups::kByRow ? columns[2 * i] : low_f16(pairs[i]);
      sums[Groups::of(i, 1)] += Groups::kByRow ? columns[2 * i + 1] : high_f16(pairs[i]);
    }
    sum_lanes<Groups>(sums);
  }
};
__device__ inline u32 identity_operand(int lane) {
  const int r = lane / 4, c = lane % 4;
  return (r == 2 * c ? kOne & 0xffffu : 0) | (r == 2 * c + 1 ? kOne & 0xffff0000u : 0);
}

// Smallest and largest number of every group.
template <class Groups, int kCount>
__device__ inline void extrema(const Pairs (&x)[kCount], float (&low)[Groups::kGroups],
                               float (&high)[Groups::kGroups]) {
  u32 least[2], most[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) least[i] = most[i] = Groups::kByRow ? x[0][0][i] : x[0][i][0];
#pragma unroll
  for (int i = 1; i < 4 * kCount; ++i) {
    const int h = i / 2 % 2, row = i % 2, at = Groups::kByRow ? row : h;
    least[at] = smaller_pair(least[at], x[i / 4][h][row]);
    most[at] = larger_pair(most[at], x[i / 4][h][row]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int mask = Groups::kFirst; mask < Groups::kEnd; mask *= 2) {
      least[i] = smaller_pair(least[i], shuffle_pair(least[i], mask));
      most[i] = larger_pair(most[i], shuffle_pair(most[i], mask));
    }
    const int one = Groups::of(i, 0), other = Groups::of(i, 1);
    low[one] = low_f16(least[i]), high[one] = low_f16(most[i]);
    low[other] = one == other ? smaller(low[one], high_f16(least[i])) : high_f16(least[i]);
    high[other] = one == other ? larger(high[one], high_f16(most[i])) : high_f16(most[i]);
  }
}

// The codes of numbers in groups of these means and sums of squared deviations.
template <class Groups, int kCount>
__device__ inline void choose_codes(const Pairs (&x)[kCount], const float (&mean)[Groups::kGroups],
                                    const float (&squares)[Groups::kGroups],
                                    const float (&low)[Groups::kGroups],
                                    const float (&high)[Groups::kGroups], Pairs (&codes)[kCount]) {
  constexpr float kLevels = (1 << Groups::kBits) - 1, kMostSlope = 6e4f;
  float slope[Groups::kGroups], offset[Groups::kGroups];  // to codes over the largest one
#pragma unroll
  for (int i = 0; i < Groups::kGroups; ++i) {
    float inverse, middle;
    if (Groups::kBits == 2) {
      inverse = inverse_root(larger(squares[i] * (1.0f / Groups::kCount), kTiny)) *
                (1.0f / (kLevels * STEP_OVER_DEVIATION));
      middle = 0.5f * mean[i] + 0.25f * (low[i] + high[i]);
    } else {
      inverse = 1.0f / SHARE_OF_RANGE * reciprocal(larger(high[i] - low[i], kTiny));
      middle = 0.5f * (low[i] + high[i]);
    }
    slope[i] = smaller(inverse, kMostSlope);
    offset[i] = 0.5f - middle * slope[i];
  }
  u32 slopes[2], offsets[2];
  pack_groups<Groups>(slope, slopes);
  pack_groups<Groups>(offset, offsets);
  // Added to a float16 and subtracted again, 1536 rounds it to an integer.
  constexpr u32 kMost = Groups::kBits == 2 ? 0x42004200u : 0x4b804b80u;  // 3, 15
  constexpr u32 kMagic = 0x66006600u, kMinusMagic = 0xe600e600u;
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) {
    const int h = i / 2 % 2, row = i % 2, at = Groups::kByRow ? row : h;
    const u32 share = multiply_add_share(x[i / 4][h][row], slopes[at], offsets[at]);
    codes[i / 4][h][row] = multiply_add(multiply_add(share, kMost, kMagic), kOne, kMinusMagic);
  }
}

// The slope of a group's grid: variance over covariance, both times the count.
__device__ inline float unbiased_scale(float squares, float covariance) {
  return covariance > 0.0f ? squares * reciprocal(larger(covariance, kTiny)) : 0.0f;
}

// The low (set 0) or high two bits of codes.
template <int kBits>
__device__ inline u32 two_bits(u32 codes, int set) {
  if (kBits == 2) return codes;
  constexpr u32 kQuarter = 0x34003400u, kMinus3Eighths = 0xb600b600u, kMinus4 = 0xc400c400u;
  constexpr u32 kMagic = 0x66006600u, kMinusMagic = 0xe600e600u;
  const u32 quarter = multiply_add(codes, kQuarter, kMinus3Eighths);
  const u32 high = multiply_add(multiply_add(quarter, kOne, kMagic), kOne, kMinusMagic);
  return set == 0 ? multiply_add(high, kMinus4, codes) : high;
}

// Words of eight codes, as numbers: column 2 u + h of words[i] is that of codes[4 i + u][h]. Adding
// up planes with weights 4**p is a product, which the matrix unit does exactly.
template <int kBits, int kCount>
__device__ inline void join_planes(const Pairs (&codes)[kCount], int set, int lane,
                                   float (&words)[kCount / 4][4]) {
  const int r = lane / 4, c = lane % 4;
  const float weight = 1 << 4 * c;  // of plane 2 c
  const u32 weights = pack_f16(weight, 4.0f * weight);
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    if (t % 4 == 0) words[t / 4][0] = words[t / 4][1] = words[t / 4][2] = words[t / 4][3] = 0.0f;
    const Pairs& from = codes[t];
    mma_f16(words[t / 4], two_bits<kBits>(from[0][0], set), two_bits<kBits>(from[0][1], set),
            two_bits<kBits>(from[1][0], set), two_bits<kBits>(from[1][1], set),
            r == t % 4 * 2 ? weights : 0, r == t % 4 * 2 + 1 ? weights : 0);
  }
}

// Two integers below 2**16 as the halves of a word.
__device__ inline u32 pack_integers(float low, float high) {
  constexpr float kMagic = 0x1p23f;
  return (as_bits(low + kMagic) & 0xffffu) | as_bits(high + kMagic) << 16;
}
