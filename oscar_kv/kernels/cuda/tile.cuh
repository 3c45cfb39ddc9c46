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

// Bytes from row to row: 16 more than needed, so that 8 rows of a matrix lie in different banks.
__device__ constexpr int pitch(int numbers) { return 2 * numbers + 16; }

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

// Where a lane's row for `load_matrices` begins, so that it loads a 16 x 16 operand a, or b[2].
__device__ inline const u8* a_row(const u8* rows, int pitch, int lane) {
  return rows + lane % 16 * pitch + lane / 16 * 16;
}
__device__ inline const u8* b_row(const u8* rows, int pitch, int lane) {
  return rows + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
}

// All channels of a tile, rotated but for the factor kChannels**-0.5: number e of x[b][h] is
// channel 16 b + 2 r + e / 2 of slot 8 h + 2 c + e % 2. And the squared norms before that, of slots
// 8 (i / 2) + 2 c + i % 2: the diagonal of a product of the states with themselves.
//
// `centred`: less the mean over channels, also in the norms. The mean is channel 0 before the
// rotation, the only one whose sign never changes: leaving that out subtracts it, exactly.
template <int kChannels, bool kCentred>
__device__ inline void rotate(const u8* rows, int lane, float (&x)[kChannels / 16][2][4],
                              float (&squares)[4]) {
  constexpr int kBlocks = kChannels / 16;
  constexpr u32 kNegative = 0x80008000u;
  const int r = lane / 4, c = lane % 4;
  // The Hadamard matrix of order 16. Row r is channel 2 r and row r + 8 the one after it, so that
  // neighbours in memory are in one lane.
  const u32 first = pack_states(1.0f, 1.0f) ^ (odd(r & c) ? kNegative : 0);
  const u32 last = first ^ (r & 4 ? kNegative : 0);  // columns 8 further on
  const u32 signs[4] = {first, first ^ 0x80000000u, last, last ^ 0x80000000u};
  const u8 *a = a_row(rows, pitch(kChannels), lane), *b = b_row(rows, pitch(kChannels), lane);
  float low[4] = {}, high[4] = {};
#pragma unroll
  for (int i = 0; i < 8 * kBlocks; ++i) x[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    auto these = load_matrices(a + 32 * j), states = load_matrices(b + 32 * j);
    if (kCentred && j == 0 && c == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) these.at[i] &= 0xffff0000u, states.at[2 * i] &= 0xffff0000u;
    }
    mma_states(low, these.at[0], these.at[1], these.at[2], these.at[3], states.at[0], states.at[1]);
    mma_states(high, these.at[0], these.at[1], these.at[2], these.at[3], states.at[2],
               states.at[3]);
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      const u32 sign = odd(j & k) ? kNegative : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        mma_states(x[k][h], signs[0] ^ sign, signs[1] ^ sign, signs[2] ^ sign, signs[3] ^ sign,
                   states.at[2 * h], states.at[2 * h + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = 4 * (2 * c + i) + c;
    squares[i] = as_float(shuffle(as_bits(low[i]), from));
    squares[2 + i] = as_float(shuffle(as_bits(high[2 + i]), from));
  }
}
