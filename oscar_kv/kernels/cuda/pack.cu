// Packs pages: rotates 128 tokens of a KV head, fits grids, writes codes and metadata.
//
// A block takes one page and head after the other, a warp for every 16 channels of keys. A warp
// rotates 16 slots of values and of keys, brings them to a root mean square of one and keeps them
// as float16, which is finer than any grid. Values are fitted right there. Keys, whose channels are
// fitted, change hands: a warp gets 16 channels of all slots. So whatever belongs to a group is in
// the registers of one warp. A page is put together in shared memory, and while that goes on the
// values, and then the keys, of the next page arrive.
//
// A token with NaN or Inf in its key or value, or so large that its squared norm leaves float32, is
// stored as zeros.
//
// Constants in capitals come from the page layout (cuda_pack.py).
#include <pack_keys.cuh>
#include <pack_values.cuh>

struct Arguments {
  u8* pool;
  const int* page_ids;  // page i of sequence b becomes page_ids[b pages + i]; negative: left out
  const u16* keys;      // [B, H, T, D], bfloat16 or float16
  const u16* values;    // [B, H, T, E], the same
  i64 key_strides[3];   // of sequence, head and token, in elements
  i64 value_strides[3];
  int pages;   // of a sequence
  int count;   // of pages and heads, of all sequences
  int blocks;  // of the grid
};

constexpr int kWarps = kKeyBlocks;
constexpr int kMine = kTiles / kWarps;  // tiles of a warp
constexpr float kLargestHalf = 65504.0f, kSmallestHalf = 0x1p-24f;

struct alignas(16) Shared {
  u8 keys[kPage * pitch(HEAD_DIM)];  // [slot, channel], then [channel, slot]
  u8 values[kPage * pitch(VALUE_DIM)];
  u8 page[PAGE_BYTES];
  float found[kWarps][kPage];  // <u, u_hat> over the channels of a warp
  float squares[kPage];        // squared norms of keys
  float scale[kPage];          // of tokens, before it is corrected
  float wanted[kPage];         // <u, u>
  float peaks[kTiles];         // largest rotated value of a tile
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda_pack.py counts otherwise");
static_assert(HEAD_DIM * pitch(kPage) <= sizeof(Shared::keys), "keys change hands in place");

// Which tokens a block takes; `exists` unless there are no more.
struct Place {
  bool exists;
  int sequence, head, page;
};
__device__ inline Place place_of(const Arguments& a, int n) {
  const int number = n / HEADS, sequence = number / a.pages;
  return {n < a.count, sequence, n % HEADS, number - sequence * a.pages};
}

// The first page and head from n on, among those of a block, that is not left out. What is left out
// is not even read: while requests decode, that is nearly everything.
__device__ inline int first_filled(const Arguments& a, int n) {
  while (n < a.count && a.page_ids[n / HEADS] < 0) n += a.blocks;
  return n;
}

// Begins to copy the lane's part of the states there.
template <int kChannels>
__device__ inline void fetch(u8* rows, const u16* states, const i64 (&strides)[3], Place at,
                             int warp, int lane) {
  if (at.exists) {
    states += at.sequence * strides[0] + at.head * strides[1] + at.page * kPage * strides[2];
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      copy_tile<kChannels>(rows, states, strides[2], warp + i * kWarps, lane);
  }
  commit_copies();
}

// Tells all warps of a tile's keys and values. A token of which one or the other is not finite gets
// a key and a grid of zeros.
__device__ inline void announce(Shared& shared, float (&keys)[kKeyBlocks][2][4],
                                const float (&squares)[4], PackedValues& values, int tile,
                                int lane) {
  const int r = lane / 4, c = lane % 4;
  float peak = 0.0f;
  bool all = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool good = finite(values.largest[i]) && finite(squares[i]);
    all = all && good;
    peak = larger(peak, good ? values.largest[i] : 0.0f);
    if (r == 0) shared.squares[16 * tile + i / 2 * 8 + 2 * c + i % 2] = good ? squares[i] : 0.0f;
    if (i == r % 4 && !good) values.scale = values.mean = 0.0f;
  }
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
  if (lane == 0) shared.peaks[tile] = peak;
  if (!any_lane(!all)) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool good = finite(values.largest[i]) && finite(squares[i]);
#pragma unroll
    for (int b = 0; b < kKeyBlocks; ++b) {
      keys[b][i / 2][i % 2] = good ? keys[b][i / 2][i % 2] : 0.0f;
      keys[b][i / 2][i % 2 + 2] = good ? keys[b][i / 2][i % 2 + 2] : 0.0f;
    }
  }
}

// Mean square of the page's keys, once each is brought to a norm of one and unless it is zeros.
__device__ inline float mean_square_of_units(const Shared& shared, int lane) {
  const auto squares = load<4>(shared.squares + 4 * lane);
  float count = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) count += as_float(squares.at[i]) > 0.0f ? 1.0f : 0.0f;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
  return count > 0.0f ? count * (1.0f / (kPage * HEAD_DIM)) : 1.0f;
}

// Brings a tile of keys to a root mean square of one and hands them over, as [channel, slot].
__device__ inline void hand_over(Shared& shared, const float (&x)[kKeyBlocks][2][4],
                                 float mean_square, int tile, int lane) {
  // The norm of a key is at most that, unless its scale is beyond float16: then it is cut, so that
  // the square of no deviation leaves float16.
  constexpr float kMost = 126.0f;
  const int r = lane / 4, c = lane % 4;
  float factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = 16 * tile + i / 2 * 8 + 2 * c + i % 2;
    const float squares = shared.squares[slot];
    const float product = squares > 0.0f ? squares * mean_square : mean_square;
    float scale = product * inverse_root(larger(product, kTiny));
    scale = smaller(larger(scale, kSmallestHalf), kLargestHalf);
    scale = low_f16(pack_f16(scale, scale));
    const float inverse = reciprocal(scale), wanted = squares * inverse * inverse;
    factor[i] = ROTATION_UNIT * inverse;
    if (wanted > kMost * kMost) factor[i] *= kMost * inverse_root(wanted);
    if (r == 0) shared.scale[slot] = scale, shared.wanted[slot] = smaller(wanted, kMost * kMost);
  }
  Pairs pairs[kKeyBlocks];
  narrow(x, factor, pairs);
#pragma unroll
  for (int i = 0; i < 4 * kKeyBlocks; ++i) {
    const int h = i / 2 % 2, channel = i / 4 * 16 + 2 * r + i % 2;
    u8* target = shared.keys + channel * pitch(kPage) + 2 * (16 * tile + 8 * h + 2 * c);
    *reinterpret_cast<u32*>(target) = pairs[i / 4][h][i % 2];
  }
}

// The token scale of a slot that makes <k, k_hat> what <k, k> is.
__device__ inline u16 corrected_scale(const Shared& shared, int slot) {
  float found = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) found += shared.found[w][slot];
  const float wanted = shared.wanted[slot];
  float ratio = found > 0.0f ? wanted * reciprocal(larger(found, 1e-30f)) : 1.0f;
  ratio = smaller(larger(ratio, REFIT_LOW), REFIT_HIGH);
  const float scale = smaller(larger(shared.scale[slot] * ratio, kSmallestHalf), kLargestHalf);
  return static_cast<u16>(wanted > 0.0f ? pack_f16(scale, 0.0f) : 0);
}

// Of the page's largest value, the power of two that brings it into (VALUE_PEAK / 2, VALUE_PEAK].
__device__ inline u32 unit_exponent(const float (&peaks)[kTiles]) {
  float peak = 0.0f;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) peak = larger(peak, peaks[i]);
  peak *= VALUE_ROTATION_UNIT / VALUE_PEAK;
  const int exponent = as_bits(peak) + 0x7fffff >> 23;
  constexpr int kLow = 127 - VALUE_UNIT_RANGE, kHigh = 127 + VALUE_UNIT_RANGE;
  return exponent < kLow ? kLow : exponent > kHigh ? kHigh : exponent;
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, BLOCKS_PER_SM)
    pack(const __grid_constant__ Arguments a) {
  let_next_grid_start();
  wait_for_previous_grid();
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int warp = thread() / 32, lane = thread() % 32;
  int n = first_filled(a, block());
  if (n >= a.count) return;
  Place next = place_of(a, n);
  fetch<VALUE_DIM>(shared.values, a.values, a.value_strides, next, warp, lane);
  fetch<HEAD_DIM>(shared.keys, a.keys, a.key_strides, next, warp, lane);
  for (int i = thread(); i < PAGE_BYTES / 16; i += 32 * kWarps)  // also what no field covers
    reinterpret_cast<Words<4>*>(shared.page)[i] = {};

  for (int following; n < a.count; n = following) {
    const int page_id = a.page_ids[n / HEADS];
    following = first_filled(a, n + a.blocks);
    next = place_of(a, following);
    PackedValues values[kMine];
    float keys[kMine][kKeyBlocks][2][4];
    wait_for_copies<1>();
    sync_warp();
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      values[i] = pack_values(shared.values + 16 * (warp + i * kWarps) * pitch(VALUE_DIM), lane);
    sync_warp();
    fetch<VALUE_DIM>(shared.values, a.values, a.value_strides, next, warp, lane);
    wait_for_copies<1>();
    sync_warp();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int tile = warp + i * kWarps;
      float squares[4];
      rotate<HEAD_DIM, false>(shared.keys + 16 * tile * pitch(HEAD_DIM), lane, keys[i], squares);
      announce(shared, keys[i], squares, values[i], tile, lane);
    }
    sync_block();

    const u32 exponent = unit_exponent(shared.peaks);
    if (thread() == 0) *reinterpret_cast<u32*>(shared.page + VALUE_UNIT) = exponent << 23;
    const float unit = VALUE_ROTATION_UNIT * as_float((254 - exponent) << 23);
    const float mean_square = mean_square_of_units(shared, lane);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int tile = warp + i * kWarps;
      hand_over(shared, keys[i], mean_square, tile, lane);
      write_values(shared.page, values[i], unit, tile, lane);
    }
    sync_block();

    pack_keys(shared.page, shared.keys, shared.found[warp], 16 * warp, lane);
    sync_block();

    fetch<HEAD_DIM>(shared.keys, a.keys, a.key_strides, next, warp, lane);
    u8* page = a.pool + (static_cast<i64>(page_id) * HEADS + n % HEADS) * PAGE_BYTES;
    for (int i = 16 * thread(); i < PAGE_BYTES; i += 16 * 32 * kWarps)
      if (i < TOKEN_SCALE || i >= TOKEN_SCALE + 2 * kPage)
        *reinterpret_cast<Words<4>*>(page + i) = load<4>(shared.page + i);
    if (thread() < kPage)
      reinterpret_cast<u16*>(page + TOKEN_SCALE)[thread()] = corrected_scale(shared, thread());
  }
}
