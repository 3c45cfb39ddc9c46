// What the kernels ask of a GPU, one small function each: the instructions of a warp on packed
// pairs of 16-bit numbers. Nothing else here knows PTX. tests/emulator has the same functions in
// plain C++, so that the kernels run, and are tested, without a GPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

// Neighbouring 32-bit words, loaded at once.
template <int kCount>
struct alignas(kCount % 4 == 0 ? 16 : 4 * kCount) Words {
  u32 at[kCount];
};
template <int kCount>
__device__ inline Words<kCount> load(const void* from) {
  return *static_cast<const Words<kCount>*>(from);
}

__device__ inline int thread() { return threadIdx.x; }
__device__ inline int block() { return blockIdx.x; }
__device__ inline u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}

__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The grid before this one has finished, and its writes are visible (programmatic launch).
__device__ inline void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory, in the background.
__device__ inline void copy_async(void* shared, const void* global) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_copies() {  // all but the last kPending groups
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers from shared memory, as `transpose` has one: lane 8 m + i
// tells where the 16 bytes of row i of matrix m are.
__device__ inline Words<4> load_matrices(const void* row) {
  Words<4> out;
  u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
               : "r"(address)
               : "memory");
  return out;
}

__device__ inline float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ inline bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }
__device__ inline int count_lanes(bool value) { return __popc(__ballot_sync(0xffffffffu, value)); }

// The transpose of an 8x8 matrix of 16-bit numbers, lane 4 r + c holding (r, 2c) and (r, 2c + 1).
__device__ inline u32 transpose(u32 value) {
  u32 out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
  return out;
}

// sum[16, 8] += a[16, 16] b[16, 8]. Lane 4 r + c holds rows r, r + 8 and columns 2c, 2c + 1 of sum;
// of a: (r, k), (r + 8, k), (r, k + 8), (r + 8, k + 8); of b: (k, r), (k + 8, r); k = 2c, 2c + 1.
__device__ inline void mma_f16(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma_bf16(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Pairs of float16.
__device__ inline u32 multiply(u32 a, u32 b) {
  u32 out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 multiply_add(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
// a b + c within 0 .. 1; 0 instead of NaN.
__device__ inline u32 multiply_add_share(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.sat.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
__device__ inline u32 larger_pair(u32 a, u32 b) {
  u32 out;
  asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 smaller_pair(u32 a, u32 b) {
  u32 out;
  asm("min.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 pack_f16(float low, float high) {
  u32 out;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(out) : "f"(low), "f"(high));
  return out;
}
__device__ inline u32 pack_bf16(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(out) : "f"(low), "f"(high));
  return out;
}
__device__ inline float low_f16(u32 pair) {
  float out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }"
      : "=f"(out)
      : "r"(pair));
  return out;
}
__device__ inline float high_f16(u32 pair) {
  float out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }"
      : "=f"(out)
      : "r"(pair));
  return out;
}
__device__ inline u32 both_low(u32 pair) {
  u32 out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }"
      : "=r"(out)
      : "r"(pair));
  return out;
}
__device__ inline u32 both_high(u32 pair) {
  u32 out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }"
      : "=r"(out)
      : "r"(pair));
  return out;
}

// Bytes 0 and 2, or 1 and 3, each with a zero byte above it.
__device__ inline u32 even_bytes(u32 x) { return __byte_perm(x, 0, 0x4240); }
__device__ inline u32 odd_bytes(u32 x) { return __byte_perm(x, 0, 0x4341); }

// The E4M3 bytes of two numbers, the nearest ones, at most 448.
#if __CUDA_ARCH__ >= 890
__device__ inline u32 pack_e4m3(float low, float high) {
  u16 out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(out) : "f"(low), "f"(high));
  return out;
}
#else
__device__ inline u32 to_e4m3(float x) {
  x = fminf(fmaxf(x, -448.0f), 448.0f);
  // Adding a power of two whose last mantissa bit weighs as much as E4M3's rounds to it.
  const u32 exponent = __float_as_uint(x) >> 23 & 0xff;
  const float magic = 1.5f * __uint_as_float(((exponent > 121 ? exponent : 121) + 20) << 23);
  // Over 2**120 it has its own bits as a float32, subnormal or not.
  const u32 bits = __float_as_uint(((x + magic) - magic) * 0x1p-120f);
  return (bits >> 20 & 0x7f) | (bits >> 24 & 0x80);
}
__device__ inline u32 pack_e4m3(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
#endif

// The float16 pairs of the two low and the two high of four E4M3 bytes.
#if __CUDA_ARCH__ >= 890
__device__ inline u32 low_e4m3(u32 bytes) {
  u32 out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
      : "=r"(out)
      : "r"(bytes));
  return out;
}
__device__ inline u32 high_e4m3(u32 bytes) {
  u32 out;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }"
      : "=r"(out)
      : "r"(bytes));
  return out;
}
#else
// Seven bits moved to the exponent and mantissa of a float16 are that number over 256.
__device__ inline u32 spread_e4m3(u32 apart) {
  return multiply((apart & 0x80008000u) | ((apart >> 1) & 0x3f803f80u), 0x5c005c00u);
}
__device__ inline u32 low_e4m3(u32 bytes) { return spread_e4m3(__byte_perm(bytes, 0, 0x1404)); }
__device__ inline u32 high_e4m3(u32 bytes) { return spread_e4m3(__byte_perm(bytes, 0, 0x3424)); }
#endif

__device__ inline float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ inline u32 as_bits(float value) { return __float_as_uint(value); }
__device__ inline float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ inline float inverse_root(float x) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline float smaller(float a, float b) { return fminf(a, b); }
