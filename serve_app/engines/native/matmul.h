// Products of rows and packed weights with the processor's dot-product instructions (AVX512-BF16, AVX512-VNNI).
//
// Designed for the few rows of decode steps. Each thread takes the next strips of outputs when it is free, so that a
// delayed thread does not delay the others, and prefetches the weights of its next strips while it computes. Weights
// `[N, K]` are packed into strips of 16 outputs: `[ceil(N / 16), K / G, 16, G]`, where G adjacent elements of K fill 32
// bits, which one instruction multiplies with the same G elements of a row. Each result is summed in the order of K and
// does not depend on other rows.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define SERVE_APP_DOT_PRODUCTS 1
#include <immintrin.h>
#endif

namespace matmul {

using at::Tensor;
constexpr int64_t STRIP = 16;
constexpr bool available =
#ifdef SERVE_APP_DOT_PRODUCTS
    true;
#else
    false;
#endif

// Rows of one task: the rows and the strip's weights fit into the processor's cache together.
constexpr int64_t ROWS = 64;
// Strips of one task: with eight rows their sums fill the registers.
constexpr int64_t STRIPS = 3;
constexpr int64_t LINE = 64;
// Prefetch distance in cache lines: the latency of the memory.
constexpr int64_t AHEAD = 32;

// Rows [row, end) and strips [strip, last) of a result.
struct Block {
  int64_t row, end, strip, last;
};

// Other work on the rows of a product, which starts the threads anyway: `count` tasks `before` that may run at the same
// time, and, when all of them have ended, `after` for each block of the result. `ahead` is called with each block before
// its product is computed, to prefetch what `after` reads.
struct Extra {
  int64_t count = 0;
  virtual void before(int64_t task) const = 0;
  virtual void ahead(const Block& block) const = 0;
  virtual void after(void* y, int64_t width, const Block& block) const = 0;
  virtual ~Extra() = default;
};

#ifdef SERVE_APP_DOT_PRODUCTS

template <class V>
struct Operands {
  using Value = V;
  static constexpr int64_t G = 4 / sizeof(V);

  const V* rows;
  const V* strips;
  int64_t count, width, K;
  float* out;
  const float* bias;

  // Mask of the outputs of a strip that exist: the last strip may have fewer than 16.
  __mmask16 inside(int64_t column) const { return width - column < STRIP ? (1 << (width - column)) - 1 : 0xffff; }
};

struct Bfloat16 : Operands<at::BFloat16> {
  using Sum = __m512;
  static void dot(Sum& sum, __m512i pair, __m512i weights) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)weights);
  }

  void store(Sum sum, int64_t row, int64_t column) const {
    const __mmask16 some = inside(column);
    if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, bias + column));
    _mm512_mask_storeu_ps(out + row * width + column, some, sum);
  }
};

// Weights are bytes with an offset of 128, which adds 128 times the sum of a row to each result; `store` subtracts it.
struct Int8 : Operands<int8_t> {
  using Sum = __m512i;
  // With the intrinsic, GCC 12 copies each sum before and after the instruction, which doubles the time.
  static void dot(Sum& sum, __m512i four, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(four));
  }

  const float* scales;  // of the outputs
  const float* row_scales;
  const int32_t* row_sums;

  void store(Sum sum, int64_t row, int64_t column) const {
    const __mmask16 some = inside(column);
    __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_slli_epi32(_mm512_set1_epi32(row_sums[row]), 7)));
    y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_maskz_loadu_ps(some, scales + column)), _mm512_set1_ps(row_scales[row]));
    if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, bias + column));
    _mm512_mask_storeu_ps(out + row * width + column, some, y);
  }
};

// The strips of the next task, which are prefetched while this task is computed.
struct Next {
  const char* lines;
  int64_t stride;  // bytes from one step to the next
};

// R rows times S strips, with the sums in registers; returns R. The strips of the first tile of a task may still be in
// memory, so that the tile prefetches them AHEAD lines ahead; the later tiles prefetch the strips of the next task.
template <class D, int R, int S, bool FIRST>
int64_t tile(const D& d, int64_t row, int64_t strip, Next next) {
  typename D::Sum sums[R][S] = {};
  const int64_t steps = d.K / D::G;
  const auto* x = d.rows + row * d.K;
  const char* w = (const char*)(d.strips + strip * STRIP * d.K);
  for (int64_t k = 0; k < steps; k++) {
    __m512i weights[S];
    const char* soon = k + AHEAD < steps ? w + AHEAD * LINE : next.lines + (AHEAD - steps) * LINE;
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      weights[s] = _mm512_loadu_si512(w + (s * steps + k) * LINE);
      if (FIRST) _mm_prefetch(soon + (s * steps + k) * LINE, _MM_HINT_T0);
    }
    if (!FIRST) _mm_prefetch(next.lines + k * next.stride, _MM_HINT_T1);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t neighbours;
      std::memcpy(&neighbours, x + r * d.K + k * D::G, 4);
      const __m512i everywhere = _mm512_set1_epi32(neighbours);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) D::dot(sums[r][s], everywhere, weights[s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) d.store(sums[r][s], row + r, (strip + s) * STRIP);
  return R;
}

template <class D, int S, bool FIRST>
int64_t largest_tile(const D& d, int64_t row, int64_t end, int64_t strip, Next next) {
  if (end - row >= 8) return tile<D, 8, S, FIRST>(d, row, strip, next);
  if (end - row >= 4) return tile<D, 4, S, FIRST>(d, row, strip, next);
  if (end - row >= 2) return tile<D, 2, S, FIRST>(d, row, strip, next);
  return tile<D, 1, S, FIRST>(d, row, strip, next);
}

template <class D, int S>
void rows_times(const D& d, int64_t row, int64_t end, int64_t strip, int64_t next_strip) {
  const int64_t later = std::max<int64_t>(1, (end - row - 1) / 8);
  Next next{(const char*)(d.strips + next_strip * STRIP * d.K), LINE * S / later};
  row += largest_tile<D, S, true>(d, row, end, strip, next);
  for (; row < end; next.lines += d.K / D::G * next.stride) row += largest_tile<D, S, false>(d, row, end, strip, next);
}

// Each thread takes the next task, of STRIPS times ROWS, when it is free, one task ahead so that it can prefetch.
template <class D>
void multiply(const D& d, const Extra* extra) {
  const int64_t strips = (d.width + STRIP - 1) / STRIP, groups = (strips + STRIPS - 1) / STRIPS;
  const int64_t tasks = groups * ((d.count + ROWS - 1) / ROWS);
  const int64_t first = extra ? extra->count : 0;
  // On cache lines of their own: the threads read the other variables without waiting for one another.
  alignas(LINE) std::atomic<int64_t> taken{0};
  alignas(LINE) std::atomic<int64_t> ended{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    std::vector<Block> waiting;  // for another thread's task `before`
    for (int64_t number = taken++, later; number < first + tasks; number = later) {
      later = taken++;
      if (number < first) {
        extra->before(number);
        ended++;
        continue;
      }
      const int64_t task = number - first, row = task / groups * ROWS, end = std::min(d.count, row + ROWS);
      const int64_t strip = task % groups * STRIPS, left = strips - strip, next = (later - first) % groups * STRIPS;
      const Block block{row, end, strip, std::min(strips, strip + STRIPS)};
      if (extra) extra->ahead(block);
      if (left >= 3) rows_times<D, 3>(d, row, end, strip, next);
      else if (left == 2) rows_times<D, 2>(d, row, end, strip, next);
      else rows_times<D, 1>(d, row, end, strip, next);
      if (!extra) continue;
      waiting.push_back(block);
      if (ended.load(std::memory_order_acquire) < first) continue;
      for (const Block& each : waiting) extra->after(d.out, d.width, each);
      waiting.clear();
    }
    while (!waiting.empty() && ended.load(std::memory_order_acquire) < first) _mm_pause();
    for (const Block& each : waiting) extra->after(d.out, d.width, each);
  });
}

#endif

inline Tensor packed(const Tensor& weight) {
  const int64_t G = 4 / weight.element_size(), N = weight.size(0), K = weight.size(1);
  TORCH_CHECK(K % G == 0, "rows of ", K, ", not a multiple of ", G);
  const Tensor whole = at::constant_pad_nd(weight, {0, 0, 0, (STRIP - N % STRIP) % STRIP});
  return whole.reshape({-1, STRIP, K / G, G}).permute({0, 2, 1, 3}).contiguous();
}

// Float rows `[N, K]`, which this function rounds to bfloat16, and packed weights of `width` outputs -> `[N, width]`.
inline Tensor bfloat16(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, int64_t width,
                       const Extra* extra = nullptr) {
#ifdef SERVE_APP_DOT_PRODUCTS
  const int64_t K = rows.size(1);
  TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kFloat && (!bias || bias->numel() == width));
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kBFloat16 && weight.size(1) * 2 == K);
  TORCH_CHECK(width <= weight.size(0) * STRIP);
  const Tensor halves = rows.to(at::kBFloat16);
  Tensor out = at::empty({rows.size(0), width}, rows.options());
  multiply(Bfloat16{{halves.const_data_ptr<at::BFloat16>(), weight.const_data_ptr<at::BFloat16>(), rows.size(0), width,
                     K, out.data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr}},
           extra);
  return out;
#else
  TORCH_CHECK(false, "this processor has no bfloat16 dot products");
#endif
}

// Float rows `[>= N, K]` in [-1, 1] with multipliers `[N]`, packed weights of one byte with an offset of 128, and the
// scales `[M]` of the outputs -> floats `[N, M]`.
inline Tensor int8(const Tensor& rows, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                   const Tensor& row_scales, const Extra* extra = nullptr) {
#ifdef SERVE_APP_DOT_PRODUCTS
  const int64_t count = row_scales.numel(), K = rows.size(1), width = scales.numel();
  TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kFloat && rows.size(0) >= count && K % 16 == 0);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kByte && weight.size(1) * 4 == K);
  TORCH_CHECK(width <= weight.size(0) * STRIP && (!bias || bias->numel() == width));
  Tensor bytes = at::empty({count, K}, at::kChar), sums = at::empty({count}, at::kInt);
  Tensor out = at::empty({count, width}, at::kFloat);
  at::parallel_for(0, count, std::max<int64_t>(1, 16384 / K), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* from = rows.const_data_ptr<float>() + row * K;
      int8_t* to = bytes.data_ptr<int8_t>() + row * K;
      __m512i sum = {};
      for (int64_t i = 0; i < K; i += 16) {
        const __m512i level = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(127)));
        _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtsepi32_epi8(level));
        sum = _mm512_add_epi32(sum, level);
      }
      sums.data_ptr<int32_t>()[row] = _mm512_reduce_add_epi32(sum);
    }
  });
  multiply(Int8{{bytes.const_data_ptr<int8_t>(), (const int8_t*)weight.const_data_ptr<uint8_t>(), count, width, K,
                 out.data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr},
                scales.const_data_ptr<float>(), row_scales.const_data_ptr<float>(), sums.const_data_ptr<int32_t>()},
           extra);
  return out;
#else
  TORCH_CHECK(false, "this processor has no int8 dot products");
#endif
}

}  // namespace matmul
