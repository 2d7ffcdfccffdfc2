// Vectors of floats as wide as the processor's registers, and what all operations do with them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "dots.h"

namespace vectors {

using bf16 = c10::BFloat16;

// Vectors wider than the processor's registers would spill to the stack.
using dots::Bits;
using dots::Floats;
using dots::Halves;
using dots::Ints;
using dots::W;
typedef int16_t Shorts __attribute__((vector_size(2 * W)));
typedef int8_t SignedBytes __attribute__((vector_size(W)));

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline Floats load(const bf16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
}
inline Floats load(const int8_t* p) {
#ifdef __AVX512F__
  // GCC 12 has no good vector code for the conversion below.
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  SignedBytes b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Shorts), Ints), Floats);
#endif
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Floats v) {
  // Round to nearest, ties to even; NaN stays NaN.
  Bits u = (Bits)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  Bits kept = v == v ? rounded : (Bits){} + 0x7fc0;
  Halves h = __builtin_convertvector(kept, Halves);
  std::memcpy(p, &h, sizeof h);
}
inline Floats all(float x) { return (Floats){} + x; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats a) { return (Floats)((Bits)a & 0x7fffffffu); }

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
}
inline float largest(Floats v) {
  float most = v[0];
  for (int i = 1; i < W; i++) most = std::max(most, v[i]);
  return most;
}

// Cephes expf (S. Moshier): 2^n times a polynomial of the remainder; relative error 2e-7. The compiler does not
// vectorize the expf of glibc.
inline Floats exponential(Floats x) {
  x = larger(x, all(-87.f));
  x = x < 88.f ? x : all(88.f);
  Floats n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.f) * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// Each lane of the result is the sum of one of W vectors. Each level halves the number of vectors by adding halves.
template <int step, int... I>
inline Floats halves(Floats a, Floats b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, (Ints){(I & step ? W + I - step : I)...}) +
         __builtin_shuffle(a, b, (Ints){(I & step ? W + I : I + step)...});
}
template <int step = W / 2>
inline Floats sums(Floats* v) {
  for (int i = 0; i < step; i++) v[i] = halves<step>(v[i], v[i + step], std::make_integer_sequence<int, W>());
  if constexpr (step > 1) return sums<step / 2>(v);
  else return v[0];
}

// The sum of all lanes, in fewer dependent additions than `sum`.
template <int step = W / 2>
inline float total(Floats v) {
  v = halves<step>(v, v, std::make_integer_sequence<int, W>());
  if constexpr (step > 1) return total<step / 2>(v);
  else return v[0];
}

}  // namespace vectors
