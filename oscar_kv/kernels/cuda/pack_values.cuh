// Values of a page: a tile of 16 slots, with all channels, at a time.
#pragma once
#include <fit.cuh>

// What is kept of a tile of values until the largest value of the page is known.
struct PackedValues {
  u32 words[VALUE_SETS][kValueBlocks / 4][2];  // of block 4 i + c, channel 2 r or 2 r + 1, 2 tokens
  float largest[4];  // of slot 8 (i / 2) + 2 c + i % 2; not finite where the token is not
  float scale, mean, mean_code;  // of slot i = r % 4
};

// One of four, by two bits.
__device__ inline float pick(const float (&x)[4], int which) {
  const float low = which & 1 ? x[1] : x[0], high = which & 1 ? x[3] : x[2];
  return which & 2 ? high : low;
}

// Rotates and fits the values of a tile.
__device__ inline PackedValues pack_values(const u8* rows, int lane) {
  using Groups = ValueGroups;
  const int r = lane / 4, c = lane % 4;
  float mean[4], squares[4], factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = i / 2 * 8 + 2 * c + i % 2;
    mean[i] = to_float(*reinterpret_cast<const u16*>(rows + slot * pitch(VALUE_DIM)));
  }
  Pairs x[kValueBlocks], codes[kValueBlocks];
  {
    float rotated[kValueBlocks][2][4];
    rotate<VALUE_DIM, true>(rows, lane, rotated, squares);
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[i] = inverse_root(larger(squares[i], kTiny));
    narrow(rotated, factor, x);
  }
  const float none[4] = {};  // the mean has been subtracted
  float low[4], high[4], count[4];
  extrema<Groups>(x, low, high);
#pragma unroll
  for (int i = 0; i < 4; ++i) count[i] = VALUE_DIM;
  choose_codes<Groups>(x, none, count, low, high, codes);
  Sums<Groups> code_sums, products;
#pragma unroll
  for (int b = 0; b < kValueBlocks; ++b) {
    code_sums.add(codes[b], 0);
    products.add_products(x[b], codes[b], 0);
  }
  float sum[4], covariance[4];
  code_sums.finish(sum);
  products.finish(covariance);

  PackedValues out;
#pragma unroll
  for (int set = 0; set < VALUE_SETS; ++set) {
    float words[kValueBlocks / 4][4];
    join_planes<Groups::kBits>(codes, set, lane, words);
#pragma unroll
    for (int i = 0; i < kValueBlocks / 4; ++i) {
      out.words[set][i][0] = pack_integers(words[i][0], words[i][1]);
      out.words[set][i][1] = pack_integers(words[i][2], words[i][3]);
    }
  }
  float norm[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    norm[i] = squares[i] * factor[i];
    const float largest = larger(high[i] * norm[i] + mean[i], -(low[i] * norm[i] + mean[i]));
    out.largest[i] = finite(squares[i]) ? largest : squares[i];
  }
  out.scale = pick(norm, r) * unbiased_scale(VALUE_DIM, pick(covariance, r));
  out.mean = pick(mean, r);
  out.mean_code = pick(sum, r) * (1.0f / VALUE_DIM);
  return out;
}

// Writes the grids and words of a tile; `unit` is what its numbers have to be multiplied by.
__device__ inline void write_values(u8* page, const PackedValues& values, float unit, int tile,
                                    int lane) {
  const int r = lane / 4, c = lane % 4;
  if (r < 4) {
    const int slot = 16 * tile + r / 2 * 8 + 2 * c + r % 2;
    const u32 scale = pack_e4m3(values.scale * unit, 0.0f);
    const float step = low_f16(low_e4m3(scale));
    const float excess = values.mean_code - 0.5f * ((1 << 2 * VALUE_SETS) - 1);
    const u32 centre = pack_e4m3(0.0f, values.mean * unit - step * excess);
    *reinterpret_cast<u16*>(page + VALUE_GRID + 2 * slot) = static_cast<u16>(scale | centre);
  }
#pragma unroll
  for (int set = 0; set < VALUE_SETS; ++set) {
#pragma unroll
    for (int i = 0; i < 2 * (kValueBlocks / 4); ++i) {
      const int block = set * kValueBlocks + i / 2 * 4 + c, channel = 2 * r + i % 2;
      u8* target = page + VALUE_CODES + 2 * ((16 * block + channel) * 16 + 2 * tile);
      *reinterpret_cast<u32*>(target) = values.words[set][i / 2][i % 2];
    }
  }
}
