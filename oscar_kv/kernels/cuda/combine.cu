// Merges the parts of decode attention, and rotates what pages gave back: a block per output row.
//
// WARPS, VALUE_DIM, BFLOAT, STREAMED and ROTATION_UNIT, here that of values, are constants
// (cuda_decode.py).
#include <rotation.cuh>
#include <states.cuh>

struct Arguments {
  const float* sums;  // [slots, rows, E], in the rotated basis for parts of pages, which come first
  const float* maxima;      // [slots, rows, 2]: maximum of the logits in base 2, normalizer
  const int* ranges;        // [B, H, 2]: first and last slot of pages; used if streamed
  const void* sink_logits;  // [Hq], join the normalizer; or null
  u16* out;                 // [B, Hq, num_queries, E]
  int page_parts;
  int page_slots;
  int dense_parts;
  int rows;         // of a KV head
  int num_queries;  // row (b Hq + h) num_queries + i is query i of head h
  int num_heads;
  int wide_sinks;  // sink_logits are float32, not 16-bit
};

constexpr int kWarps = WARPS;
constexpr int kMine = VALUE_DIM / 32;  // channels of a lane
constexpr int kLoads = 4;              // parts that a warp has on their way

struct Sums {
  float packed[kMine] = {};  // rotated
  float dense[kMine] = {};
  float maximum = kBlind;
  float normalizer = 0.0f;

  __device__ void add(const float (&more_packed)[kMine], const float (&more_dense)[kMine],
                      float more_maximum, float more_normalizer) {
    const float most = larger(maximum, more_maximum);
    const float old = power_of_two(maximum - most), share = power_of_two(more_maximum - most);
    maximum = most;
    normalizer = normalizer * old + more_normalizer * share;
#pragma unroll
    for (int j = 0; j < kMine; ++j) {
      packed[j] = packed[j] * old + more_packed[j] * share;
      dense[j] = dense[j] * old + more_dense[j] * share;
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    combine(const __grid_constant__ Arguments a) {
  const int warp = thread() / 32, lane = thread() % 32;
  const int owner = block() / a.rows, row = block() % a.rows;
  const float* sums = a.sums + kMine * lane;
  wait_for_previous_grid();
  int page_slot = owner * a.page_parts, page_parts = a.page_parts;
  if (STREAMED) {
    page_slot = a.ranges[2 * owner];
    page_parts = a.ranges[2 * owner + 1] + 1 - page_slot;
  }
  const int parts = page_parts + a.dense_parts;
  const int dense_slot = a.page_slots + owner * a.dense_parts - page_parts;

  Sums mine;
  for (int first = warp; first < parts; first += kWarps * kLoads) {
    Words<kMine> found[kLoads];
    Words<2> its[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int part = first + i * kWarps;
      if (part >= parts) continue;
      const int place = (part + (part < page_parts ? page_slot : dense_slot)) * a.rows + row;
      found[i] = load<kMine>(sums + static_cast<i64>(place) * VALUE_DIM);
      its[i] = load<2>(a.maxima + 2 * static_cast<i64>(place));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int part = first + i * kWarps;
      if (part >= parts) continue;
      float packed[kMine], dense[kMine];
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const float value = as_float(found[i].at[j]);
        packed[j] = part < page_parts ? value : 0.0f;
        dense[j] = part < page_parts ? 0.0f : value;
      }
      mine.add(packed, dense, as_float(its[i].at[0]), as_float(its[i].at[1]));
    }
  }

  Sums* found = reinterpret_cast<Sums*>(shared_memory());  // [warps, lanes]
  found[thread()] = mine;
  sync_block();
  if (warp > 0) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    const Sums other = found[32 * w + lane];
    mine.add(other.packed, other.dense, other.maximum, other.normalizer);
  }
  if (a.sink_logits) {
    const int head = block() / a.num_queries % a.num_heads;
    const float logit = a.wide_sinks ? static_cast<const float*>(a.sink_logits)[head]
                                     : to_float(static_cast<const u16*>(a.sink_logits)[head]);
    if (logit > kBlind) mine.add({}, {}, logit * kLog2E, 1.0f);
  }
  hadamard(mine.packed, lane);
  const float unit = mine.normalizer > 0.0f ? 1.0f / mine.normalizer : 0.0f;
  u32* out = reinterpret_cast<u32*>(a.out + static_cast<i64>(block()) * VALUE_DIM + kMine * lane);
#pragma unroll
  for (int j = 0; j < kMine; j += 2)
    out[j / 2] = pack_states((mine.packed[j] * ROTATION_UNIT + mine.dense[j]) * unit,
                             (mine.packed[j + 1] * ROTATION_UNIT + mine.dense[j + 1]) * unit);
}
