// Merges the parts of decode attention, and rotates what pages gave back: a block per output row.
//
// WARPS, VALUE_DIM, BFLOAT and ROTATION_UNIT, here that of values, are constants (cuda_decode.py).
#include <rotation.cuh>
#include <states.cuh>

struct Arguments {
  const float* sums;        // [rows, parts, E], the first page_parts in the rotated basis
  const float* maxima;      // [rows, parts, 2]: maximum of the logits in base 2, normalizer
  const void* sink_logits;  // [Hq], join the normalizer; or null
  u16* out;                 // [rows, E]
  int parts;
  int page_parts;
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
  const i64 row = block();
  const float* sums = a.sums + row * a.parts * VALUE_DIM + kMine * lane;
  const float* maxima = a.maxima + row * a.parts * 2;
  wait_for_previous_grid();

  Sums mine;
  for (int first = warp; first < a.parts; first += kWarps * kLoads) {
    Words<kMine> found[kLoads];
    Words<2> its[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int part = first + i * kWarps;
      if (part >= a.parts) continue;
      found[i] = load<kMine>(sums + static_cast<i64>(part) * VALUE_DIM);
      its[i] = load<2>(maxima + 2 * part);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int part = first + i * kWarps;
      if (part >= a.parts) continue;
      float packed[kMine], dense[kMine];
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const float value = as_float(found[i].at[j]);
        packed[j] = part < a.page_parts ? value : 0.0f;
        dense[j] = part < a.page_parts ? 0.0f : value;
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
    const int head = row / a.num_queries % a.num_heads;
    const float logit = a.wide_sinks ? static_cast<const float*>(a.sink_logits)[head]
                                     : to_float(static_cast<const u16*>(a.sink_logits)[head]);
    if (logit > kBlind) mine.add({}, {}, logit * kLog2E, 1.0f);
  }
  hadamard(mine.packed, lane);
  const float unit = mine.normalizer > 0.0f ? 1.0f / mine.normalizer : 0.0f;
  u32* out = reinterpret_cast<u32*>(a.out + row * VALUE_DIM + kMine * lane);
#pragma unroll
  for (int j = 0; j < kMine; j += 2)
    out[j / 2] = pack_states((mine.packed[j] * ROTATION_UNIT + mine.dense[j]) * unit,
                             (mine.packed[j + 1] * ROTATION_UNIT + mine.dense[j + 1]) * unit);
}
