// What the decode kernel is called with, and where a block finds its tokens.
#pragma once
#include <states.cuh>

struct Arguments {
  const u8* pool;
  const int* table;  // [B, table_width] page ids, rows table_stride apart
  const int* page_counts;
  const int* tail_lengths;
  const int* sink_lengths;
  const int* starts;           // or null
  const u16* query;            // [B, H, rows, D], bfloat16 or float16 as keys and values
  const u16* dense_keys[3];    // tail, sinks, new tokens: [B, H, dense_slots, D]
  const u16* dense_values[3];  // [B, H, dense_slots, E]
  float* sums;    // [slots, rows, E], in the rotated basis for parts of pages, which come first
  float* maxima;  // [slots, rows, 2]: maximum of the logits in base 2, normalizer
  int* ranges;    // [B, H, 2], if streamed: the first slot of its pages, and the last one
  i64 table_stride;
  i64 table_width;
  int dense_slots[3];
  int dense_tokens[3];  // in any sequence, at most
  int owners;           // B * H
  int rows;             // query row g * num_queries + i is query i of head g
  int num_queries;
  int page_blocks;  // all but those of dense tokens alone
  int page_parts;   // blocks that share the pages of a sequence and head, if not streamed
  int page_slots;   // of all; then come those of dense tokens
  int dense_parts;
  int dense_apart;  // whether these have blocks of their own
  int has_new;      // the last num_queries tokens are the new ones, also where they are packed
  int window;       // tokens that a query sees, 0 for all
  float scaling;
  float softcap;  // 0 for none
};

constexpr int kWarps = WARPS;
constexpr int kColumns = COLUMNS;
constexpr int kTiles = HEAD_DIM / 16;
constexpr int kBlocks = VALUE_DIM / 16;
constexpr int kPage = 128;  // tokens

// The tokens of one sequence.
struct Tokens {
  int pages, tail, sinks, length, start;
};
__device__ inline Tokens tokens_of(const Arguments& a, int sequence) {
  Tokens its;
  its.pages = a.page_counts[sequence];
  its.tail = a.tail_lengths[sequence];
  its.sinks = a.sink_lengths[sequence];
  its.length = its.sinks + its.pages * kPage + its.tail;
  its.start = a.starts ? a.starts[sequence] : 0;
  return its;
}

// Pages before it lie below the lowest position that any column sees.
__device__ inline int first_page(const Arguments& a, const Tokens& its) {
  const int lowest = a.window > 0 ? its.length - a.num_queries - a.window + 1 : 0;
  const int first = (lowest > its.start ? lowest : its.start) - its.sinks;
  return first > 0 ? first / kPage : 0;
}

// What a column sees: positions low .. high - 1.
struct Seen {
  int low[2], high[2];
};
__device__ inline int own_position(const Arguments& a, int length, int column) {
  return length - a.num_queries + column % a.num_queries;
}
// What the columns of a lane see of the cached tokens.
__device__ inline Seen seen_by(const Arguments& a, const Tokens& its, int lane) {
  Seen seen;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int own = own_position(a, its.length, 2 * (lane % 4) + i);
    const int limit = a.has_new ? its.length - a.num_queries : own + 1;
    seen.low[i] = a.window > 0 && own - a.window + 1 > its.start ? own - a.window + 1 : its.start;
    seen.high[i] = limit < own + 1 ? limit : own + 1;
  }
  return seen;
}
