// Sixteen-bit numbers in memory, and their conversion to float32 and back (round to nearest, ties to even).
// Everything is static: translation units of different instruction sets must not share a definition.
#pragma once

#include <cstdint>
#include <cstring>

// CUDA kernels call these functions too.
#ifdef __CUDACC__
#define IRC_BOTH __host__ __device__
#else
#define IRC_BOTH
#endif

namespace irc {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

IRC_BOTH static inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

IRC_BOTH static inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Whether a token executes: by a byte of a mask, true unless zero, or by a logit difference, where NaN executes.
IRC_BOTH static inline bool executes(uint8_t mask) { return mask != 0; }
IRC_BOTH static inline bool executes(float difference) { return !(difference < 0); }

IRC_BOTH static inline float load(float value) { return value; }

IRC_BOTH static inline float load(BFloat value) { return as_float(uint32_t(value.bits) << 16); }

IRC_BOTH static inline float load(Half value) {
#ifdef __CUDA_ARCH__
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(value.bits));
  return number;
#else
  // A multiplication corrects the exponent's bias, which gives the right result for subnormal numbers as well.
  const float scaled = as_float(uint32_t(value.bits & 0x7fff) << 13) * as_float(0x77800000);
  const uint32_t magnitude = as_bits(scaled) | (scaled >= 65536.0f ? 0x7f800000u : 0u);
  return as_float(magnitude | uint32_t(value.bits & 0x8000) << 16);
#endif
}

IRC_BOTH static inline void store(float value, float* to) { *to = value; }

IRC_BOTH static inline void store(float value, BFloat* to) {
  const uint32_t bits = as_bits(value);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = is_nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

IRC_BOTH static inline void store(float value, Half* to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
#else
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    to->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    to->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: an addition rounds at the right bit
    to->bits = uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  } else {
    to->bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
#endif
}

}  // namespace irc
