// Products of rows and packed weights, by the processor's instructions for them (dots.h).
//
// Designed for the few rows of decode steps. Each thread takes the next strips of outputs when it is free, so that a
// delayed thread does not delay the others, and prefetches the weights of its next strips while it computes. Weights
// `[N, K]` are packed into strips of 16 outputs: `[ceil(N / 16), K / G, 16, G]`, where G adjacent elements of K fill 32
// bits. Each result is summed in the order of K and does not depend on other rows.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace matmul {

using at::Tensor;

// Outputs of a strip.
constexpr int64_t STRIP = 16;

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

// Weights [N, K] -> strips.
Tensor packed(const Tensor& weight);

// Float rows `[N, K]` and packed weights of `width` outputs -> `[N, width]`.
Tensor bfloat16(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, int64_t width,
                const Extra* extra = nullptr);

// Float rows `[>= N, K]` in [-1, 1] with multipliers `[N]`, packed weights (of one byte with an offset of 128, or
// dots::Int4Group), and the scales `[M]` of the outputs -> floats `[N, M]`.
Tensor quantized(const Tensor& rows, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                 const Tensor& row_scales, const Extra* extra = nullptr);

}  // namespace matmul
