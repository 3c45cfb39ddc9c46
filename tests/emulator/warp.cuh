// The functions of oscar_kv/kernels/cuda/warp.cuh in plain C++: a block of threads on one CPU core.
//
// Every thread is a fiber. A collective instruction leaves its operands where its warp finds them
// and hands over to the next thread; when all have arrived, each computes its own result. A warp
// runs as far ahead of the others as barriers let it, the last one in even blocks and the first one
// in odd blocks. Much of what would hang or race on a GPU fails here: a barrier that not all
// threads reach, shared memory read before the copy that fills it was waited for, overwritten while
// others read it, or beyond what the block has, a previous grid that nobody waits for. What it
// cannot tell: global memory out of bounds, and what is read before that grid was waited for.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

// Neighbouring 32-bit words, loaded at once.
template <int kCount>
struct alignas(kCount % 4 == 0 ? 16 : 4 * kCount) Words {
  u32 at[kCount];
};
template <int kCount>
__device__ inline Words<kCount> load(const void* from);

namespace emulator {

struct Copy {
  void* to;
  const void* from;
};
struct Thread {
  ucontext_t context;
  bool done = false;
  bool waited = false;  // for the previous grid
  int collectives = 0;
  std::vector<std::vector<Copy>> copies;  // groups, the last one open
};
struct Barrier {
  int arrived = 0;
  std::vector<int> waiting;
};

inline std::vector<Thread> threads;
inline std::vector<char> stacks;  // used again by the next block
inline std::vector<int> ready;    // the last one is next
inline ucontext_t scheduler;
inline int current, block_index;
inline std::vector<u8> memory;
inline std::vector<Barrier> barriers;
inline std::function<void()> body;
inline const char* mistake;  // the first one of a block
inline u32 operands[2][1024][8];
constexpr size_t kStack = 256 << 10;
constexpr int kBeyond = 4096;  // bytes that only a mistake writes to

inline void wait_at(int barrier, int count) {
  Barrier& b = barriers[barrier];
  if (++b.arrived == count) {
    for (int t : b.waiting) ready.push_back(t);
    b.waiting.clear();
    b.arrived = 0;
    return;
  }
  b.waiting.push_back(current);
  swapcontext(&threads[current].context, &scheduler);
}

// Leaves `count` words for the warp; returns those of its 32 lanes.
inline u32 (*exchange(const u32* words, int count))[8] {
  Thread& self = threads[current];
  auto* all = operands[self.collectives++ % 2];
  std::memcpy(all[current], words, 4 * count);
  wait_at(16 + current / 32, 32);
  return all + current / 32 * 32;
}

inline void enter() {
  body();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

// The mistake that a block has made, null if none.
inline const char* run_block(int index, int count, int shared_bytes) {
  block_index = index;
  mistake = nullptr;
  memory.assign(shared_bytes + kBeyond, 0xff);  // NaN, whatever the type
  barriers.assign(16 + count / 32, {});
  threads.assign(count, {});
  stacks.resize(count * kStack);
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    thread.copies.resize(1);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks.data() + t * kStack;
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
    ready.push_back(index % 2 ? count - 1 - t : t);
  }
  while (!ready.empty()) {
    current = ready.back();
    ready.pop_back();
    swapcontext(&scheduler, &threads[current].context);
  }
  for (const Thread& thread : threads) {
    if (!thread.done) return "threads wait at a barrier that others never reach";
    if (!thread.waited) return "threads do not wait for the previous grid";
  }
  for (int i = shared_bytes; i < shared_bytes + kBeyond; ++i)
    if (memory[i] != 0xff) return "a block writes beyond its shared memory";
  return mistake;
}

inline float half_to_float(u16 bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline u16 float_to_half(double value) {
  _Float16 x = static_cast<_Float16>(value);
  u16 bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
inline u32 pair(u16 low, u16 high) { return low | static_cast<u32>(high) << 16; }
inline float bf16_to_float(u16 bits) {
  u32 wide = static_cast<u32>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

template <class Convert>
inline void mma(float (&sum)[4], const u32 (&words)[6], Convert to_float) {
  u32(*lanes)[8] = exchange(words, 6);
  const int lane = current % 32, r = lane / 4, c = lane % 4;
  auto half = [&](u32 word, int which) { return to_float(static_cast<u16>(word >> (16 * which))); };
  for (int i = 0; i < 4; ++i) {
    const int row = r + i / 2 * 8, column = 2 * c + i % 2;
    double total = 0;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const u32 a = lanes[row % 8 * 4 + quad][row / 8 + k / 8 * 2];
      const u32 b = lanes[column * 4 + quad][4 + k / 8];
      total += static_cast<double>(half(a, k % 2)) * half(b, k % 2);
    }
    // Cut off towards zero, as tensor cores do.
    const double exact = static_cast<double>(sum[i]) + total;
    sum[i] = static_cast<float>(exact);
    if (std::fabs(static_cast<double>(sum[i])) > std::fabs(exact))
      sum[i] = std::nextafter(sum[i], 0.0f);
  }
}

}  // namespace emulator

template <int kCount>
inline Words<kCount> load(const void* from) {
  if (reinterpret_cast<size_t>(from) % alignof(Words<kCount>))
    emulator::mistake = "words are read from an address that is not aligned";
  Words<kCount> words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

inline int thread() { return emulator::current; }
inline int block() { return emulator::block_index; }
inline u8* shared_memory() { return emulator::memory.data(); }

inline void sync_warp() { emulator::wait_at(16 + emulator::current / 32, 32); }
inline void sync_block() { emulator::wait_at(0, static_cast<int>(emulator::threads.size())); }
inline void sync_some(int barrier, int threads) { emulator::wait_at(barrier, threads); }
inline void wait_for_previous_grid() { emulator::threads[emulator::current].waited = true; }
inline void let_next_grid_start() {}

// Until it is waited for, neither the old contents nor the new ones are there.
inline void copy_async(void* shared, const void* global) {
  std::memset(shared, 0xff, 16);
  emulator::threads[emulator::current].copies.back().push_back({shared, global});
}
inline void commit_copies() { emulator::threads[emulator::current].copies.emplace_back(); }
template <int kPending>
inline void wait_for_copies() {
  auto& groups = emulator::threads[emulator::current].copies;
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline u32 as_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int shuffle(int value, int lane) {
  const u32 bits = static_cast<u32>(value);
  return static_cast<int>(emulator::exchange(&bits, 1)[lane][0]);
}
inline float shuffle_xor(float value, int mask) {
  const u32 bits = as_bits(value);
  const int lane = emulator::current % 32;
  return as_float(emulator::exchange(&bits, 1)[lane ^ mask][0]);
}
inline int count_lanes(bool value) {
  const u32 bits = value;
  u32(*lanes)[8] = emulator::exchange(&bits, 1);
  int count = 0;
  for (int i = 0; i < 32; ++i) count += lanes[i][0];
  return count;
}
inline bool any_lane(bool value) { return count_lanes(value) > 0; }
inline u32 transpose(u32 value) {
  u32(*lanes)[8] = emulator::exchange(&value, 1);
  const int r = emulator::current % 32 / 4, c = emulator::current % 4;
  auto at = [&](int row, int column) {
    return static_cast<u16>(lanes[row * 4 + column / 2][0] >> (16 * (column % 2)));
  };
  return emulator::pair(at(2 * c, r), at(2 * c + 1, r));
}
inline Words<4> load_matrices(const void* row) {
  const auto address = reinterpret_cast<size_t>(row);
  const u32 mine[2] = {static_cast<u32>(address), static_cast<u32>(address >> 32)};
  u32(*lanes)[8] = emulator::exchange(mine, 2);
  const int r = emulator::current % 32 / 4, c = emulator::current % 4;
  Words<4> words;
  for (int m = 0; m < 4; ++m) {
    const u32* of = lanes[8 * m + r];
    const size_t begin = of[0] | static_cast<size_t>(of[1]) << 32;
    if (begin % 16) emulator::mistake = "a row of a matrix is not aligned";
    std::memcpy(&words.at[m], reinterpret_cast<const u8*>(begin) + 4 * c, 4);
  }
  return words;
}
inline void mma_f16(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulator::mma(sum, {a0, a1, a2, a3, b0, b1}, emulator::half_to_float);
}
inline void mma_bf16(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulator::mma(sum, {a0, a1, a2, a3, b0, b1}, emulator::bf16_to_float);
}

inline float low_f16(u32 pair) { return emulator::half_to_float(static_cast<u16>(pair)); }
inline float high_f16(u32 pair) { return emulator::half_to_float(static_cast<u16>(pair >> 16)); }
inline u32 multiply_add(u32 a, u32 b, u32 c) {
  auto one = [](float x, float y, float z) {
    return emulator::float_to_half(static_cast<double>(x) * y + z);
  };
  return emulator::pair(one(low_f16(a), low_f16(b), low_f16(c)),
                        one(high_f16(a), high_f16(b), high_f16(c)));
}
inline u32 multiply(u32 a, u32 b) { return multiply_add(a, b, 0); }
inline u32 multiply_add_share(u32 a, u32 b, u32 c) {
  const u32 sum = multiply_add(a, b, c);
  auto limit = [](float x) {
    return emulator::float_to_half(x > 0.0f ? std::fmin(x, 1.0f) : 0.0f);
  };
  return emulator::pair(limit(low_f16(sum)), limit(high_f16(sum)));
}
inline u32 larger_pair(u32 a, u32 b) {
  return emulator::pair(emulator::float_to_half(std::fmax(low_f16(a), low_f16(b))),
                        emulator::float_to_half(std::fmax(high_f16(a), high_f16(b))));
}
inline u32 smaller_pair(u32 a, u32 b) {
  return emulator::pair(emulator::float_to_half(std::fmin(low_f16(a), low_f16(b))),
                        emulator::float_to_half(std::fmin(high_f16(a), high_f16(b))));
}
inline u32 pack_f16(float low, float high) {
  return emulator::pair(emulator::float_to_half(low), emulator::float_to_half(high));
}
inline u32 pack_bf16(float low, float high) {
  auto round = [](float x) {
    const u32 bits = as_bits(x);
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  };
  return emulator::pair(round(low), round(high));
}
inline u32 pack_e4m3(float low, float high) {
  auto one = [](float x) -> u32 {
    const u32 sign = as_bits(x) >> 24 & 0x80;
    const float size = std::fmin(std::fabs(x), 448.0f);
    if (std::isnan(x)) return 0x7f;
    // Steps of an eighth of the power of two below; subnormals are multiples of 2**-9.
    const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
    const auto steps = static_cast<u32>(std::nearbyint(std::ldexp(size, 3 - exponent)));
    return sign | (steps + (static_cast<u32>(exponent + 6) << 3));
  };
  return one(low) | one(high) << 8;
}
inline u32 both_low(u32 pair) { return (pair & 0xffff) * 0x10001u; }
inline u32 both_high(u32 pair) { return (pair >> 16) * 0x10001u; }
inline u32 even_bytes(u32 x) { return x & 0x00ff00ffu; }
inline u32 odd_bytes(u32 x) { return x >> 8 & 0x00ff00ffu; }
inline u32 low_e4m3(u32 bytes) {
  auto one = [](u32 byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                                : std::ldexp(static_cast<float>(mantissa), -9);
    return emulator::float_to_half(byte & 0x80 ? -size : size);
  };
  return emulator::pair(one(bytes & 0xff), one(bytes >> 8 & 0xff));
}
inline u32 high_e4m3(u32 bytes) { return low_e4m3(bytes >> 16); }
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
