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
  float* sums;                 // [B, H, rows, parts, E], in the rotated basis for parts of pages
  float* maxima;  // [B, H, rows, parts, 2]: maximum of the logits in base 2, normalizer
  i64 table_stride;
  i64 table_width;
  int dense_slots[3];
  int dense_tokens[3];  // in any sequence, at most
  int owners;           // B * H
  int rows;             // query row g * num_queries + i is query i of head g
  int num_queries;
  int page_parts;  // share the pages of a sequence and head; then come the parts of dense tokens
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

__device__ inline int own_position(const Arguments& a, int length, int column) {
  return length - a.num_queries + column % a.num_queries;
}

// What a column sees: positions low .. high - 1.
struct Seen {
  int low[2], high[2];
};

// Where the tokens of one sequence lie, and what a lane's columns see of them.
struct Place {
  int sequence, head, sinks, tail, pages, length;
  Seen seen;
};
