// Rows times packed weights with the processor's dot-product instructions (AVX512-BF16, AVX512-VNNI).
//
// oneDNN's kernels are made for many rows and deal the work out to threads beforehand: with one to 32 rows they take up
// to twice the time, and one thread that is held up holds up all. Here threads take strips of outputs as they get free.
// Weights `[N, K]` lie in strips of 16 outputs: `[N / 16, K / G, 16, G]`, where G neighbours in K make 32 bits, which an
// instruction multiplies with the same G of a row. A result is a sum in the order of K, whoever its neighbours are.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cstring>
#include <optional>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define SERVE_APP_DOTS 1
#include <immintrin.h>
#endif

namespace matmul {

using at::Tensor;
constexpr int64_t STRIP = 16;
constexpr bool available =
#ifdef SERVE_APP_DOTS
    true;
#else
    false;
#endif

// Rows that share a look at a strip's weights, so that both stay in the cache.
constexpr int64_t ROWS = 64;
// Tasks for each thread: enough that those who are late do not matter.
constexpr int64_t TASKS = 16;
// How many loads before its use a strip's weights are asked for: memory takes that long to answer.
constexpr int64_t AHEAD = 32;

#ifdef SERVE_APP_DOTS

struct Bfloat16 {
  using Value = at::BFloat16;
  using Sum = __m512;
  static constexpr int64_t G = 2, STRIPS = 3;
  static Sum dot(Sum sum, int32_t pair, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
  }

  at::BFloat16* out;
  const at::BFloat16* bias;

  void store(Sum sum, int64_t row, int64_t column, int64_t width) const {
    if (bias) {
      const __m256i half = _mm256_loadu_si256((const __m256i*)(bias + column));
      sum = _mm512_add_ps(sum, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    _mm256_storeu_si256((__m256i*)(out + row * width + column), (__m256i)_mm512_cvtneps_pbh(sum));
  }
};

// Weights are bytes, 128 above their value, which adds 128 times the sum of a row to each of its results.
struct Int8 {
  using Value = int8_t;
  using Sum = __m512i;
  static constexpr int64_t G = 4, STRIPS = 2;
  static Sum dot(Sum sum, int32_t four, __m512i weights) {
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(four));
  }

  float* out;
  const float* bias;
  const float* scales;  // of the outputs
  const float* row_scales;
  const int32_t* row_sums;

  void store(Sum sum, int64_t row, int64_t column, int64_t width) const {
    __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_slli_epi32(_mm512_set1_epi32(row_sums[row]), 7)));
    y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_loadu_ps(scales + column)), _mm512_set1_ps(row_scales[row]));
    if (bias) y = _mm512_add_ps(y, _mm512_loadu_ps(bias + column));
    _mm512_storeu_ps(out + row * width + column, y);
  }
};

// R rows times S strips: their sums stay in registers.
template <class D, int R, int S>
inline void tile(const D& d, const typename D::Value* rows, const typename D::Value* strips, int64_t row, int64_t strip,
                 int64_t width, int64_t K) {
  typename D::Sum sums[R][S] = {};
  const int64_t steps = K / D::G;
  const typename D::Value* x = rows + row * K;
  const typename D::Value* w = strips + strip * STRIP * K;
  for (int64_t k = 0; k < steps; k++) {
    __m512i weights[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      weights[s] = _mm512_loadu_si512(w + (s * steps + k) * STRIP * D::G);
      _mm_prefetch(w + (s * steps + k + AHEAD) * STRIP * D::G, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t neighbours;
      std::memcpy(&neighbours, x + r * K + k * D::G, 4);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) sums[r][s] = D::dot(sums[r][s], neighbours, weights[s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) d.store(sums[r][s], row + r, (strip + s) * STRIP, width);
}

template <class D, int S>
void rows_times(const D& d, const typename D::Value* rows, const typename D::Value* strips, int64_t row, int64_t end,
                int64_t strip, int64_t width, int64_t K) {
  for (; end - row >= 8; row += 8) tile<D, 8, S>(d, rows, strips, row, strip, width, K);
  if (end - row >= 4) tile<D, 4, S>(d, rows, strips, row, strip, width, K), row += 4;
  if (end - row >= 2) tile<D, 2, S>(d, rows, strips, row, strip, width, K), row += 2;
  if (end - row >= 1) tile<D, 1, S>(d, rows, strips, row, strip, width, K);
}

// D::STRIPS at a time, with eight rows, fill the registers as far as the compiler manages.
template <class D>
void multiply(const D& d, const typename D::Value* rows, const typename D::Value* strips, int64_t count, int64_t width,
              int64_t K) {
  const int64_t threads = at::get_num_threads(), groups = (width / STRIP + D::STRIPS - 1) / D::STRIPS;
  const int64_t tasks = groups * ((count + ROWS - 1) / ROWS), share = std::max<int64_t>(1, tasks / (threads * TASKS));
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = taken.fetch_add(share)) < tasks;)
      for (int64_t task = first; task < std::min(tasks, first + share); task++) {
        const int64_t row = task / groups * ROWS, end = std::min(count, row + ROWS), strip = task % groups * D::STRIPS;
        const int64_t left = width / STRIP - strip;
        if (left >= D::STRIPS) rows_times<D, D::STRIPS>(d, rows, strips, row, end, strip, width, K);
        else if (left == 2) rows_times<D, 2>(d, rows, strips, row, end, strip, width, K);
        else rows_times<D, 1>(d, rows, strips, row, end, strip, width, K);
      }
  });
}

#endif

inline Tensor packed(const Tensor& weight) {
  const int64_t G = 4 / weight.element_size(), N = weight.size(0), K = weight.size(1);
  TORCH_CHECK(N % STRIP == 0 && K % G == 0, "weights of ", N, " times ", K);
  return weight.reshape({N / STRIP, STRIP, K / G, G}).permute({0, 2, 1, 3}).contiguous();
}

// bfloat16 rows `[N, K]` and packed weights -> `[N, M]`.
inline Tensor bfloat16(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
#ifdef SERVE_APP_DOTS
  const int64_t K = rows.size(1), width = weight.size(0) * STRIP;
  TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16);
  TORCH_CHECK(weight.is_contiguous() && weight.size(1) * 2 == K && (!bias || bias->numel() == width));
  Tensor out = at::empty({rows.size(0), width}, rows.options());
  const Bfloat16 dots{out.data_ptr<at::BFloat16>(), bias ? bias->const_data_ptr<at::BFloat16>() : nullptr};
  multiply(dots, rows.const_data_ptr<at::BFloat16>(), weight.const_data_ptr<at::BFloat16>(), rows.size(0), width, K);
  return out;
#else
  TORCH_CHECK(false, "this processor has no bfloat16 products");
#endif
}

// Rows `[>= N, K]` of floats in [-1, 1] and what each is to be multiplied with `[N]`, packed weights of one byte, 128
// above their value, and their outputs' scales `[M]` -> floats `[N, M]`.
inline Tensor int8(const Tensor& rows, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                   const Tensor& row_scales) {
#ifdef SERVE_APP_DOTS
  const int64_t count = row_scales.numel(), K = rows.size(1), width = weight.size(0) * STRIP;
  TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kFloat && rows.size(0) >= count && K % 16 == 0);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kByte && weight.size(1) * 4 == K);
  TORCH_CHECK(scales.numel() == width && (!bias || bias->numel() == width));
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
  const Int8 dots{out.data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
                  scales.const_data_ptr<float>(), row_scales.const_data_ptr<float>(), sums.const_data_ptr<int32_t>()};
  multiply(dots, bytes.const_data_ptr<int8_t>(), (const int8_t*)weight.const_data_ptr<uint8_t>(), count, width, K);
  return out;
#else
  TORCH_CHECK(false, "this processor has no products of bytes");
#endif
}

}  // namespace matmul
