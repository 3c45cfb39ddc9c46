// Reading a packed page: `page_logits` from its keys, `add_values` from its values, and before both
// `fetch_page`, by a warp or a team of them. A *run* is up to four planes that are masked from the
// same words, in a *nested* one together with the planes below. What depends on TEAM is kPlanes,
// kRun and kGroups: how much of a page is a warp's.
#pragma once
#include <arguments.cuh>

constexpr int kPlanes = 8 / TEAM;                // of a warp
constexpr int kRun = kPlanes < 4 ? kPlanes : 4;  // planes masked from the same words
constexpr int kGroups = KEY_GROUPS * kPlanes > 8 ? KEY_GROUPS * kPlanes / 8 : 1;  // of a warp
constexpr int kBlocksOfGroup = kBlocks / VALUE_GROUPS;
constexpr int kAtOnce = kBlocksOfGroup % 4 == 0 ? 4 : kBlocksOfGroup % 2 == 0 ? 2 : 1;
constexpr int kUsed = VALUE_UNIT + 16;  // bytes of a page that are read
constexpr int kStage = STAGE_BYTES;     // these, and the token scales of other heads' pages
constexpr u32 kOnes = 0x3c003c00u;

// The float16 pair (4**-n, 4**-n).
__device__ constexpr u32 quarter_pair(int n) { return 0x3c003c00u - 0x08000800u * n; }
constexpr u32 kMinusKeyMiddle = KEY_SETS == 1 ? 0xbe00be00u : 0xc780c780u;  // -1.5, -7.5
constexpr u32 kMinusValueMiddle = VALUE_SETS == 1 ? 0xbe00be00u : 0xc780c780u;
constexpr u32 kFour = 0x44004400u, kMinusOne = 0xbc00bc00u;
__device__ constexpr float power4(int n) { return static_cast<float>(1 << (2 * n)); }
// Weights times 2**6 and value scales, at most 448 after the page's unit is taken out, fit float16.
constexpr int kWeightExponent = 6;

// Planes are taken in runs of up to four from the same words. In a nested run these are single
// bytes with zeros above, so plane p can be masked together with those below it, and the last one
// not at all: an instruction less. What is too much in the sums is taken out afterwards.
__device__ constexpr bool nested(int run) { return TEAM == 2 || (TEAM == 1 && run == 1); }

// The words of a run, its planes lowest.
__device__ inline u32 words_of_run(u32 words, int member, int run) {
  if (TEAM == 1) return run == 0 ? words : odd_bytes(words);
  if (TEAM == 2) return member == 0 ? even_bytes(words) : odd_bytes(words);
  return words >> (2 * kPlanes * member);
}
__device__ inline u32 plane(u32 words, int p, bool with_lower) {
  if (with_lower && p % 4 == 3) return words;
  return words &
         (with_lower ? 0x00010001u * ((4u << (2 * (p % 4))) - 1) : 0x00030003u << (2 * (p % 4)));
}

// Metadata `index` and `index + 1` at `field`, as a pair of float16.
template <int kCount>
__device__ inline void metadata(const u8* field, int index, u32 (&pairs)[kCount]) {
#if FP8
  auto raw = load<kCount / 2>(field + index);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    pairs[i] = i % 2 ? high_e4m3(raw.at[i / 2]) : low_e4m3(raw.at[i / 2]);
#else
  auto raw = load<kCount>(field + 2 * index);
#pragma unroll
  for (int i = 0; i < kCount; ++i) pairs[i] = raw.at[i];
#endif
}

// Logits of a page without the factor of each query, x[p]: of plane p, rows r and r + 8.
//
// Row r is token 4 (r / 2) + r % 2 of a plane and row r + 8 the second after it, so that values,
// whose tokens are the columns of a tile, can be read four at a time. The channels of tile 2 j + u
// are 32 j + 8 c + 4 u + 0 .. 3: a lane reads 8 neighbours. `query`, in shared memory, is where the
// lane's column of it begins: kept in registers it would leave too few for the matrix products.
__device__ inline void page_logits(const u8* page, const u8* scales, const u8* query, int member,
                                   int lane, float (&x)[kPlanes][4]) {
  const int c = lane % 4, word = lane / 8 * 4 + lane / 4 % 2;
  const int first_group = KEY_GROUPS * kPlanes * member / 8;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    u32 folded[kTiles][2];
    float constants[kTiles / 2][4] = {};
    const int entry = (first_group + g) * HEAD_DIM + 8 * c;
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      u32 scale[4], rest[4];
      metadata(page + KEY_SCALE, entry + 32 * j, scale);
      metadata(page + KEY_CENTRE, entry + 32 * j, rest);
      auto q = load<4>(query + 64 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 f = multiply(q.at[i], scale[i]);
        folded[2 * j + i / 2][i % 2] = f;
        rest[i] = multiply_add(f, kMinusKeyMiddle, multiply(q.at[i], rest[i]));
      }
      mma_f16(constants[j], kOnes, kOnes, kOnes, kOnes, rest[0], rest[1]);
      mma_f16(constants[j], kOnes, kOnes, kOnes, kOnes, rest[2], rest[3]);
    }
    float constant[2] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) constant[i % 2] += constants[i / 2][i % 2];
    constexpr int kOfGroup = kPlanes / kGroups;
    constexpr bool kWhole = kOfGroup % 4 == 0;  // otherwise a run has different folded queries
    // A plane starts from the constant term, in the unit that its masked codes have.
#pragma unroll
    for (int p = g * kOfGroup; p < (g + 1) * kOfGroup; ++p) {
      const bool sum = kWhole && nested(p / 4);
      const float unit = (sum ? (power4(p % 4 + 1) - 1.0f) / 3.0f : power4(p % 4)) * 0x1p-24f;
      x[p][0] = x[p][2] = constant[0] * unit;
      x[p][1] = x[p][3] = constant[1] * unit;
    }
#pragma unroll
    for (int s = 0; s < KEY_SETS; ++s) {
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        const u8* codes = page + KEY_CODES + 2 * ((16 * s + word) * HEAD_DIM + 32 * j + 8 * c);
        auto low = load<4>(codes), high = load<4>(codes + 4 * HEAD_DIM);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          u32 b0 = folded[2 * j + u][0], b1 = folded[2 * j + u][1];
          if (s == 1) b0 = multiply(b0, kFour), b1 = multiply(b1, kFour);
          u32 a[4] = {low.at[2 * u], high.at[2 * u], low.at[2 * u + 1], high.at[2 * u + 1]};
#pragma unroll
          for (int run = g * kOfGroup / kRun; run * kRun < (g + 1) * kOfGroup; ++run) {
            u32 w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = words_of_run(a[i], member, run);
            const bool sum = kWhole && nested(run);
#pragma unroll
            for (int p = run * kRun; p < (run + 1) * kRun; ++p) {
              if (p < g * kOfGroup || p >= (g + 1) * kOfGroup) continue;
              mma_f16(x[p], plane(w[0], p, sum), plane(w[1], p, sum), plane(w[2], p, sum),
                      plane(w[3], p, sum), b0, b1);
            }
          }
        }
      }
    }
#pragma unroll
    for (int p = (g + 1) * kOfGroup - 1; p > g * kOfGroup; --p) {
      if (!kWhole || !nested(p / 4) || p % 4 == 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[p][i] -= x[p - 1][i];
    }
  }
  // Token scales of a row: one number for each plane.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    auto pairs = load<kPlanes / 2>(scales + 16 * (word + 2 * half) + 2 * kPlanes * member);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const u32 pair = pairs.at[p / 2];
      const float scale = (p % 2 ? high_f16(pair) : low_f16(pair)) * (0x1p24f / power4(p % 4));
      x[p][2 * half] *= scale;
      x[p][2 * half + 1] *= scale;
    }
  }
}

// Adds the values of a page with weights x; the codes of output are masked in place.
__device__ inline void add_values(const u8* page, const float (&x)[kPlanes][4], int member,
                                  int lane, float (&output)[kBlocks][4],
                                  float (&constant)[VALUE_GROUPS][2]) {
  const int r = lane / 4, c = lane % 4, word = lane / 8 * 4 + r % 2;
  u32 pairs[kPlanes][2];
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    pairs[p][0] = pack_f16(x[p][0], x[p][1]);
    pairs[p][1] = pack_f16(x[p][2], x[p][3]);
  }
#pragma unroll
  for (int g = 0; g < VALUE_GROUPS; ++g) {
    u32 weights[kPlanes][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 grid[kPlanes];  // (scale, centre)
      const int slot = 8 * (word + 2 * half) + kPlanes * member;
      metadata(page + VALUE_GRID, 2 * (g * kPage + slot), grid);
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const float zero =
            low_f16(multiply_add(both_low(grid[p]), kMinusValueMiddle, both_high(grid[p])));
        constant[g][0] += x[p][2 * half] * zero;
        constant[g][1] += x[p][2 * half + 1] * zero;
        const u32 scale = multiply(both_low(grid[p]), quarter_pair(p % 4));
        weights[p][half] = transpose(multiply(pairs[p][half], scale));
      }
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (!nested(p / 4) || p % 4 == 3) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weights[p][half] = multiply_add(weights[p + 1][half], kMinusOne, weights[p][half]);
    }
    // Several blocks at a time: products into one sum would wait for each other.
#pragma unroll
    for (int first = g * kBlocksOfGroup; first < (g + 1) * kBlocksOfGroup; first += kAtOnce) {
      // Tensor cores cut their sums off. Over many pages that would show: codes are not negative,
      // and their large sum cancels with the constant.
      float of_page[kAtOnce][4] = {};
#pragma unroll
      for (int s = 0; s < VALUE_SETS; ++s) {
        u32 a[kAtOnce][4];
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          const int tile = s * kBlocks + first + b;
          const u8* codes = page + VALUE_CODES + 2 * (tile * 256 + r * 16 + 4 * c);
          auto low = load<2>(codes), high = load<2>(codes + 256);
          a[b][0] = low.at[0], a[b][1] = high.at[0], a[b][2] = low.at[1], a[b][3] = high.at[1];
        }
#pragma unroll
        for (int run = 0; run * kRun < kPlanes; ++run) {
          u32 w[kAtOnce][4];
#pragma unroll
          for (int i = 0; i < 4 * kAtOnce; ++i)
            w[i / 4][i % 4] = words_of_run(a[i / 4][i % 4], member, run);
#pragma unroll
          for (int p = run * kRun; p < (run + 1) * kRun; ++p) {
            u32 b0 = weights[p][0], b1 = weights[p][1];
            if (s == 1) b0 = multiply(b0, kFour), b1 = multiply(b1, kFour);
#pragma unroll
            for (int b = 0; b < kAtOnce; ++b)
              mma_f16(of_page[b], plane(w[b][0], p, nested(run)), plane(w[b][1], p, nested(run)),
                      plane(w[b][2], p, nested(run)), plane(w[b][3], p, nested(run)), b0, b1);
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) output[first + b][i] += of_page[b][i];
    }
  }
}

// Bytes kBegin .. kEnd - 1 of a page; stage and page are where the lane begins in them.
template <int kBegin, int kEnd>
__device__ inline void copy_range(u8* stage, const u8* page, int lane) {
  constexpr int kRound = 16 * 32 * TEAM;
#pragma unroll
  for (int i = kBegin; i < kEnd; i += kRound)
    if (i + kRound <= kEnd || 16 * lane < kEnd - i) copy_async(stage + i, page + i);
}

// Copies what is needed of a page, keys and values as a group each; lanes of a team share the work.
__device__ inline void fetch_page(u8* stage, const u8* pool, int page_id, int head, int lane) {
  const u8* first = pool + static_cast<i64>(page_id) * (HEADS * PAGE_BYTES);
  const u8* page = first + head * PAGE_BYTES;
  copy_range<0, VALUE_CODES>(stage + 16 * lane, page + 16 * lane, lane);
#if SHARED_SCALE
  if (lane < 16) {  // eight token scales each, from the pages of all heads
    const int slot = 8 * lane;
    copy_async(stage + kUsed + 2 * slot, first + slot / SCALES_PER_PAGE * PAGE_BYTES + TOKEN_SCALE +
                                             slot % SCALES_PER_PAGE * 2);
  }
#endif
  commit_copies();
  copy_range<VALUE_CODES, kUsed>(stage + 16 * lane, page + 16 * lane, lane);
  commit_copies();
}
