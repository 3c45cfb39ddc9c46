// Which pages and full-precision tokens a block attends to, one sequence and head at a time.
#pragma once
#include <arguments.cuh>

constexpr bool kStreamed = STREAMED;  // a kernel of its own: the other one has to start fast
constexpr int kTeams = kWarps / TEAM;

// Of one sequence and head: rounds of pages, in which every team takes one, and dense parts.
struct Share {
  int owner;                     // sequence * HEADS + head
  int slot;                      // for what comes out of the pages
  int round, round_end;          // every stride-th of these, up to the last page
  int dense, dense_end, stride;  // and of these
};

// Where every sequence and head is divided alike: dense parts come last, as they are shorter.
__device__ inline Share own_share(const Arguments& a) {
  const int over = block() - a.page_blocks;
  Share share;
  if (over >= 0) {
    share = {over / a.dense_parts, 0, 0, 0, over % a.dense_parts, over % a.dense_parts + 1, 1};
  } else {
    const int part = block() % a.page_parts;
    share = {block() / a.page_parts, block(), part, 1 << 28, 0, 0, a.page_parts};
    if (!a.dense_apart) share.dense = a.page_parts - 1 - part, share.dense_end = a.dense_parts;
  }
  return share;
}

// Where blocks share all work evenly: a unit of it is a dense part or a round of pages. The units
// of a sequence and head, dense ones first, follow those of the one before it.
struct Stream {
  int owner, unit;
  int units;  // still to do
};

__device__ inline int rounds_of(const Arguments& a, const Tokens& its) {
  const int pages = its.pages - first_page(a, its);
  return pages > 0 ? (pages + kTeams - 1) / kTeams : 0;
}
// At least one, so that somebody says that there are no pages.
__device__ inline int units_of(const Arguments& a, const Tokens& its) {
  const int units = a.dense_parts + rounds_of(a, its);
  return units > 0 ? units : 1;
}

// The part of a block; all warps find it for themselves, 32 sequences at a time.
__device__ inline Stream find_stream(const Arguments& a, int lane) {
  const int sequences = a.owners / HEADS;
  // Units up to and including a lane's sequence.
  auto sum = [&](int first) {
    const int mine = first + lane;
    int units = mine < sequences ? HEADS * units_of(a, tokens_of(a, mine)) : 0;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = shuffle(units, lane < distance ? lane : lane - distance);
      if (lane >= distance) units += before;
    }
    return units;
  };
  i64 total = 0;
  for (int first = 0; first < sequences; first += 32) total += shuffle(sum(first), 31);
  const i64 blocks = total < a.page_blocks ? total : a.page_blocks;  // that have something to do
  if (block() >= blocks) return {};
  i64 begin = total * block() / blocks;
  const int units = static_cast<int>(total * (block() + 1) / blocks - begin);
  int first = 0, up_to = sum(0);
  while (shuffle(up_to, 31) <= begin) {
    begin -= shuffle(up_to, 31);
    first += 32;
    up_to = sum(first);
  }
  const int lanes_before = count_lanes(up_to <= begin);
  if (lanes_before > 0) begin -= shuffle(up_to, lanes_before - 1);
  const int sequence = first + lanes_before;
  const int of_head = units_of(a, tokens_of(a, sequence));
  const int head = static_cast<int>(begin) / of_head;
  return {sequence * HEADS + head, static_cast<int>(begin) - head * of_head, units};
}

// What the block does next; tells where its slots and those of the same owner's other blocks lie.
__device__ inline Share next_share(const Arguments& a, const Tokens& its, Stream& rest) {
  const int rounds = rounds_of(a, its), all = units_of(a, its) - rest.unit;
  const int taken = rest.units < all ? rest.units : all, end = rest.unit + taken;
  Share share;
  share.owner = rest.owner;
  share.slot = block() + rest.owner;  // grows with both: no other share has it
  share.stride = 1;
  share.dense = rest.unit;
  share.dense_end = end < a.dense_parts ? end : a.dense_parts;
  share.round = rest.unit > a.dense_parts ? rest.unit - a.dense_parts : 0;
  share.round_end = end - a.dense_parts < rounds ? end - a.dense_parts : rounds;
  if (thread() == 0) {
    int* range = a.ranges + 2 * static_cast<i64>(rest.owner);
    if (share.round == 0 && share.round_end > 0) range[0] = share.slot;
    if (share.round_end == rounds && rounds > 0) range[1] = share.slot;
    if (rounds == 0 && rest.unit == 0) range[0] = 0, range[1] = -1;
  }
  rest = {rest.owner + 1, 0, rest.units - taken};
  return share;
}
