// Decode attention straight from packed pages: at most 8 query rows of one KV head.
//
// The codes are the 16-row operand of the matrix unit and the query rows its 8 columns:
//
//     logits[16 tokens, 8]    = codes[16 tokens, D]            query * scale [D, 8]
//     output[16 channels, 8] += codes[16 channels, 16 tokens]  weights       [16 tokens, 8]
//
// A code is never converted: masked in place, in the low mantissa bits of a 16-bit word, it is a
// subnormal float16 number, which the matrix unit takes exactly. The key grid is folded into the
// query, token scales into the logits, the value grid into the weights.
//
// A block of kWarps warps takes a part of a sequence's pages. A team of TEAM warps shares a page,
// each member 8 / TEAM of its planes: one warp where pages are many, more where they are few.
// Constants in capitals come from the page layout (cuda_decode.py).
#include <arguments.cuh>
#include <merge.cuh>
#include <page.cuh>
#include <rotation.cuh>
#include <share.cuh>
#include <softmax.cuh>
#include <states.cuh>

constexpr int kDenseTokens = DENSE_TOKENS;                 // of a block, and so of a dense part
constexpr int kDenseTiles = kDenseTokens / (16 * kWarps);  // of 16 tokens, of a warp

__device__ inline void sync_team(int team) {
  if (TEAM == 1)
    sync_warp();
  else
    sync_some(1 + team, 32 * TEAM);
}

// Rotates the query rows into shared memory, float16 [8, D], zeros where there is none; behind them
// float32 [8], what they have to be multiplied by.
__device__ inline void rotate_query(const u16* query, int rows, u8* memory, int warp, int lane) {
  constexpr int kMine = HEAD_DIM / 32;
  for (int row = warp; row < kColumns; row += kWarps) {
    float x[kMine] = {};
    float unit = 1.0f;
    if (row < rows) {
      auto raw = load<kMine / 2>(query + row * HEAD_DIM + kMine * lane);
      float most = 1e-30f;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        x[i] = to_float(static_cast<u16>(raw.at[i / 2] >> (16 * (i % 2))));
        most = larger(most, x[i] < 0.0f ? -x[i] : x[i]);
      }
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) most = larger(most, shuffle_xor(most, mask));
      // A power of two, so that dividing by it is exact.
      unit = as_float(as_bits(most) & 0x7f800000u);
      hadamard(x, lane);
    }
    const float share = ROTATION_UNIT / unit;
#pragma unroll
    for (int i = 0; i < kMine; i += 2) {
      u32* target = reinterpret_cast<u32*>(memory) + (row * HEAD_DIM + kMine * lane + i) / 2;
      *target = pack_f16(x[i] * share, x[i + 1] * share);
    }
    if (lane == 0) reinterpret_cast<float*>(memory + 2 * kColumns * HEAD_DIM)[row] = unit;
  }
}

// Rounds of pages, in each of which every team takes one. `ids`: page ids, where asked for early.
__device__ inline void attend_pages(const Arguments& a, const Share& share, const Tokens& its,
                                    const Seen& seen, int ids, u8* memory, int warp, int lane) {
  const int team = warp / TEAM, member = TEAM == 1 ? 0 : warp % TEAM;
  const int step = share.stride * kTeams;
  const int sequence = share.owner / HEADS, head = share.owner % HEADS;
  const int* table = a.table + sequence * a.table_stride;
  const int first = first_page(a, its);
  const int begin = first + share.round * kTeams + team;
  const i64 beyond = first + static_cast<i64>(share.round_end) * kTeams;
  const int last = beyond < its.pages ? static_cast<int>(beyond) : its.pages;
  const int count = begin < last ? (last - begin + step - 1) / step : 0;
  const bool early = first == 0 && !kStreamed;

  u8* stages = memory + team * 2 * kStage;
  const int team_lane = member * 32 + lane;
  auto fetch = [&](int k) {
    if (k < count) {
      if (k % 32 == 0 && (k > 0 || !early)) {
        const int mine = begin + (k + lane) * step;
        ids = mine < last ? table[mine] : 0;
      }
      fetch_page(stages + k % 2 * kStage, a.pool, shuffle(ids, k % 32), head, team_lane);
    } else {
      commit_copies();
      commit_copies();
    }
  };
  fetch(0);
  fetch(1);

  u8* rotated = memory + kTeams * 2 * kStage;
  const u16* rows = a.query + static_cast<i64>(share.owner) * a.rows * HEAD_DIM;
  rotate_query(rows, a.rows, rotated, warp, lane);
  sync_block();
  const u8* query = rotated + 2 * (lane / 4 * HEAD_DIM + lane % 4 * 8);
  const float* units = reinterpret_cast<const float*>(rotated + 2 * kColumns * HEAD_DIM);
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) factor[i] = units[2 * (lane % 4) + i] * a.scaling * kLog2E;
  // Where every column sees a page whole, positions do not matter.
  const int most_low = seen.low[0] > seen.low[1] ? seen.low[0] : seen.low[1];
  const int least_high = seen.high[0] < seen.high[1] ? seen.high[0] : seen.high[1];

  Softmax state;
  float output[kBlocks][4] = {};
  float constant[VALUE_GROUPS][2] = {};
  for (int k = 0; k < count; ++k) {
    const u8* page = stages + k % 2 * kStage;
    float x[kPlanes][4];
    wait_for_copies<3>();
    sync_team(team);
    page_logits(page, SHARED_SCALE ? page + kUsed : page + TOKEN_SCALE, query, member, lane, x);
    float scale[2] = {factor[0], factor[1]};
    const int position = its.sinks + (begin + k * step) * kPage;
    if (a.softcap > 0.0f || any_lane(position < most_low || position + kPage > least_high)) {
      const int word = lane / 8 * 4 + lane / 4 % 2;
      cap_and_hide(x, scale, a.softcap, seen, position + 16 * kPlanes * member + word, 16, 2);
    }
    wait_for_copies<2>();
    sync_team(team);
    const int bias = static_cast<int>(load<1>(page + VALUE_UNIT).at[0] >> 23) - 127;
    online_softmax(x, scale, bias, kWeightExponent, state, output, constant);
    add_values(page, x, member, lane, output, constant);
    sync_team(team);
    fetch(k + 2);
  }

  constexpr float kUnit = 1.0f / (1 << kWeightExponent);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.normalizer[i] *= kUnit;
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; ++g) {
      float sum = constant[g][i] * kUnit;
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
#pragma unroll
      for (int b = g * kBlocksOfGroup; b < (g + 1) * kBlocksOfGroup; ++b) {
        output[b][i] = output[b][i] * (0x1p24f * kUnit) + sum;
        output[b][i + 2] = output[b][i + 2] * (0x1p24f * kUnit) + sum;
      }
    }
  }
  sync_block();  // the stages become room for merging
  merge(a, share.slot, memory, state, output, lane / 4, 16, 8, warp, lane);
}

// Up to 32 full-precision tokens per warp: the block's share of tail, sinks and new tokens.
__device__ inline void attend_dense(const Arguments& a, i64 owner, const Tokens& its, Seen seen,
                                    int dense_part, u8* memory, int warp, int lane) {
  const int r = lane / 4, c = lane % 4;
  const u16* row = a.query + (owner * a.rows + (r < a.rows ? r : 0)) * HEAD_DIM;
  u32 query[kTiles][2];
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
    auto four = load<4>(row + 32 * j + 8 * c);
#pragma unroll
    for (int i = 0; i < 4; ++i) query[2 * j + i / 2][i % 2] = four.at[i];
  }
  // Which tokens: tail, sinks and new tokens, each in parts of kDenseTokens.
  int source = 0, number = dense_part;
  while (source < 2 && number * kDenseTokens >= a.dense_tokens[source])
    number -= (a.dense_tokens[source++] + kDenseTokens - 1) / kDenseTokens;
  const int count = source == 0 ? its.tail : source == 1 ? its.sinks : a.num_queries;
  const int position = source == 0   ? its.sinks + its.pages * kPage
                       : source == 1 ? 0
                                     : its.length - a.num_queries;
  if (a.has_new && source == 2) {  // these come in place of the cached ones
#pragma unroll
    for (int i = 0; i < 2; ++i) seen.high[i] = own_position(a, its.length, 2 * c + i) + 1;
  }
  const u16* keys = a.dense_keys[source] + owner * a.dense_slots[source] * HEAD_DIM + 8 * c;
  const u16* values = a.dense_values[source] + owner * a.dense_slots[source] * VALUE_DIM + 8 * c;

  Softmax state;
  float output[kBlocks][4] = {};
  float none[VALUE_GROUPS][2] = {};
  const int first = number * kDenseTokens + 16 * kDenseTiles * warp;
  // Where blocks are few, all slots, in use or not: then nothing waits for the lengths first.
  const int end = a.dense_apart ? a.dense_slots[source] : count;
  Words<4> key[kDenseTiles][2][kTiles / 2], value[kDenseTiles][2][kBlocks / 2];
#pragma unroll
  for (int i = 0; i < 2 * kDenseTiles; ++i) {
    const int token = first + r + 8 * i;
    const bool exists = token < end;
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j)
      key[i / 2][i % 2][j] =
          exists ? load<4>(keys + static_cast<i64>(token) * HEAD_DIM + 32 * j) : Words<4>{};
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j)
      value[i / 2][i % 2][j] =
          exists ? load<4>(values + static_cast<i64>(token) * VALUE_DIM + 32 * j) : Words<4>{};
  }
  sync_warp();  // so that the compiler asks for all of them before it waits for some
  if (first < count) {
#pragma unroll
    for (int i = 0; i < 2 * kDenseTiles; ++i) {
      if (first + r + 8 * i < count) continue;
#pragma unroll
      for (int j = 0; j < kBlocks / 2; ++j) value[i / 2][i % 2][j] = {};  // times a weight of 0
    }
    float x[kDenseTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int u = 2 * (j % 2);
#pragma unroll
      for (int t = 0; t < kDenseTiles; ++t)
        mma_states(x[t], key[t][0][j / 2].at[u], key[t][1][j / 2].at[u], key[t][0][j / 2].at[u + 1],
                   key[t][1][j / 2].at[u + 1], query[j][0], query[j][1]);
    }
    float scale[2] = {a.scaling * kLog2E, a.scaling * kLog2E};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      seen.high[i] = seen.high[i] < position + count ? seen.high[i] : position + count;
    cap_and_hide(x, scale, a.softcap, seen, position + first + r, 16, 8);
    online_softmax(x, scale, 0, 0, state, output, none);
#pragma unroll
    for (int t = 0; t < kDenseTiles; ++t) {
      const u32 b0 = transpose(pack_states(x[t][0], x[t][1]));
      const u32 b1 = transpose(pack_states(x[t][2], x[t][3]));
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const int u = 2 * (j % 2);
        mma_states(output[j], transpose(value[t][0][j / 2].at[u]),
                   transpose(value[t][0][j / 2].at[u + 1]), transpose(value[t][1][j / 2].at[u]),
                   transpose(value[t][1][j / 2].at[u + 1]), b0, b1);
      }
    }
  }
  const i64 slot = a.page_slots + owner * a.dense_parts + dense_part;
  merge(a, slot, memory, state, output, r / 2 * 8 + r % 2, 4, 2, warp, lane);
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, BLOCKS_PER_SM)
    decode(const __grid_constant__ Arguments a) {
  let_next_grid_start();
  wait_for_previous_grid();
  u8* memory = shared_memory();
  const int warp = thread() / 32, lane = thread() % 32;
  Share share;
  Stream rest = {};
  int ids = 0;
  if constexpr (kStreamed) {
    rest = find_stream(a, lane);
    if (rest.units == 0) return;
  } else {
    share = own_share(a);
    // Does not wait for the lengths: an id that turns out to lie beyond them is not used.
    const i64 mine =
        share.round * kTeams + warp / TEAM + static_cast<i64>(lane) * share.stride * kTeams;
    const int* table = a.table + share.owner / HEADS * a.table_stride;
    if (share.round_end > 0 && mine < a.table_width) ids = table[mine];
  }
  do {
    const int owner = kStreamed ? rest.owner : share.owner;
    const Tokens its = tokens_of(a, owner / HEADS);
    if constexpr (kStreamed) share = next_share(a, its, rest);
    const Seen seen = seen_by(a, its, lane);
    if (share.round < share.round_end) attend_pages(a, share, its, seen, ids, memory, warp, lane);
    for (int i = share.dense; i < share.dense_end; i += share.stride)
      attend_dense(a, owner, its, seen, i, memory, warp, lane);
  } while (rest.units > 0);
}
