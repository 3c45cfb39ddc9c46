// A page's states in shared memory, and their rotation by the matrix unit:
//
//     rotated[16 channels, 8 slots] = signs[16 channels, 16 channels] states[16 channels, 8 slots]
//
// Rows of states lie in the order of slots (storage/layout.py), so that columns 0 .. 7 of a product
// are the eight planes of one word. A *tile* is 16 slots: those of words 2 t and 2 t + 1.
#pragma once
#include <states.cuh>

constexpr int kPage = 128;  // tokens, or slots
constexpr int kTiles = kPage / 16;
constexpr int kKeyBlocks = HEAD_DIM / 16, kValueBlocks = VALUE_DIM / 16;  // of 16 channels

// Bytes from row to row: 16 more than they need, so that 8 rows of a matrix lie in different banks.
__device__ constexpr int pitch(int channels) { return 2 * channels + 16; }

// Whether an odd number of three bits are set: the sign of a Hadamard matrix at i & j.
__device__ constexpr bool odd(int bits) { return (bits ^ bits >> 1 ^ bits >> 2) & 1; }

// Copies the states of a tile, kChannels each, tokens a stride apart; `rows` is that of slot 0.
template <int kChannels>
__device__ inline void copy_tile(u8* rows, const u16* states, i64 stride, int tile, int lane) {
  constexpr int kPieces = kChannels / 8;  // of 16 bytes, of a row
  constexpr int kRows = 32 / kPieces;     // at a time, at most 8: their tokens are 16 apart
  const int row = lane / kPieces, piece = lane % kPieces;
  rows += (16 * tile + row) * pitch(kChannels) + 16 * piece;
  states += (16 * row + 2 * tile) * stride + 8 * piece;
#pragma unroll
  for (int i = 0; i < 16; i += kRows)
    copy_async(rows + i * pitch(kChannels), states + (16 * (i % 8) + i / 8) * stride);
}

// Where the row lies that a lane has to name for `load_matrices`: these are then slots 0 .. 7 by
// channels 0 .. 7 and 8 .. 15, and slots 8 .. 15 by the same.
template <int kChannels>
__device__ inline const u8* row_of_lane(const u8* rows, int lane) {
  return rows + (lane / 16 * 8 + lane % 8) * pitch(kChannels) + lane / 8 % 2 * 16;
}

// The Hadamard matrix of order 16 as an operand, over kSignUnit. Rows r and r + 8 are channels 2 r
// and 2 r + 1: neighbours in memory, in one lane.
constexpr float kSignUnit = 16.0f;  // squares of values from 1e-18 to 1e18 then fit float32
constexpr u32 kNegative = 0x80008000u;
struct Signs {
  u32 at[4];
};
__device__ inline Signs hadamard_signs(int lane) {
  const int r = lane / 4, c = lane % 4;
  const u32 first = pack_states(1.0f / kSignUnit, 1.0f / kSignUnit) ^ (odd(r & c) ? kNegative : 0);
  const u32 second = first ^ (r & 4 ? kNegative : 0);  // columns 8 further on
  return {first, first ^ 0x80000000u, second, second ^ 0x80000000u};
}
__device__ inline Signs times_sign(Signs signs, bool negative) {
#pragma unroll
  for (int i = 0; i < 4; ++i) signs.at[i] ^= negative ? kNegative : 0;
  return signs;
}
__device__ inline void multiply_states(float (&sum)[4], const Signs& a, u32 b0, u32 b1) {
  mma_states(sum, a.at[0], a.at[1], a.at[2], a.at[3], b0, b1);
}

// Channels 16 block .. + 15 of all keys: x[t][h] has slots 8 h .. 8 h + 7 of tile t.
__device__ inline void rotate_keys(const u8* rows, int block, int lane,
                                   float (&x)[kTiles][2][4]) {
  const u8* mine = row_of_lane<HEAD_DIM>(rows, lane);
  const Signs signs = hadamard_signs(lane);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[t][i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int j = 0; j < kKeyBlocks; ++j) {
    const Signs signed_ones = times_sign(signs, odd(block & j));
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const auto keys = load_matrices(mine + 16 * t * pitch(HEAD_DIM) + 32 * j);
      multiply_states(x[t][0], signed_ones, keys.at[0], keys.at[1]);
      multiply_states(x[t][1], signed_ones, keys.at[2], keys.at[3]);
    }
  }
}

// All channels of the values of a tile, less their mean: x[b][h] has channels 16 b .. 16 b + 15 of
// slots 8 h .. 8 h + 7. The mean over channels is channel 0 before the rotation, the only one whose
// sign never changes, so leaving that out subtracts it exactly.
__device__ inline void rotate_values(const u8* rows, int tile, int lane,
                                     float (&x)[kValueBlocks][2][4]) {
  const u8* mine = row_of_lane<VALUE_DIM>(rows + 16 * tile * pitch(VALUE_DIM), lane);
  const Signs signs = hadamard_signs(lane);
#pragma unroll
  for (int b = 0; b < kValueBlocks; ++b)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[b][i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int j = 0; j < kValueBlocks; ++j) {
    auto values = load_matrices(mine + 32 * j);
    if (j == 0 && lane % 4 == 0) values.at[0] &= 0xffff0000u, values.at[2] &= 0xffff0000u;
#pragma unroll
    for (int b = 0; b < kValueBlocks; ++b) {
      const Signs signed_ones = times_sign(signs, odd(b & j));
      multiply_states(x[b][0], signed_ones, values.at[0], values.at[1]);
      multiply_states(x[b][1], signed_ones, values.at[2], values.at[3]);
    }
  }
}

// Squared norms of the keys of a tile: of slots r and r + 8, in lanes 4 r + r / 2 only. They are the
// diagonal of a product with the same keys.
__device__ inline void key_squares(const u8* rows, int tile, int lane, float (&squares)[2]) {
  rows += 16 * tile * pitch(HEAD_DIM);
  const u8* columns = row_of_lane<HEAD_DIM>(rows, lane);
  rows += lane % 16 * pitch(HEAD_DIM) + lane / 16 * 16;  // as the other operand needs them
  float low[4] = {}, high[4] = {};
#pragma unroll
  for (int j = 0; j < kKeyBlocks; ++j) {
    const auto a = load_matrices(rows + 32 * j), b = load_matrices(columns + 32 * j);
    mma_states(low, a.at[0], a.at[1], a.at[2], a.at[3], b.at[0], b.at[1]);
    mma_states(high, a.at[0], a.at[1], a.at[2], a.at[3], b.at[2], b.at[3]);
  }
  const bool second = lane / 4 % 2;
  squares[0] = second ? low[1] : low[0];
  squares[1] = second ? high[3] : high[2];
}
