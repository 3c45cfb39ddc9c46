// One kernel on a CPU: SOURCE, with the definitions that it has on a GPU, and its name, KERNEL.
#include <warp.cuh>

#include SOURCE

// Runs the kernel, one block after the other; the mistake that stopped it, null if none.
extern "C" const char* emulate(const Arguments* arguments, int blocks, int threads,
                               int shared_bytes) {
  emulator::body = [=] { KERNEL(*arguments); };
  for (int i = 0; i < blocks; ++i)
    if (const char* mistake = emulator::run_block(i, threads, shared_bytes)) return mistake;
  return nullptr;
}
