// Keys of a page: 16 channels, with all slots, at a time.
#pragma once
#include <fit.cuh>

__device__ inline void write_key_words(u8* page, const Pairs (&codes)[kTiles], int first_channel,
                                       int lane) {
  const int r = lane / 4, c = lane % 4;
#pragma unroll
  for (int set = 0; set < KEY_SETS; ++set) {
    float words[kTiles / 4][4];
    join_planes<KeyGroups::kBits>(codes, set, lane, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = 16 * set + 8 * (i / 2) + 2 * c + i % 2;
      *reinterpret_cast<u32*>(page + KEY_CODES + 2 * (word * HEAD_DIM + first_channel + 2 * r)) =
          pack_integers(words[i / 2][i % 2], words[i / 2][i % 2 + 2]);
    }
  }
}

// <u, u_hat> of every slot, over the 16 channels, to `found`. The matrix unit adds up: row 2 t + h
// of the sum, whose columns are slots, takes what a transpose makes of the products of x[t][h].
__device__ inline void find_products(const Pairs (&x)[kTiles], const Pairs (&codes)[kTiles],
                                     const float (&step)[KeyGroups::kGroups],
                                     const float (&zero)[KeyGroups::kGroups], int lane,
                                     float* found) {
  const int r = lane / 4, c = lane % 4;
  constexpr float kUnit = 16.0f;  // over which products fit float16
  float small_step[KeyGroups::kGroups], small_zero[KeyGroups::kGroups];
#pragma unroll
  for (int i = 0; i < KeyGroups::kGroups; ++i) {
    small_step[i] = step[i] * (1.0f / kUnit);
    small_zero[i] = zero[i] * (1.0f / kUnit);
  }
  u32 steps[2], zeros[2];
  pack_groups<KeyGroups>(small_step, steps);
  pack_groups<KeyGroups>(small_zero, zeros);
  float total[4] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    u32 read[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 first = multiply(x[t][h][0], multiply_add(codes[t][h][0], steps[0], zeros[0]));
      const u32 second = multiply_add(codes[t][h][1], steps[1], zeros[1]);
      read[h] = transpose(multiply_add(x[t][h][1], second, first));
    }
    const u32 first = r == 2 * t % 8 ? kOne : 0, second = r == 2 * t % 8 + 1 ? kOne : 0;
    mma_f16(total, t < 4 ? first : 0, t < 4 ? 0 : first, t < 4 ? second : 0, t < 4 ? 0 : second,
            read[0], read[1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) found[8 * r + 64 * (i / 2) + 2 * c + i % 2] = total[i] * kUnit;
}

// Fits 16 channels of all keys, [channel, slot], and writes them; leaves <u, u_hat> in `found`.
__device__ inline void pack_keys(u8* page, const u8* keys, float* found, int first_channel,
                                 int lane) {
  using Groups = KeyGroups;
  constexpr int kGroups = Groups::kGroups, kColumns = kGroups / 2;
  constexpr float kHalfLevels = 0.5f * ((1 << Groups::kBits) - 1);
  const int r = lane / 4, c = lane % 4;
  const u32 identity = identity_operand(lane);
  // As `a_row`, but channel 2 r in row r and 2 r + 1 in row r + 8.
  const int row = first_channel + lane % 8 * 2 + lane / 8 % 2;
  const u8* rows = keys + row * pitch(kPage) + lane / 16 * 16;
  Pairs x[kTiles], centred[kTiles], codes[kTiles];
  Sums<Groups> sums, square_sums, code_sums, products;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const auto four = load_matrices(rows + 32 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[t][i / 2][i % 2] = four.at[i];
    sums.add(x[t], identity);
  }
  // Less their mean as float16 has it; `rest` is what then remains of it.
  float mean[kGroups], rest[kGroups], squares[kGroups], low[kGroups], high[kGroups];
  sums.finish(mean);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) mean[i] *= 1.0f / Groups::kCount;
  u32 rounded_mean[2];
  pack_groups<Groups>(mean, rounded_mean);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rest[Groups::of(i, 0)] = mean[Groups::of(i, 0)] - low_f16(rounded_mean[i]);
    rest[Groups::of(i, 1)] = mean[Groups::of(i, 1)] - high_f16(rounded_mean[i]);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      centred[t][i / 2][i % 2] =
          multiply_add(x[t][i / 2][i % 2], kOne, rounded_mean[i % 2] ^ 0x80008000u);
    square_sums.add_products(centred[t], centred[t], identity);
  }
  square_sums.finish(squares);
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
    squares[i] = larger(squares[i] - Groups::kCount * rest[i] * rest[i], 0.0f);
  extrema<Groups>(centred, low, high);
  choose_codes<Groups>(centred, rest, squares, low, high, codes);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    code_sums.add(codes[t], identity);
    products.add_products(centred[t], codes[t], identity);
  }
  float sum[kGroups], product[kGroups];
  code_sums.finish(sum);
  products.finish(product);

  // Grids as they will be read.
  float step[kGroups], zero[kGroups];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    float scale[2], middle[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = Groups::of(i, j);
      scale[i] = unbiased_scale(squares[group], product[group] - rest[group] * sum[group]);
    }
    const u32 scales = pack_e4m3(scale[0], scale[1]), steps = low_e4m3(scales);
    step[Groups::of(0, j)] = low_f16(steps), step[Groups::of(1, j)] = high_f16(steps);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = Groups::of(i, j);
      const float mean_code = sum[group] * (1.0f / Groups::kCount);
      middle[i] = mean[group] - step[group] * (mean_code - kHalfLevels);
    }
    const u32 centres = pack_e4m3(middle[0], middle[1]), rounded = low_e4m3(centres);
    zero[Groups::of(0, j)] = low_f16(rounded) - step[Groups::of(0, j)] * kHalfLevels;
    zero[Groups::of(1, j)] = high_f16(rounded) - step[Groups::of(1, j)] * kHalfLevels;
    if (KEY_GROUP == 16 || 32 * c % KEY_GROUP == 0) {
      const int entry = (32 * c / KEY_GROUP + j) * HEAD_DIM + first_channel + 2 * r;
      *reinterpret_cast<u16*>(page + KEY_SCALE + entry) = static_cast<u16>(scales);
      *reinterpret_cast<u16*>(page + KEY_CENTRE + entry) = static_cast<u16>(centres);
    }
  }
  write_key_words(page, codes, first_channel, lane);
  find_products(x, codes, step, zero, lane, found);
}
