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
constexpr int kMine = kTiles / kWarps;  // tiles of a warp
constexpr float kLargestHalf = 65504.0f, kSmallestHalf = 0x1p-24f;
__device__ inline bool finite(float x) { return x < as_float(0x7f800000u); }  // of x >= 0 or NaN

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

// Products as pairs of float16, times a factor for each slot.
template <int kBlocks>
__device__ inline void narrow(const float (&x)[kBlocks][2][4], const float (&factor)[4],
                              Pairs (&out)[kBlocks]) {
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) {
    const int h = i / 2 % 2, row = i % 2;
    const float(&from)[4] = x[i / 4][h];
    out[i / 4][h][row] =
        pack_f16(from[2 * row] * factor[2 * h], from[2 * row + 1] * factor[2 * h + 1]);
  }
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
    const float inverse = reciprocal(scale);
    factor[i] = ROTATION_UNIT * inverse;
    if (r == 0) shared.scale[slot] = scale, shared.wanted[slot] = squares * inverse * inverse;
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

// Fits 16 channels of all keys, [channel, slot], and writes them; leaves <u, u_hat> in `found`.
__device__ inline void pack_keys(u8* page, const u8* keys, float* found, int first_channel,
                                 int lane) {
  using Groups = KeyGroups;
  constexpr int kGroups = Groups::kGroups, kColumns = kGroups / 2;
  constexpr float kHalfLevels = 0.5f * ((1 << Groups::kBits) - 1);
  const int r = lane / 4, c = lane % 4;
  const u32 identity = identity_operand(lane);
  // As `a_row`, but channel 2 r in row r and 2 r + 1 in row r + 8.
  const u8* rows = keys + (first_channel + lane % 8 * 2 + lane / 8 % 2) * pitch(kPage) + lane / 16 * 16;
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
#pragma unroll
  for (int set = 0; set < KEY_SETS; ++set) {
    float words[kTiles / 4][4];
    join_planes<Groups::kBits>(codes, set, lane, words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = 16 * set + 8 * (i / 2) + 2 * c + i % 2;
      *reinterpret_cast<u32*>(page + KEY_CODES + 2 * (word * HEAD_DIM + first_channel + 2 * r)) =
          pack_integers(words[i / 2][i % 2], words[i / 2][i % 2 + 2]);
    }
  }

  // Products over kUnit, so that they fit float16, summed over channels by the matrix unit: row
  // 2 t + h of the sum, whose column is the slot, takes what a transpose makes of those of x[t][h].
  constexpr float kUnit = 16.0f;
  u32 steps[2], zeros[2];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) step[i] *= 1.0f / kUnit, zero[i] *= 1.0f / kUnit;
  pack_groups<Groups>(step, steps);
  pack_groups<Groups>(zero, zeros);
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
  Place next = place_of(a, block());
  fetch<VALUE_DIM>(shared.values, a.values, a.value_strides, next, warp, lane);
  fetch<HEAD_DIM>(shared.keys, a.keys, a.key_strides, next, warp, lane);
  for (int i = thread(); i < PAGE_BYTES / 16; i += 32 * kWarps)  // also what no field covers
    reinterpret_cast<Words<4>*>(shared.page)[i] = {};

  for (int n = block(); n < a.count; n += a.blocks) {
    const int page_id = a.page_ids[n / HEADS];
    next = place_of(a, n + a.blocks);
    PackedValues values[kMine];
    float keys[kMine][kKeyBlocks][2][4];
    wait_for_copies<1>();
    sync_warp();
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      values[i] = pack_values(
          shared.values + 16 * (warp + i * kWarps) * pitch(VALUE_DIM), lane);
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
