// See matmul.h. A file of its own, so that the compiler works on it beside kernels.cpp.
#include "matmul.h"

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "dots.h"
#include "tiles.h"

namespace matmul {
namespace {

using dots::Bits;
using dots::Floats;
using dots::Line;
using dots::LINE;
using dots::PARTS;
using dots::W;
static_assert(STRIP == dots::STRIP);

// Rows of one task: the rows and the strip's weights fit into the processor's cache together.
constexpr int64_t ROWS = 64;
// Strips of one task, which is a multiple of the strips whose sums are in registers at a time.
constexpr int64_t STRIPS = 3;
// Prefetch distance in cache lines: the latency of the memory.
constexpr int64_t AHEAD = 32;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Rows `[count, K]`, packed weights and the result `[count, width]`.
template <class Kind, int64_t GROUP>
struct Operands {
  using Dot = Kind;
  static constexpr int64_t G = GROUP;

  const typename Kind::Row* rows;
  const char* strips;
  int64_t count, width, K;
  float* out;
  const float* bias;

  int64_t steps() const { return K / G; }
  const char* strip(int64_t number) const { return strips + number * steps() * LINE; }

  // Part `p` of the values of a strip's outputs. The last strip may have fewer than 16 outputs.
  Floats read(const float* values, int64_t column, int p) const {
    Floats part = {};
    if (width - column >= STRIP) std::memcpy(&part, values + column + p * W, sizeof part);
    else
      for (int64_t i = 0; i < std::min<int64_t>(W, width - column - p * W); i++) part[i] = values[column + p * W + i];
    return part;
  }

  void write(Floats part, int64_t row, int64_t column, int p) const {
    if (bias) part += read(bias, column, p);
    float* to = out + row * width + column + p * W;
    if (width - column >= STRIP) std::memcpy(to, &part, sizeof part);
    else
      for (int64_t i = 0; i < std::min<int64_t>(W, width - column - p * W); i++) to[i] = part[i];
  }
};

template <class Kind>
struct Floating : Operands<Kind, 2> {
  void store(Line<Floats> sum, int64_t row, int64_t column) const {
    for (int p = 0; p < PARTS; p++) this->write(sum.part[p], row, column, p);
  }
};

// Tiles add the products in another order than vectors: either compute all rows.
struct Bfloat16 : Floating<dots::Bfloat16> {
  static constexpr int64_t LEAST_TILE_ROWS = ROWS + 1;
};
struct TiledBfloat16 : Floating<dots::TiledBfloat16> {
  static constexpr int64_t LEAST_TILE_ROWS = 1;
};

// The sums are exact, so that a row may be computed either way. Fewer rows take less time by vectors.
struct Int8 : Operands<dots::Int8, 4> {
  static constexpr int64_t LEAST_TILE_ROWS = 24;

  const float* scales;  // of the outputs
  const float* row_scales;
  const int32_t* row_sums;

  void store(Line<dots::Ints> sum, int64_t row, int64_t column) const {
    const int32_t offset = Dot::OFFSET ? row_sums[row] * 128 : 0;
    for (int p = 0; p < PARTS; p++) {
      const Floats exact = __builtin_convertvector(sum.part[p] - offset, Floats);
      write(exact * read(scales, column, p) * row_scales[row], row, column, p);
    }
  }
};

// Int8 weights that are stored in groups of 32 elements of K with 4 bits each (dots::Int4Group): [strips, K / 32, BYTES].
struct Int4 : Int8 {
  using Group = dots::Int4Group;
  // Up to so many rows the weights are unpacked in registers; for more rows, once into memory.
  static constexpr int64_t ROWS_IN_REGISTERS = 2;

  int64_t strip_bytes() const { return K / Group::SIZE * Group::BYTES; }
  const char* packed(int64_t strip) const { return strips + strip * strip_bytes(); }
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
  using Dot = typename D::Dot;
  typename Dot::Sum sums[R][S] = {};
  const int64_t steps = d.steps();
  const auto* x = d.rows + row * d.K;
  const char* w = d.strip(strip);
  for (int64_t k = 0; k < steps; k++) {
    typename Dot::Weights weights[S];
    const char* soon = k + AHEAD < steps ? w + AHEAD * LINE : next.lines + (AHEAD - steps) * LINE;
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      weights[s] = Dot::weights(dots::load_line(w + (s * steps + k) * LINE));
      if (FIRST) __builtin_prefetch(soon + (s * steps + k) * LINE, 0, 3);
    }
    if (!FIRST) __builtin_prefetch(next.lines + k * next.stride, 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const auto everywhere = Dot::spread(x + r * d.K + k * D::G);
#pragma GCC unroll 8
      for (int s = 0; s < S; s++) Dot::dot(sums[r][s], everywhere, weights[s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) d.store(sums[r][s], row + r, (strip + s) * STRIP);
  return R;
}

// The tile of the most rows, R or R divided by a power of two, that are left.
template <class D, int R, int S, bool FIRST>
int64_t largest_tile(const D& d, int64_t row, int64_t end, int64_t strip, Next next) {
  if constexpr (R > 1)
    if (end - row < R) return largest_tile<D, R / 2, S, FIRST>(d, row, end, strip, next);
  return tile<D, R, S, FIRST>(d, row, strip, next);
}

template <class D, int S>
void rows_times(const D& d, int64_t row, int64_t end, int64_t strip, int64_t next_strip) {
  constexpr int R = D::Dot::ROWS;
  const int64_t later = std::max<int64_t>(1, (end - row - 1) / R);
  Next next{d.strip(next_strip), LINE * S / later};
  row += largest_tile<D, R, S, true>(d, row, end, strip, next);
  for (; row < end; next.lines += d.steps() * next.stride) row += largest_tile<D, R, S, false>(d, row, end, strip, next);
}

// Rows of a block by AMX tiles, 16 at a time; returns the first row that is left.
template <class D>
int64_t tile_rows(const D& d, const Block& block, [[maybe_unused]] int64_t next_strip) {
  int64_t row = block.row;
#ifdef SERVE_APP_TILES
  using Sum = std::conditional_t<std::is_same_v<D, Int8>, int32_t, float>;
  const int64_t strips = block.last - block.strip, bytes = d.K * sizeof(*d.rows);
  if (!tiles::usable || bytes % tiles::DEPTH || block.end - row < D::LEAST_TILE_ROWS) return row;
  // The sums of all rows are computed before the first is read: a vector that was just stored by a tile is slow to read.
  Sum sums[ROWS / tiles::ROWS][STRIPS][tiles::ROWS][STRIP];
  const tiles::Configuration configuration;
  const char* next = d.strip(next_strip);
  while (block.end - row >= D::LEAST_TILE_ROWS) {
    const int64_t groups = block.end - row > tiles::ROWS ? 2 : 1;
    const auto product = groups == 2 ? &tiles::strips_product<Sum, 2> : &tiles::strips_product<Sum, 1>;
    product((const char*)(d.rows + row * d.K), bytes, d.strip(block.strip), strips, next, sums + (row - block.row) / tiles::ROWS);
    row = std::min(row + groups * tiles::ROWS, block.end);
  }
  // The product of one group prefetches the weights itself.
  const int64_t lines = row - block.row > tiles::ROWS ? strips * d.steps() / (row - block.row) : 0;
  for (int64_t r = 0; r < row - block.row; r++)
    for (int64_t s = 0; s < strips; s++) {
      for (int64_t i = 0; s == 0 && i < lines; i++) __builtin_prefetch(next + (r * lines + i) * LINE, 0, 2);
      typename D::Dot::Sum sum;
      std::memcpy(&sum.part[0], sums[r / tiles::ROWS][s][r % tiles::ROWS], sizeof sum);
      d.store(sum, block.row + r, (block.strip + s) * STRIP);
    }
#endif
  return row;
}

// The product of a block by vectors, as many strips at a time as the registers hold.
template <class D>
void vector_product(const D& d, const Block& block, int64_t next_strip) {
  constexpr int S = D::Dot::STRIPS;
  int64_t strip = block.strip;
  for (; strip + S <= block.last; strip += S)
    rows_times<D, S>(d, block.row, block.end, strip, strip + 2 * S <= block.last ? strip + S : next_strip);
  if (S == 3 && block.last - strip == 2) rows_times<D, 2>(d, block.row, block.end, strip, next_strip);
  else if (strip < block.last) rows_times<D, 1>(d, block.row, block.end, strip, next_strip);
}

template <class D>
void block_product(const D& d, const Block& block, int64_t next_strip) {
  const int64_t row = tile_rows(d, block, next_strip);
  if constexpr (!std::is_same_v<D, TiledBfloat16>)
    if (row < block.end) vector_product(d, {row, block.end, block.strip, block.last}, next_strip);
}

// R rows times S strips of Int4 weights, which are unpacked in registers. Each result has two sums, so that an addition
// does not wait for the one before it. Prefetches as `tile` with FIRST.
template <int R, int S>
void int4_tile(const Int4& d, int64_t row, int64_t strip, int64_t next_strip) {
  using Group = Int4::Group;
  using Dot = Int4::Dot;
  Line<dots::Ints> sums[R][S][2] = {};
  const int64_t bytes = d.strip_bytes();
  const auto* x = d.rows + row * d.K;
  const char *w = d.packed(strip), *next = d.packed(next_strip) - bytes;
  for (int64_t at = 0; at < bytes; at += Group::BYTES, x += Group::SIZE) {
    const char* soon = (at + AHEAD * LINE < bytes ? w : next) + at + AHEAD * LINE;
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      const char* from = w + s * bytes + at;
      const Group group(from);
      for (int64_t i = 0; i < Group::BYTES; i += LINE) __builtin_prefetch(soon + s * bytes + i, 0, 3);
#pragma GCC unroll 4
      for (int64_t line = 0; line < Group::LINES; line++) {
        const Line<Bits> levels = dots::load_line(from + 2 * STRIP + line * LINE);
        const auto low = Dot::weights(group.low(levels)), high = Dot::weights(group.high(levels));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          Dot::dot(sums[r][s][0], Dot::spread(x + r * d.K + 8 * line), low);
          Dot::dot(sums[r][s][1], Dot::spread(x + r * d.K + 8 * line + 4), high);
        }
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int s = 0; s < S; s++) {
      auto [sum, other] = sums[r][s];
      for (int p = 0; p < PARTS; p++) sum.part[p] += other.part[p];
      d.store(sum, row + r, (strip + s) * STRIP);
    }
}

// A strip of Int4 weights as a strip of Int8 weights.
void unpack(const Int4& d, int64_t strip, char* to) {
  using Group = Int4::Group;
  const char* end = d.packed(strip + 1);
  for (const char* from = d.packed(strip); from < end; from += Group::BYTES) {
    const Group group(from);
    for (int64_t line = 0; line < Group::LINES; line++, to += 2 * LINE) {
      __builtin_prefetch(from + AHEAD * LINE + line * LINE, 0, 3);
      const Line<Bits> levels = dots::load_line(from + 2 * STRIP + line * LINE);
      dots::store_line(to, group.low(levels));
      dots::store_line(to + LINE, group.high(levels));
    }
  }
}

template <int S>
void int4_rows(const Int4& d, const Block& block, int64_t strip, int64_t next_strip) {
  const int64_t next = strip + S < block.last ? strip + S : next_strip;
  if (block.end - block.row == 2) int4_tile<2, S>(d, block.row, strip, next);
  else int4_tile<1, S>(d, block.row, strip, next);
}

void block_product(const Int4& d, const Block& block, int64_t next_strip) {
  if (block.end - block.row <= Int4::ROWS_IN_REGISTERS) {
    int64_t strip = block.strip;
    for (constexpr int S = Int4::Dot::STRIPS; strip + S <= block.last; strip += S) int4_rows<S>(d, block, strip, next_strip);
    for (; strip < block.last; strip++) int4_rows<1>(d, block, strip, next_strip);
    return;
  }
  struct alignas(LINE) CacheLine {
    char bytes[LINE];
  };
  static thread_local std::vector<CacheLine> lines;
  lines.resize(STRIPS * d.steps());
  for (int64_t strip = block.strip; strip < block.last; strip++)
    unpack(d, strip, lines[(strip - block.strip) * d.steps()].bytes);
  Int8 unpacked = d;
  unpacked.strips = lines[0].bytes - block.strip * d.steps() * LINE;
  block_product(unpacked, block, block.strip);  // nothing is left to prefetch
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
      const int64_t task = number - first, row = task / groups * ROWS, strip = task % groups * STRIPS;
      const Block block{row, std::min(d.count, row + ROWS), strip, std::min(strips, strip + STRIPS)};
      if (extra) extra->ahead(block);
      block_product(d, block, (later - first) % groups * STRIPS);
      if (!extra) continue;
      waiting.push_back(block);
      if (ended.load(std::memory_order_acquire) < first) continue;
      for (const Block& each : waiting) extra->after(d.out, d.width, each);
      waiting.clear();
    }
    while (!waiting.empty() && ended.load(std::memory_order_acquire) < first) pause();
    for (const Block& each : waiting) extra->after(d.out, d.width, each);
  });
}

// The rows in another type. Tiles also read the rows after the last one, up to a multiple of 16.
Tensor padded(const Tensor& rows, at::ScalarType type) {
  if (type == rows.scalar_type()) return rows;
  const int64_t count = rows.size(0);
  Tensor copy = at::empty({(count + tiles::ROWS - 1) / tiles::ROWS * tiles::ROWS, rows.size(1)}, rows.options().dtype(type));
  copy.narrow(0, 0, count).copy_(rows);
  return copy;
}

// Rounds K numbers in [-1, 1] to levels up to 127 and returns the sum of the levels.
int32_t quantize(const float* from, dots::Int8::Row* to, int64_t K) {
  int32_t sum = 0;
  if constexpr (std::is_same_v<dots::Int8::Row, int8_t>) {
    for (int64_t i = 0; i < K; i++) {
      const int32_t level = (int32_t)std::nearbyint(from[i] * 127.f);
      to[i] = (dots::Int8::Row)level;
      sum += level;
    }
    return sum;
  }
  for (int64_t i = 0; i < K; i += 4) {
    int8_t four[4];
    for (int j = 0; j < 4; j++) sum += four[j] = (int8_t)std::nearbyint(from[i + j] * 127.f);
    dots::Int8::place(to + i, four);
  }
  return sum;
}

}  // namespace

Tensor packed(const Tensor& weight) {
  const int64_t G = 4 / weight.element_size(), N = weight.size(0), K = weight.size(1);
  TORCH_CHECK(K % G == 0, "rows of ", K, ", not a multiple of ", G);
  const Tensor whole = at::constant_pad_nd(weight, {0, 0, 0, (STRIP - N % STRIP) % STRIP});
  return whole.reshape({-1, STRIP, K / G, G}).permute({0, 2, 1, 3}).contiguous();
}

Tensor bfloat16(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, int64_t width,
                const Extra* extra) {
  const int64_t K = rows.size(1);
  TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kFloat && (!bias || bias->numel() == width));
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kBFloat16 && weight.size(1) * 2 == K);
  TORCH_CHECK(width <= weight.size(0) * STRIP);
  Tensor out = at::empty({rows.size(0), width}, rows.options());
  const auto multiply_as = [&](auto kind) {
    using D = decltype(kind);
    using Row = typename D::Dot::Row;
    const Tensor read = padded(rows, c10::CppTypeToScalarType<Row>::value);
    multiply(D{{{read.const_data_ptr<Row>(), (const char*)weight.const_data_ptr(), rows.size(0), width, K,
                 out.data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr}}},
             extra);
  };
#ifdef SERVE_APP_TILES
  if (tiles::usable && 2 * K % tiles::DEPTH == 0) {
    multiply_as(TiledBfloat16{});
    return out;
  }
#endif
  multiply_as(Bfloat16{});
  return out;
}

Tensor quantized(const Tensor& rows, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                 const Tensor& row_scales, const Extra* extra) {
  using Row = Int8::Dot::Row;
  const int64_t count = row_scales.numel(), K = rows.size(1), width = scales.numel();
  TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == at::kFloat && rows.size(0) >= count && K % 4 == 0);
  const bool int4 = weight.dim() == 3;
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kByte);
  TORCH_CHECK(weight.size(1) * (int4 ? Int4::Group::SIZE : Int8::G) == K && (!int4 || weight.size(2) == Int4::Group::BYTES));
  TORCH_CHECK(width <= weight.size(0) * STRIP && (!bias || bias->numel() == width));
  // Tiles read rows up to a multiple of their number.
  Tensor levels = at::empty({(count + tiles::ROWS - 1) / tiles::ROWS * tiles::ROWS, K}, c10::CppTypeToScalarType<Row>::value);
  Tensor sums = at::empty({count}, at::kInt);
  Tensor out = at::empty({count, width}, at::kFloat);
  at::parallel_for(0, count, std::max<int64_t>(1, 16384 / K), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      sums.data_ptr<int32_t>()[row] = quantize(rows.const_data_ptr<float>() + row * K, levels.data_ptr<Row>() + row * K, K);
  });
  const Int8 operands{{levels.const_data_ptr<Row>(), (const char*)weight.const_data_ptr(), count, width, K,
                       out.data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr},
                      scales.const_data_ptr<float>(), row_scales.const_data_ptr<float>(), sums.const_data_ptr<int32_t>()};
  if (int4) multiply(Int4{operands}, extra);
  else multiply(operands, extra);
  return out;
}

}  // namespace matmul
