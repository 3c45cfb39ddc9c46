// The unbiased fit of core/grid.py, of numbers that lie as a product leaves them, and codes to words.
//
// Number e of x[t][h] is row r + 8 (e / 2) and column 2 c + e % 2 of a 16 x 8 product. Rows are
// channels and columns slots; `t` counts tiles of slots for keys, blocks of channels for values.
#pragma once
#include <tile.cuh>

constexpr float kStepOverDeviation = STEP_OVER_DEVIATION, kShareOfRange = SHARE_OF_RANGE;
constexpr float kTiny = 0x1p-126f;
constexpr float kNoise = 0x1p-20f;  // of a squared mean: what is less is rounding, so no deviation
constexpr u32 kOne = 0x3c003c00u;  // a pair of float16

// A channel over KEY_GROUP tokens. Column p is plane p, 16 tokens: up to two planes are in a lane.
struct KeyGroups {
  static constexpr int kBits = 2 * KEY_SETS, kCount = KEY_GROUP;
  static constexpr int kGroups = KEY_GROUP == 16 ? 4 : 2;                      // of a lane
  static constexpr int kFirst = 1, kEnd = KEY_GROUP > 32 ? KEY_GROUP / 32 : 1;  // other lanes' bits
  __device__ static constexpr int of(int, int e) { return KEY_GROUP == 16 ? e : e / 2; }
};

// All channels of a token.
struct ValueGroups {
  static constexpr int kBits = 2 * VALUE_SETS, kCount = VALUE_DIM;
  static constexpr int kGroups = 4;
  static constexpr int kFirst = 4, kEnd = 32;
  __device__ static constexpr int of(int h, int e) { return 2 * h + e % 2; }
};

// Joins what the lanes of a group have found.
template <class Groups, class Operation>
__device__ inline void over_lanes(float (&x)[Groups::kGroups], Operation operation) {
#pragma unroll
  for (int mask = Groups::kFirst; mask < Groups::kEnd; mask *= 2)
#pragma unroll
    for (int i = 0; i < Groups::kGroups; ++i) x[i] = operation(x[i], shuffle_xor(x[i], mask));
}
template <class Groups>
__device__ inline void sum_lanes(float (&x)[Groups::kGroups]) {
  over_lanes<Groups>(x, [](float a, float b) { return a + b; });
}

// Of every group of a lane: its spread about the mean, and the line from numbers to codes.
template <class Groups>
struct Fit {
  float squares[Groups::kGroups];  // sum of squared deviations
  float low[Groups::kGroups], high[Groups::kGroups];
  float slope[Groups::kGroups], offset[Groups::kGroups];  // to the codes over their largest
};

template <class Groups, int kCount>
__device__ inline Fit<Groups> fit(const float (&x)[kCount][2][4],
                                  const float (&mean)[Groups::kGroups]) {
  constexpr int kLevels = (1 << Groups::kBits) - 1;
  Fit<Groups> out;
#pragma unroll
  for (int i = 0; i < Groups::kGroups; ++i) out.squares[i] = 0.0f;
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float number = x[t][i / 4][i % 4];
      out.squares[Groups::of(i / 4, i % 4)] += number * number;
    }
  }
#pragma unroll
  for (int i = 7; i >= 0; --i) {  // not from infinities: NaN has to stay where all is NaN
    const int group = Groups::of(i / 4, i % 4);
    out.low[group] = out.high[group] = x[0][i / 4][i % 4];
  }
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int group = Groups::of(i / 4, i % 4);
      out.low[group] = smaller(out.low[group], x[t][i / 4][i % 4]);
      out.high[group] = larger(out.high[group], x[t][i / 4][i % 4]);
    }
  }
  sum_lanes<Groups>(out.squares);
  over_lanes<Groups>(out.low, smaller);
  over_lanes<Groups>(out.high, larger);
#pragma unroll
  for (int i = 0; i < Groups::kGroups; ++i) {
    const float low = out.low[i], high = out.high[i];
    const float of_mean = Groups::kCount * mean[i] * mean[i];
    const float squares = out.squares[i] - of_mean;
    out.squares[i] = squares < kNoise * of_mean ? 0.0f : squares;
    float inverse, middle;
    if (Groups::kBits == 2) {
      inverse = inverse_root(larger(out.squares[i] * (1.0f / Groups::kCount), kTiny)) *
                (1.0f / kStepOverDeviation);
      middle = 0.5f * mean[i] + 0.25f * (low + high);
    } else {
      inverse = kLevels / kShareOfRange * reciprocal(larger(high - low, kTiny));
      middle = 0.5f * (low + high);
    }
    out.slope[i] = inverse * (1.0f / kLevels);
    out.offset[i] = 0.5f - middle * out.slope[i];
  }
  return out;
}

// What the codes of a lane's numbers are, and what the codes say of the groups.
template <class Groups, int kCount>
struct Codes {
  u32 at[kCount][2][2];       // [t][h][row]: pairs of float16, columns 2 c and 2 c + 1
  u32 numbers[kCount][2][2];  // what they stand for, likewise
  float sum[Groups::kGroups];        // of codes
  float products[Groups::kGroups];  // sum of numbers times their codes
};

template <class Groups, int kCount>
__device__ inline Codes<Groups, kCount> encode(const float (&x)[kCount][2][4],
                                               const Fit<Groups>& fit) {
  constexpr float kLevels = (1 << Groups::kBits) - 1;
  // Added to a float32 and subtracted again, it rounds it to an integer.
  constexpr float kMagic = 0x1.8p23f;
  // Sums of pairs of codes, exact in float16: keys have one for each row, values for each h.
  constexpr bool kByRow = Groups::of(0, 0) != Groups::of(0, 2);
  Codes<Groups, kCount> out;
  u32 sums[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < Groups::kGroups; ++i) out.products[i] = 0.0f;
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float codes[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int e = 2 * row + i, group = Groups::of(h, e);
          const float level = share(x[t][h][e], fit.slope[group], fit.offset[group]);
          codes[i] = level * kLevels + kMagic - kMagic;
          out.products[group] += x[t][h][e] * codes[i];
        }
        const u32 pair = pack_f16(codes[0], codes[1]);
        out.at[t][h][row] = pair;
        out.numbers[t][h][row] = pack_f16(x[t][h][2 * row], x[t][h][2 * row + 1]);
        u32& sum = sums[kByRow ? row : h];
        sum = multiply_add(pair, kOne, sum);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Groups::kGroups; ++i) out.sum[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int mask = Groups::kFirst; mask < Groups::kEnd; mask *= 2)
      sums[i] = multiply_add(sums[i], kOne, as_bits(shuffle_xor(as_float(sums[i]), mask)));
    out.sum[kByRow ? Groups::of(0, 2 * i) : Groups::of(i, 0)] += low_f16(sums[i]);
    out.sum[kByRow ? Groups::of(0, 2 * i + 1) : Groups::of(i, 1)] += high_f16(sums[i]);
  }
  sum_lanes<Groups>(out.products);
  return out;
}

// The slope of a group's grid: variance over covariance, both times the count.
__device__ inline float unbiased_scale(float squares, float covariance) {
  return covariance > 0.0f ? squares * reciprocal(larger(covariance, kTiny)) : 0.0f;
}

// The low (set 0) or high two bits of codes, pairs of float16.
template <int kBits>
__device__ inline u32 two_bits(u32 codes, int set) {
  if (kBits == 2) return codes;
  constexpr u32 kQuarter = 0x34003400u, kMinus3Eighths = 0xb600b600u, kMinus4 = 0xc400c400u;
  constexpr u32 kMagic = 0x66006600u, kMinusMagic = 0xe600e600u;  // 1536, rounds to an integer
  const u32 quarter = multiply_add(codes, kQuarter, kMinus3Eighths);
  const u32 high = multiply_add(multiply_add(quarter, kOne, kMagic), kOne, kMinusMagic);
  return set == 0 ? multiply_add(high, kMinus4, codes) : high;
}

// Words of eight codes, as numbers: column 2 u + h of words[i] is that of x[4 i + u][h]. Adding up
// planes with weights 4**p is a product, which the matrix unit does exactly.
template <int kBits, int kCount>
__device__ inline void join_planes(const u32 (&codes)[kCount][2][2], int set, int lane,
                                   float (&words)[kCount / 4][4]) {
  const int r = lane / 4, c = lane % 4;
  const float weight = 1 << 4 * c;  // of plane 2 c
  const u32 weights = pack_f16(weight, 4.0f * weight);
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    if (t % 4 == 0) words[t / 4][0] = words[t / 4][1] = words[t / 4][2] = words[t / 4][3] = 0.0f;
    const auto& from = codes[t];
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
