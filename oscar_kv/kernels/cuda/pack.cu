// Packs pages: rotates 128 tokens of a KV head, fits grids, writes codes and metadata.
//
// A block takes one page and head after the other, a warp for every 16 channels of keys. First each
// warp has 16 slots of the values to itself, with all their channels, then 16 channels of the keys,
// with all their slots: whatever is fitted together is in the registers of one warp. While keys are
// worked on the values of the next page arrive, and the other way round. A page is put together in
// shared memory.
//
// A token with NaN or Inf in its key or value, or so large that its rotation or its squared norm
// leaves float32, is stored as zeros.
//
// Constants in capitals come from the page layout (cuda_pack.py).
#include <fit.cuh>

struct Arguments {
  u8* pool;
  const int* page_ids;  // page i of sequence b becomes page_ids[b pages + i]
  const u16* keys;      // [B, H, T, D], bfloat16 or float16
  const u16* values;    // [B, H, T, E], the same
  i64 key_strides[3];   // of sequence, head and token, in elements
  i64 value_strides[3];
  int pages;   // of a sequence
  int count;   // of pages and heads, of all sequences
  int blocks;  // of the grid
};

constexpr int kWarps = kKeyBlocks;
constexpr int kMine = kTiles / kWarps;  // tiles of values of a warp
__device__ inline float infinity() { return as_float(0x7f800000u); }
constexpr float kLargestHalf = 65504.0f, kSmallestHalf = 0x1p-24f;

struct alignas(16) Shared {
  u8 keys[kPage * pitch(HEAD_DIM)];
  u8 values[kPage * pitch(VALUE_DIM)];
  u8 page[PAGE_BYTES];
  float found[kWarps][kPage];  // <u, u_hat> over the channels of a warp
  float squares[kPage];        // of keys; infinite where a token is not finite
  float scale[kPage];          // of tokens, before it is corrected
  float wanted[kPage];         // <u, u>
  float inverse[kPage];        // what rotated keys have to be multiplied by
  float peaks[kTiles];         // largest rotated value of a tile
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda_pack.py counts otherwise");

// What is kept of a tile of values until the largest value of the page is known.
struct PackedValues {
  u32 words[VALUE_SETS][kValueBlocks / 4][2];  // of block 4 i + c, rows r and r + 8, two tokens
  float largest[4];  // of slot 8 (i / 2) + 2 c + i % 2; infinite where the token is not finite
  float scale, mean, mean_code;  // of slot i = r % 4
};

// One of four, by two bits.
__device__ inline float pick(const float (&x)[4], int which) {
  const float low = which & 1 ? x[1] : x[0], high = which & 1 ? x[3] : x[2];
  return which & 2 ? high : low;
}

// Which tokens a block takes; `exists` unless there are no more.
struct Place {
  bool exists;
  int sequence, head, page;
};
__device__ inline Place place_of(const Arguments& a, int n) {
  const int number = n / HEADS, sequence = number / a.pages;
  return {n < a.count, sequence, n % HEADS, number - sequence * a.pages};
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

// Fits the values of a tile, rotated less their means.
__device__ inline PackedValues pack_values(const float (&x)[kValueBlocks][2][4],
                                           const float (&mean)[4], int lane) {
  const int r = lane / 4;
  const float zero[4] = {};
  const auto line = fit<ValueGroups>(x, zero);
  const auto codes = encode<ValueGroups>(x, line);
  PackedValues out;
#pragma unroll
  for (int set = 0; set < VALUE_SETS; ++set) {
    float words[kValueBlocks / 4][4];
    join_planes<2 * VALUE_SETS>(codes.at, set, lane, words);
#pragma unroll
    for (int i = 0; i < kValueBlocks / 4; ++i) {
      out.words[set][i][0] = pack_integers(words[i][0], words[i][1]);
      out.words[set][i][1] = pack_integers(words[i][2], words[i][3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float largest = larger(line.high[i] + mean[i], -(line.low[i] + mean[i]));
    out.largest[i] = line.squares[i] < infinity() ? largest : infinity();
  }
  out.scale = unbiased_scale(pick(line.squares, r), pick(codes.products, r));
  out.mean = pick(mean, r);
  out.mean_code = pick(codes.sum, r) * (1.0f / VALUE_DIM);
  return out;
}

// Finds the squared norms of a tile's keys and the largest of its values. A token of which one or
// the other is not finite gets an infinite norm, a key of zeros, and a grid of zeros.
__device__ inline void weigh(Shared& shared, PackedValues& values, int tile, int lane) {
  const int r = lane / 4, c = lane % 4;
  float squares[2];
  key_squares(shared.keys, tile, lane, squares);
  float* of_tile = shared.squares + 16 * tile;
  if (c == r / 2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float largest = r % 2 ? values.largest[2 * h + 1] : values.largest[2 * h];
      const bool finite = largest < infinity() && squares[h] < infinity();
      of_tile[8 * h + r] = finite ? squares[h] : infinity();
    }
  }
  sync_warp();
  float peak = 0.0f;
  bool some_infinite = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool finite = of_tile[8 * (i / 2) + 2 * c + i % 2] < infinity();
    peak = larger(peak, finite ? values.largest[i] : 0.0f);
    some_infinite = some_infinite || !finite;
    if (i == r % 4 && !finite) values.scale = values.mean = 0.0f;
  }
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) peak = larger(peak, shuffle_xor(peak, mask));
  if (lane == 0) shared.peaks[tile] = peak;
  if (!any_lane(some_infinite)) return;
  for (int slot = 0; slot < 16; ++slot) {
    if (of_tile[slot] < infinity()) continue;
    u32* row = reinterpret_cast<u32*>(shared.keys + (16 * tile + slot) * pitch(HEAD_DIM));
    for (int i = lane; i < HEAD_DIM / 2; i += 32) row[i] = 0;
  }
}

// The means over channels of rotated values; see `rotate_values`.
__device__ inline void value_means(const u8* rows, int tile, int lane, float (&mean)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = 16 * tile + i / 2 * 8 + lane % 4 * 2 + i % 2;
    mean[i] = to_float(*reinterpret_cast<const u16*>(rows + slot * pitch(VALUE_DIM))) / kSignUnit;
  }
}

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

// The token scale of a slot before it is corrected, and what follows from it.
__device__ inline void scale_token(Shared& shared, int slot, int lane) {
  float count = 0.0f;  // tokens that are not zeros: each is brought to a norm of one
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float squares = shared.squares[4 * lane + i];
    count += squares > 0.0f && squares < infinity() ? 1.0f : 0.0f;
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
  const float mean_square = count > 0.0f ? count * (1.0f / (kPage * HEAD_DIM)) : 1.0f;
  const float all = shared.squares[slot];
  const float squares = all < infinity() ? all : 0.0f;
  const float product = squares > 0.0f ? squares * mean_square : mean_square;
  float scale = product * inverse_root(larger(product, kTiny));
  scale = smaller(larger(scale, kSmallestHalf), kLargestHalf);
  scale = low_f16(pack_f16(scale, scale));
  const float inverse = reciprocal(scale);
  shared.scale[slot] = scale;
  shared.wanted[slot] = squares * inverse * inverse;
  shared.inverse[slot] = kSignUnit * ROTATION_UNIT * inverse;
}

// Fits the keys x of the warp's channels and writes them; leaves <u, u_hat> in `found`.
__device__ inline void pack_keys(u8* page, float* found, float (&x)[kTiles][2][4],
                                 const float* inverse, int warp, int lane) {
  using Groups = KeyGroups;
  constexpr int kGroups = Groups::kGroups, kPairs = kGroups / 2;
  constexpr float kHalfLevels = 0.5f * ((1 << Groups::kBits) - 1);
  const int r = lane / 4, c = lane % 4;
  const int channel = 16 * warp + 2 * r;
  float mean[kGroups] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto factors = load<2>(inverse + 16 * t + 8 * h + 2 * c);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[t][h][e] *= as_float(factors.at[e % 2]);
        mean[Groups::of(h, e)] += x[t][h][e];
      }
    }
  }
  sum_lanes<Groups>(mean);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) mean[i] *= 1.0f / Groups::kCount;
  const auto line = fit<Groups>(x, mean);
  const auto codes = encode<Groups>(x, line);

  // Grids as they will be read; groups k and k + kPairs are those of neighbouring channels.
  float step[kGroups], zero[kGroups];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    float scale[2], middle[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = k + i * kPairs;
      scale[i] =
          unbiased_scale(line.squares[group], codes.products[group] - mean[group] * codes.sum[group]);
    }
    const u32 scales = pack_e4m3(scale[0], scale[1]), steps = low_e4m3(scales);
    step[k] = low_f16(steps), step[k + kPairs] = high_f16(steps);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int group = k + i * kPairs;
      const float mean_code = codes.sum[group] * (1.0f / Groups::kCount);
      middle[i] = mean[group] - step[group] * (mean_code - kHalfLevels);
    }
    const u32 centres = pack_e4m3(middle[0], middle[1]), rounded = low_e4m3(centres);
    zero[k] = low_f16(rounded) - step[k] * kHalfLevels;
    zero[k + kPairs] = high_f16(rounded) - step[k + kPairs] * kHalfLevels;
    if (32 * c % KEY_GROUP == 0 || KEY_GROUP == 16) {
      const int entry = (32 * c / KEY_GROUP + k) * HEAD_DIM + channel;
      *reinterpret_cast<u16*>(page + KEY_SCALE + entry) = static_cast<u16>(scales);
      *reinterpret_cast<u16*>(page + KEY_CENTRE + entry) = static_cast<u16>(centres);
    }
  }
#pragma unroll
  for (int set = 0; set < KEY_SETS; ++set) {
    float words[kTiles / 4][4];
    join_planes<Groups::kBits>(codes.at, set, lane, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = 16 * set + 8 * (i / 2) + 2 * c + i % 2;
      *reinterpret_cast<u32*>(page + KEY_CODES + 2 * (word * HEAD_DIM + channel)) =
          pack_integers(words[i / 2][i % 2], words[i / 2][i % 2 + 2]);
    }
  }

  // Products of pairs of float16, over kUnit so that they fit, and summed by the matrix unit:
  // row 2 t + h of the sum, whose column is the slot, takes what a transpose makes of x[t][h].
  constexpr float kUnit = 16.0f;
  u32 steps[2], zeros[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int one = Groups::of(0, 2 * row), other = Groups::of(0, 2 * row + 1);
    steps[row] = pack_f16(step[one] / kUnit, step[other] / kUnit);
    zeros[row] = pack_f16(zero[one] / kUnit, zero[other] / kUnit);
  }
  float sums[4] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    u32 products[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 first = multiply_add(codes.at[t][h][0], steps[0], zeros[0]);
      const u32 second = multiply_add(codes.at[t][h][1], steps[1], zeros[1]);
      const u32 sum = multiply(codes.numbers[t][h][0], first);
      products[h] = transpose(multiply_add(codes.numbers[t][h][1], second, sum));
    }
    const u32 first = r == 2 * t % 8 ? kOne : 0, second = r == 2 * t % 8 + 1 ? kOne : 0;
    mma_f16(sums, t < 4 ? first : 0, t < 4 ? 0 : first, t < 4 ? second : 0, t < 4 ? 0 : second,
            products[0], products[1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) found[8 * r + 64 * (i / 2) + 2 * c + i % 2] = sums[i] * kUnit;
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
  peak *= kSignUnit * VALUE_ROTATION_UNIT / VALUE_PEAK;
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
  Place next = place_of(a, block());
  fetch<VALUE_DIM>(shared.values, a.values, a.value_strides, next, warp, lane);
  fetch<HEAD_DIM>(shared.keys, a.keys, a.key_strides, next, warp, lane);
  for (int i = thread(); i < PAGE_BYTES / 16; i += 32 * kWarps)  // also what no field covers
    reinterpret_cast<Words<4>*>(shared.page)[i] = {};

  for (int n = block(); n < a.count; n += a.blocks) {
    const int page_id = a.page_ids[n / HEADS];
    next = place_of(a, n + a.blocks);
    PackedValues values[kMine];
    wait_for_copies<1>();
    sync_warp();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int tile = warp + i * kWarps;
      float mean[4], x[kValueBlocks][2][4];
      value_means(shared.values, tile, lane, mean);
      rotate_values(shared.values, tile, lane, x);
      if (i == kMine - 1) {
        sync_warp();
        fetch<VALUE_DIM>(shared.values, a.values, a.value_strides, next, warp, lane);
      }
      values[i] = pack_values(x, mean, lane);
    }
    wait_for_copies<1>();
    sync_warp();
#pragma unroll
    for (int i = 0; i < kMine; ++i) weigh(shared, values[i], warp + i * kWarps, lane);
    sync_block();

    if (thread() < kPage) scale_token(shared, thread(), lane);
    const u32 exponent = unit_exponent(shared.peaks);
    if (thread() == 0) *reinterpret_cast<u32*>(shared.page + VALUE_UNIT) = exponent << 23;
    const float unit = kSignUnit * VALUE_ROTATION_UNIT * as_float((254 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      write_values(shared.page, values[i], unit, warp + i * kWarps, lane);
    float x[kTiles][2][4];
    rotate_keys(shared.keys, warp, lane, x);
    sync_block();

    fetch<HEAD_DIM>(shared.keys, a.keys, a.key_strides, next, warp, lane);
    pack_keys(shared.page, shared.found[warp], x, shared.inverse, warp, lane);
    sync_block();

    u8* page = a.pool + (static_cast<i64>(page_id) * HEADS + n % HEADS) * PAGE_BYTES;
    for (int i = 16 * thread(); i < PAGE_BYTES; i += 16 * 32 * kWarps)
      if (i < TOKEN_SCALE || i >= TOKEN_SCALE + 2 * kPage)
        *reinterpret_cast<Words<4>*>(page + i) = load<4>(shared.page + i);
    if (thread() < kPage)
      reinterpret_cast<u16*>(page + TOKEN_SCALE)[thread()] = corrected_scale(shared, thread());
  }
}
