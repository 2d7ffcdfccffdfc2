// One line of packed weights times one row: G adjacent elements of K for each of 16 outputs, in 64 bytes.
//
// A kind of weights says how a row is stored (`Row`), what all outputs need of it (`Spread`), how a line is read
// (`weights`), and how their products are added to the sums (`dot`). ROWS x STRIPS sums fill the registers together with
// the weights. The kinds are chosen when this file is compiled, by the instruction sets of the processor:
//
//   weights   AVX512-BF16, -VNNI       AVX512       AVX-VNNI     AVX2         NEON (dotprod)    others
//   bfloat16  dot products of pairs    widened to float32 in registers, by vectors of the compiler
//   int8      dot products of four     two products of 16 bits, exact       dot products of four  integers of 32 bits
//
// The sums of int8 products are exact, so that every processor computes the same.
#pragma once
#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dots {

constexpr int64_t STRIP = 16, LINE = 64;

// Floats in one register, and registers for the outputs of a strip.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int PARTS = STRIP / W;
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));

template <class V>
struct Line {
  V part[PARTS];
};

typedef uint16_t Pairs __attribute__((vector_size(4 * W)));
typedef uint8_t Quads __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

// With memcpy, GCC 12 reads a line in parts of four bytes.
typedef Bits UnalignedBits __attribute__((aligned(1), may_alias));

inline Line<Bits> load_line(const char* from) {
  Line<Bits> line;
  for (int p = 0; p < PARTS; p++) line.part[p] = *(const UnalignedBits*)(from + p * sizeof(Bits));
  return line;
}
inline void store_line(char* to, const Line<Bits>& line) {
  for (int p = 0; p < PARTS; p++) std::memcpy(to + p * sizeof(Bits), &line.part[p], sizeof(Bits));
}

// Intel's processors with AMX take longer for pairs of bfloat16 than for two products of floats.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

// Rows are rounded to bfloat16.
struct Bfloat16 {
  using Row = c10::BFloat16;
  using Sum = Line<Floats>;
  using Weights = __m512i;
  using Spread = __m512i;
  static constexpr int ROWS = 8, STRIPS = 3;

  static Weights weights(const Line<Bits>& line) { return (__m512i)line.part[0]; }
  static Spread spread(const Row* pair) {
    int32_t both;
    std::memcpy(&both, pair, 4);
    return _mm512_set1_epi32(both);
  }
  static void dot(Sum& sum, Spread pair, Weights weights) {
    sum.part[0] = (Floats)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)pair, (__m512bh)weights);
  }
};

#else

// Rows are floats, and the products are exact: the upper half of a float is a bfloat16.
struct Bfloat16 {
  using Row = float;
  using Sum = Line<Floats>;
  struct Weights {
    Line<Floats> first, second;
  };
  struct Spread {
    float first, second;
  };
  static constexpr int ROWS = W == 16 ? 8 : 4, STRIPS = W == 16 ? 3 : 1;

  static Weights weights(const Line<Bits>& line) {
    Weights made;
    for (int p = 0; p < PARTS; p++) {
      made.first.part[p] = (Floats)(line.part[p] << 16);
      made.second.part[p] = (Floats)(line.part[p] & 0xffff0000u);
    }
    return made;
  }
  static Spread spread(const Row* pair) { return {pair[0], pair[1]}; }
  static void dot(Sum& sum, Spread pair, const Weights& weights) {
    for (int p = 0; p < PARTS; p++) sum.part[p] += pair.first * weights.first.part[p];
    for (int p = 0; p < PARTS; p++) sum.part[p] += pair.second * weights.second.part[p];
  }
};

#endif

// Rows of tiles (tiles.h), which are rounded to bfloat16.
struct TiledBfloat16 {
  using Row = c10::BFloat16;
  using Sum = Line<Floats>;
};

// Weights are bytes with an offset of 128, rows are bytes with a sign. OFFSET says whether the sums contain the offset,
// 128 times the sum of the row. `place` stores four adjacent levels of a row.
#if (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || defined(__AVXVNNI__)

struct Int8 {
  using Row = int8_t;
  using Sum = Line<Ints>;
#if defined(__AVX512VNNI__)
  using Weights = __m512i;
  using Spread = __m512i;
  static constexpr int ROWS = 8, STRIPS = 3;
#else
  using Weights = Line<Bits>;
  using Spread = __m256i;
  static constexpr int ROWS = 4, STRIPS = 1;
#endif
  static constexpr bool OFFSET = true;

  static void place(Row* to, const int8_t* four) { std::memcpy(to, four, 4); }
  static Spread spread(const Row* four) {
    int32_t all;
    std::memcpy(&all, four, 4);
#if defined(__AVX512VNNI__)
    return _mm512_set1_epi32(all);
#else
    return _mm256_set1_epi32(all);
#endif
  }
#if defined(__AVX512VNNI__)
  static Weights weights(const Line<Bits>& line) { return (__m512i)line.part[0]; }
  // With the intrinsic, GCC 12 copies each sum before and after the instruction, which doubles the time.
  static void dot(Sum& sum, Spread four, Weights weights) {
    Ints added = sum.part[0];
    asm("vpdpbusd %2, %1, %0" : "+v"(added) : "v"(weights), "v"(four));
    sum.part[0] = added;
  }
#else
  static Weights weights(const Line<Bits>& line) { return line; }
  static void dot(Sum& sum, Spread four, const Weights& weights) {
    for (int p = 0; p < PARTS; p++)
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.part[p]) : "x"(weights.part[p]), "x"(four));
  }
#endif
};

#elif defined(__AVX2__)

// The instruction for bytes adds two products in 16 bits, which overflows. This one multiplies 16 bits by 16 bits.
struct Int8 {
  using Row = int16_t;  // the levels 0, 2, 1, 3 of each four
  using Sum = Line<Ints>;
  struct Weights {
    Line<Bits> even, odd;
  };
  struct Spread {
    int32_t even, odd;
  };
  static constexpr int ROWS = 4, STRIPS = W == 16 ? 3 : 1;
  static constexpr bool OFFSET = true;

  static void place(Row* to, const int8_t* four) {
    to[0] = four[0], to[1] = four[2], to[2] = four[1], to[3] = four[3];
  }
  static Spread spread(const Row* four) {
    Spread spread;
    std::memcpy(&spread, four, 8);
    return spread;
  }
  static Weights weights(const Line<Bits>& line) {
    Weights made;
    for (int p = 0; p < PARTS; p++) {
      made.even.part[p] = line.part[p] & 0x00ff00ffu;
      made.odd.part[p] = line.part[p] >> 8 & 0x00ff00ffu;
    }
    return made;
  }
  static void dot(Sum& sum, Spread four, const Weights& weights) {
    for (int p = 0; p < PARTS; p++)
      sum.part[p] += products(weights.even.part[p], four.even) + products(weights.odd.part[p], four.odd);
  }

 private:
  static Ints products(Bits weights, int32_t pair) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(pair));
#else
    return (Ints)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(pair));
#endif
  }
};

#elif defined(__ARM_FEATURE_DOTPROD)

struct Int8 {
  using Row = int8_t;
  using Sum = Line<Ints>;
  using Weights = Line<Bits>;
  using Spread = int8x16_t;
  static constexpr int ROWS = 4, STRIPS = 1;
  static constexpr bool OFFSET = false;

  static void place(Row* to, const int8_t* four) { std::memcpy(to, four, 4); }
  static Spread spread(const Row* four) {
    int32_t all;
    std::memcpy(&all, four, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(all));
  }
  static Weights weights(Line<Bits> line) {
    for (int p = 0; p < PARTS; p++) line.part[p] ^= 0x80808080u;
    return line;
  }
  static void dot(Sum& sum, Spread four, const Weights& weights) {
    for (int p = 0; p < PARTS; p++)
      sum.part[p] = (Ints)vdotq_s32((int32x4_t)sum.part[p], (int8x16_t)weights.part[p], four);
  }
};

#else

struct Int8 {
  using Row = int8_t;
  using Sum = Line<Ints>;
  struct Weights {
    Line<Ints> byte[4];
  };
  struct Spread {
    int32_t byte[4];
  };
  static constexpr int ROWS = 2, STRIPS = 1;
  static constexpr bool OFFSET = true;

  static void place(Row* to, const int8_t* four) { std::memcpy(to, four, 4); }
  static Spread spread(const Row* four) { return {four[0], four[1], four[2], four[3]}; }
  static Weights weights(const Line<Bits>& line) {
    Weights made;
    for (int b = 0; b < 4; b++)
      for (int p = 0; p < PARTS; p++) made.byte[b].part[p] = (Ints)(line.part[p] >> (8 * b) & 0xffu);
    return made;
  }
  static void dot(Sum& sum, const Spread& four, const Weights& weights) {
    for (int b = 0; b < 4; b++)
      for (int p = 0; p < PARTS; p++) sum.part[p] += four.byte[b] * weights.byte[b].part[p];
  }
};

#endif

// A group of 32 elements of K in 4 bits for the outputs of a strip: a multiplier and an offset for each output, and 4
// lines, each of which has two lines of Int8 in the lower and in the upper halves of its bytes. Int8's weight is level * multiplier / 8,
// rounded down, plus the offset; it is at most 255.
struct Int4Group {
  static constexpr int64_t SIZE = 32, LINES = 4, BYTES = 2 * STRIP + LINES * LINE;

  Line<Pairs> multiplier;
  Line<Quads> offset;

  explicit Int4Group(const char* group) {
    for (int p = 0; p < PARTS; p++) {
      Halves both;
      std::memcpy(&both, group + p * sizeof both, sizeof both);
      const Bits numbers = __builtin_convertvector(both, Bits);
      multiplier.part[p] = (Pairs)((numbers & 0xff) * 0x00010001u);
      offset.part[p] = (Quads)((numbers >> 8) * 0x01010101u);
    }
  }

  // The line of Int8 whose levels are the lower halves of the bytes. Products fill 11 bits, the first of which is dropped
  // by a shift, or by a factor of 32 and a mask.
  Line<Bits> low(Line<Bits> line) const {
    for (int p = 0; p < PARTS; p++) {
      const Pairs pairs = (Pairs)line.part[p];
      line.part[p] = integers(pairs & 0xf, pairs >> 8 & 0xf, p);
    }
    return line;
  }
  Line<Bits> high(Line<Bits> line) const {
    for (int p = 0; p < PARTS; p++) {
      const Pairs pairs = (Pairs)line.part[p];
      line.part[p] = integers(pairs >> 4 & 0xf, pairs >> 12, p);
    }
    return line;
  }

 private:
  Bits integers(Pairs even, Pairs odd, int p) const {
    const Pairs both = (even * multiplier.part[p] >> 3) | (odd * (multiplier.part[p] << 5) & 0xff00);
    return (Bits)((Quads)both + offset.part[p]);
  }
};

}  // namespace dots
