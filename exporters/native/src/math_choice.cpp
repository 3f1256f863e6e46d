// Chooses the instruction set once, when the library is first used.

#include "math.h"

namespace irc {

const InstructionSet& instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet& best = [&]() -> const InstructionSet& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
    return kBaseline;
  }();
  return best;
#else
  return kBaseline;
#endif
}

}  // namespace irc
