// Attention by vectors of floats: of one row, or of tiles of queries that attend to almost the same keys and values. Both
// add the same numbers in the same order.
#pragma once
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace attention {

using namespace vectors;

// The positions [low, end) to which a row attends.
struct Range {
  int64_t low, end;

  Range from(int64_t base) const { return {low - base, end - base}; }
};

inline int64_t rounded_down(int64_t x, int64_t to) { return x / to * to; }
inline int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory of a thread. It is kept, because new memory costs as much as the work on it.
struct Scratch {
  std::vector<float> keys, values, queries, scores, results;
  std::vector<Range> ranges;

  static Scratch& of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// At least `count` numbers, without a value.
inline float* room(std::vector<float>& memory, int64_t count) {
  if ((int64_t)memory.size() < count) memory = std::vector<float>(2 * count);
  return memory.data();
}

// A score s becomes cap * tanh(s / cap) if there is a cap.
inline Floats capped(Floats score, float cap) {
  return cap == 0 ? score : cap - 2 * cap / (exponential(score * (2 / cap)) + 1.f);
}

// Turns the scores [skip, count) of a query into exponentials relative to the largest one, and returns the inverse of
// their sum. The scores from 0 up to `count` rounded up to W are overwritten.
inline float exponentials(float* scores, int64_t skip, int64_t count) {
  const int64_t padded = rounded_up(count, W);
  for (int64_t t = 0; t < skip; t++) scores[t] = -INFINITY;
  for (int64_t t = count; t < padded; t++) scores[t] = -INFINITY;
  Floats most = load(scores), total = {};
  for (int64_t t = W; t < padded; t += W) most = larger(most, load(scores + t));
  const Floats top = all(largest(most));
  for (int64_t t = 0; t < padded; t += W) {
    const Floats e = exponential(load(scores + t) - top);
    store(scores + t, e);
    total += e;
  }
  return 1.f / sum(total);
}

// Attention of G query heads that share one key-value head, over the positions [skip, count), skip < W. `scores` is
// scratch memory of G rows of `count` rounded up to W; keys are read from 0 up to that length. `ahead` is the address
// where the next call reads keys, if known: it is prefetched, because a read from memory takes as long as a call.
template <int G, int dim, class Kept>
void attend_heads(const float* query, const Kept* keys, const Kept* values, int64_t skip, int64_t count, float scale, float cap,
                  float* scores, float* out, const Kept* ahead) {
  constexpr int parts = dim / W;
  const int64_t padded = rounded_up(count, W);
  Floats q[G][parts], result[G][parts] = {};
  for (int g = 0; g < G; g++)
    for (int c = 0; c < parts; c++) q[g][c] = load(query + g * dim + c * W) * scale;
  for (int64_t t = 0; t < padded; t += W) {
    Floats dots[G][W] = {};
    for (int u = 0; u < W; u++) {
      for (int c = 0; c < parts; c++) {
        Floats k = load(keys + (t + u) * dim + c * W);
        for (int g = 0; g < G; g++) dots[g][u] += q[g][c] * k;
      }
      for (int c = 0; c < dim; c += 64 / (int)sizeof(Kept)) __builtin_prefetch(values + (t + u) * dim + c);
    }
    for (int g = 0; g < G; g++) {
      store(scores + g * padded + t, capped(sums(dots[g]), cap));
    }
  }
  float weight[G];
  for (int g = 0; g < G; g++) weight[g] = exponentials(scores + g * padded, skip, count);
  for (int64_t t = skip; t < count; t++) {
    for (int c = 0; c < parts; c++) {
      Floats v = load(values + t * dim + c * W);
      for (int g = 0; g < G; g++) result[g][c] += v * scores[g * padded + t];
    }
    for (int c = 0; ahead && c < dim; c += 64 / (int)sizeof(Kept)) __builtin_prefetch(ahead + t * dim + c);
  }
  for (int g = 0; g < G; g++)
    for (int c = 0; c < parts; c++) store(out + g * dim + c * W, result[g][c] * weight[g]);
}

// Queries of one tile: their sums and a vector of keys or values fill the registers.
constexpr int TILE = 4;
// Positions whose keys or values are in the first cache while all queries read them.
constexpr int64_t PART = 64;

// Swaps the two indices of W vectors.
template <int step, int... I>
inline void swap_halves(Floats& a, Floats& b, std::integer_sequence<int, I...>) {
  const Floats low = __builtin_shuffle(a, b, (Ints){(I & step ? W + I - step : I)...});
  b = __builtin_shuffle(a, b, (Ints){(I & step ? W + I : I + step)...});
  a = low;
}
template <int step = W / 2>
inline void transpose(Floats* v) {
  for (int i = 0; i < W; i++)
    if (!(i & step)) swap_halves<step>(v[i], v[i + step], std::make_integer_sequence<int, W>());
  if constexpr (step > 1) transpose<step / 2>(v);
}

// The scores of R queries [R, D] for W keys [D, W], the part of them that belongs to the numbers lane, lane + step, ... of
// each W numbers. Their order is that of the lanes in attend_heads, and of `sums`.
template <int R, int D, int step, int lane>
inline void partial_scores(const float* queries, const float* keys, Floats (&scores)[R]) {
  if constexpr (step == W) {
    for (int r = 0; r < R; r++) scores[r] = Floats{};
    for (int i = lane; i < D; i += W) {
      const Floats k = load(keys + i * W);
      for (int r = 0; r < R; r++) scores[r] += queries[r * D + i] * k;
    }
  } else {
    Floats others[R];
    partial_scores<R, D, 2 * step, lane>(queries, keys, scores);
    partial_scores<R, D, 2 * step, lane + step>(queries, keys, others);
    for (int r = 0; r < R; r++) scores[r] += others[r];
  }
}

// Adds the values [from, to) with the weights [R, stride] to the results [R, D].
template <int R, int D>
void add_values(const float* values, int64_t from, int64_t to, const float* weights, int64_t stride, float* results) {
  constexpr int parts = D / W, C = parts % 4 ? 3 : 4;
  static_assert(parts % C == 0);
  for (int first = 0; from < to && first < D; first += C * W) {
    Floats sums[R][C];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) sums[r][c] = load(results + r * D + first + c * W);
    for (int64_t t = from; t < to; t++)
      for (int c = 0; c < C; c++) {
        const Floats v = load(values + t * D + first + c * W);
        for (int r = 0; r < R; r++) sums[r][c] += v * weights[r * stride + t];
      }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) store(results + r * D + first + c * W, sums[r][c]);
  }
}

// Keys [length, D] as floats [length / W, D, W].
template <int D, class Kept>
void transpose_keys(const Kept* keys, int64_t length, float* out) {
  for (int64_t t = 0; t < length; t += W)
    for (int i = 0; i < D; i += W) {
      Floats v[W];
      for (int u = 0; u < W; u++) v[u] = load(keys + (t + u) * D + i);
      transpose(v);
      for (int u = 0; u < W; u++) store(out + t * D + (i + u) * W, v[u]);
    }
}

// Values [length, D] as floats.
template <int D, class Kept>
const float* widened(const Kept* values, int64_t length, std::vector<float>& memory) {
  if constexpr (std::is_same_v<Kept, float>) return values;
  else {
    float* out = room(memory, length * D);
    for (int64_t i = 0; i < length * D; i += W) store(out + i, load(values + i));
    return out;
  }
}

// Attention of up to QUERIES queries at a time to the keys and values [length, D] of one head. Ranges ascend.
template <int D, class Kept>
class ByVectors {
 public:
  using Query = float;
  static constexpr int64_t QUERIES = 48, FROM = W, TO = W;

  ByVectors(const Kept* keys, const Kept* values, int64_t length, float cap, Scratch& scratch)
      : keys(room(scratch.keys, length * D)), values(widened<D>(values, length, scratch.values)), length(length), cap(cap),
        scores(room(scratch.scores, QUERIES * length)) {
    transpose_keys<D>(keys, length, this->keys);
  }

  // Queries [count, D] -> results [count, D].
  void attend(const float* queries, const Range* ranges, int64_t count, float* results) const {
    for (int64_t part = 0; part < length; part += PART)
      in_tiles(count, [&](auto size, int64_t q) { score<size>(queries + q * D, ranges + q, part, scores + q * length); });
    float factors[QUERIES];
    for (int64_t q = 0; q < count; q++) {
      const int64_t begin = rounded_down(ranges[q].low, W);
      factors[q] = exponentials(scores + q * length + begin, ranges[q].low - begin, ranges[q].end - begin);
    }
    std::fill(results, results + count * D, 0.f);
    for (int64_t part = 0; part < length; part += PART)
      in_tiles(count, [&](auto size, int64_t q) { add<size>(ranges + q, part, scores + q * length, results + q * D); });
    for (int64_t q = 0; q < count; q++)
      for (int64_t i = q * D; i < (q + 1) * D; i += W) store(results + i, load(results + i) * factors[q]);
  }

 private:
  float* const keys;
  const float* const values;
  const int64_t length;
  const float cap;
  float* const scores;

  template <class F>
  static void in_tiles(int64_t count, F body) {
    int64_t q = 0;
    for (; q + TILE <= count; q += TILE) body(std::integral_constant<int, TILE>(), q);
    for (; q < count; q++) body(std::integral_constant<int, 1>(), q);
  }

  template <int R>
  void score(const float* queries, const Range* ranges, int64_t part, float* to) const {
    const int64_t end = std::min(part + PART, rounded_up(ranges[R - 1].end, W));
    for (int64_t t = std::max(part, rounded_down(ranges[0].low, W)); t < end; t += W) {
      Floats found[R];
      partial_scores<R, D, 1, 0>(queries, keys + t * D, found);
      for (int r = 0; r < R; r++) store(to + r * length + t, capped(found[r], cap));
    }
  }

  // Adds the values of a part: each query alone before and after the range that all queries have in common.
  template <int R>
  void add(const Range* ranges, int64_t part, const float* weights, float* results) const {
    const int64_t low = ranges[R - 1].low, end = std::max(low, ranges[0].end), last = part + PART;
    auto alone = [&](int64_t from, int64_t to) {
      for (int r = 0; r < R; r++)
        add_values<1, D>(values, std::max(from, ranges[r].low), std::min(to, ranges[r].end), weights + r * length, length,
                         results + r * D);
    };
    alone(part, std::min(low, last));
    add_values<R, D>(values, std::max(part, low), std::min(end, last), weights, length, results);
    alone(std::max(part, end), last);
  }
};

}  // namespace attention
