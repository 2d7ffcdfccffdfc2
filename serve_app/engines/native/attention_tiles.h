// Attention by AMX tiles, in bfloat16: 16 queries times 16 keys, and the weights of 16 queries times 16 numbers of the values.
//
// A query's sums go over blocks of 256 positions, as in FlashAttention (Dao et al., arXiv 2205.14135): the sums so far are
// scaled when a block has a larger score. The weights of positions outside of its range are 0, so that a query's result
// does not depend on the other queries.
#pragma once
#include "attention_vectors.h"
#include "tiles.h"

#ifdef SERVE_APP_TILES

namespace attention {

// Transposes 16 rows of `bytes` bytes, 4 bytes at a time: tiles [16, 16] of pairs of bfloat16.
inline void transpose_pairs(const bf16* from, int64_t bytes, char* to) {
  for (int64_t i = 0; i < bytes; i += 64, to += 1024) {
    Floats v[W];
    for (int u = 0; u < W; u++) v[u] = load((const float*)((const char*)from + u * bytes + i));
    transpose(v);
    for (int u = 0; u < W; u++) store((float*)to + u * W, v[u]);
  }
}

// Interleaves 16 pairs of adjacent rows of D numbers: tiles [16, 16] of pairs. Of 32 numbers, one tile has those whose
// number has no 4 in it, and the next one the others, as `in_order` says.
template <int D>
void interleave(const bf16* from, char* to) {
  for (int pair = 0; pair < 16; pair++)
    for (int i = 0; i < D; i += 32) {
      const __m512i a = _mm512_loadu_si512(from + 2 * pair * D + i), b = _mm512_loadu_si512(from + (2 * pair + 1) * D + i);
      char* tile = to + i / 16 * 1024 + pair * 64;
      _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(tile + 1024, _mm512_unpackhi_epi16(a, b));
    }
}
inline void in_order(float* of_32, float factor) {
  const Floats a = load(of_32), b = load(of_32 + 16);
  store(of_32, __builtin_shuffle(a, b, (Ints){0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}) * factor);
  store(of_32 + 16, __builtin_shuffle(a, b, (Ints){8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31}) * factor);
}

// 2^x of numbers up to 0. The relative error, 1e-4, is less than that of bfloat16: the polynomial of degree 3 with the
// smallest error for [-0.5, 0.5] whose value at 0 is 1.
inline Floats power_of_two(Floats x) {
  const __m512 n = _mm512_roundscale_ps((__m512)x, 8), f = _mm512_sub_ps((__m512)x, n);
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0550086f), _mm512_set1_ps(0.2422104f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6932829f));
  return (Floats)_mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f)), n);
}

// Numbers [16, 4] -> [4, 16].
inline void transpose_four(Floats* v) {
  const Ints even = {0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29};
  const Ints odd = even + 2;
  const Floats a = __builtin_shuffle(v[0], v[1], even), b = __builtin_shuffle(v[2], v[3], even);
  const Floats c = __builtin_shuffle(v[0], v[1], odd), d = __builtin_shuffle(v[2], v[3], odd);
  const Ints low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high = low + 8;
  v[0] = __builtin_shuffle(a, b, low), v[1] = __builtin_shuffle(a, b, high);
  v[2] = __builtin_shuffle(c, d, low), v[3] = __builtin_shuffle(c, d, high);
}

// The largest score of a query, and the sums of its weights so far.
struct Seen {
  float most;
  Floats total[2];
};

// The score of a position to which a query does not attend: its weight is 0.
constexpr float NEVER = -1e30f;

// Turns `count` scores of a query into weights in bfloat16 at the same address, 0 outside of its range; `count` is a
// multiple of 32. Returns the factor for the query's sums so far.
inline float weigh(float* scores, Range range, int64_t count, float cap, Seen& seen) {
  bf16* weights = (bf16*)scores;
  const int64_t low = std::max<int64_t>(range.low, 0), end = std::min(range.end, count);
  if (low >= end) {
    std::fill(weights, weights + count, bf16(0));
    return 1.f;
  }
  const int64_t begin = rounded_down(low, 32), padded = rounded_up(end, 32);
  for (int64_t t = begin; cap != 0 && t < padded; t += W) store(scores + t, capped(load(scores + t), cap));
  std::fill(scores + begin, scores + low, NEVER);
  std::fill(scores + end, scores + padded, NEVER);
  Floats most[2] = {all(seen.most), all(seen.most)};
  for (int64_t t = begin; t < padded; t += 2 * W)
    for (int i = 0; i < 2; i++) most[i] = larger(most[i], load(scores + t + i * W));
  constexpr float log2_e = 1.44269504f;
  const float top = largest(larger(most[0], most[1])), factor = power_of_two(all((seen.most - top) * log2_e))[0];
  seen.most = top;
  for (Floats& total : seen.total) total *= factor;
  std::fill(weights, weights + begin, bf16(0));
  for (int64_t t = begin; t < padded; t += 2 * W) {
    Floats e[2];
    for (int i = 0; i < 2; i++) seen.total[i] += e[i] = power_of_two(load(scores + t + i * W) * log2_e - top * log2_e);
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)e[1], (__m512)e[0]);
    std::memcpy(weights + t, &rounded, sizeof rounded);
  }
  std::fill(weights + padded, weights + count, bf16(0));
  return factor;
}

// Attention of up to QUERIES queries at a time to the keys and values [length, D] of one head, from a multiple of BLOCK on.
// Ranges ascend.
template <int D>
class ByTiles {
 public:
  using Query = bf16;
  static constexpr int64_t BLOCK = 256, QUERIES = 96, FROM = BLOCK, TO = 32;

  ByTiles(const bf16* keys, const bf16* values, int64_t length, float cap, Scratch& scratch)
      : keys(keys), values(values), length(length), cap(cap), packed_keys((char*)room(scratch.keys, BLOCK * D / 2)),
        packed_values((char*)room(scratch.values, BLOCK * D / 2)) {}

  // Queries [count, D] -> results [count, D]. Memory up to a multiple of 16 queries is read and written.
  void attend(const bf16* queries, const Range* ranges, int64_t count, float* results) const {
    // Up to 4 queries use tiles of 4 rows, or of 4 columns.
    const int size = count > 4 ? 16 : 4;
    const tiles::Configuration configuration(size);
    Seen seen[QUERIES];
    for (int64_t q = 0; q < count; q++) seen[q] = Seen{NEVER, {}};
    std::fill(results, results + rounded_up(count, 16) * D, 0.f);
    if (count <= 16) transpose_pairs(queries, 2 * D, packed_keys);
    for (int64_t t = 0; t < length; t += BLOCK) {
      const int64_t positions = std::min(BLOCK, length - t);
      for (int64_t u = 0; count > 16 && u < positions; u += 16)
        transpose_pairs(keys + (t + u) * D, 2 * D, packed_keys + u * D * 2);
      for (int64_t u = 0; u < positions; u += 32) interleave<D>(values + (t + u) * D, packed_values + u * D * 2);
      for (int64_t q = 0; q < count; q += 16) {
        const int64_t these = std::min<int64_t>(16, count - q);
        if (ranges[q + these - 1].end <= t || ranges[q].low >= t + positions) continue;
        if (count > 16) score(queries + q * D, positions);
        else if (size > 4) score_few<16>(keys + t * D, positions);
        else score_few<4>(keys + t * D, positions);
        for (int64_t i = q; i < q + these; i++) {
          const float factor = weigh(scores[i - q], ranges[i].from(t), positions, cap, seen[i]);
          for (int64_t n = i * D; factor != 1 && n < (i + 1) * D; n += W) store(results + n, load(results + n) * factor);
        }
        for (int i = 0; i < D; i += 64) add(positions, i, results + q * D);
      }
    }
    for (int64_t q = 0; q < count; q++)
      for (int64_t i = q * D; i < (q + 1) * D; i += 32) in_order(results + i, 1.f / sum(seen[q].total[0] + seen[q].total[1]));
  }

 private:
  // A little more than a block: rows at a distance of 1 kB would share few lines of the first cache.
  static constexpr int64_t STRIDE = BLOCK + 16;

  const bf16 *const keys, *const values;
  const int64_t length;
  const float cap;
  char *const packed_keys, *const packed_values;
  alignas(64) mutable float scores[16][STRIDE];

  // 16 queries times the packed keys of a block, and more keys up to a multiple of 64.
  void score(const bf16* queries, int64_t positions) const {
    for (int64_t t = 0; t < positions; t += 64) {
      const char* tile = packed_keys + t * D * 2;
      _tile_zero(0);
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      for (int i = 0; i < D; i += 32, tile += 1024) {
        _tile_loadd(1, queries + i, 2 * D);
        _tile_loadd(2, tile, 64);
        _tile_loadd(3, tile + 32 * D, 64);
        _tile_dpbf16ps(0, 1, 2);
        _tile_dpbf16ps(4, 1, 3);
        _tile_loadd(2, tile + 64 * D, 64);
        _tile_loadd(3, tile + 96 * D, 64);
        _tile_dpbf16ps(5, 1, 2);
        _tile_dpbf16ps(6, 1, 3);
      }
      _tile_stored(0, scores[0] + t, 4 * STRIDE);
      _tile_stored(4, scores[0] + t + 16, 4 * STRIDE);
      _tile_stored(5, scores[0] + t + 32, 4 * STRIDE);
      _tile_stored(6, scores[0] + t + 48, 4 * STRIDE);
    }
  }

  // The keys of a block times up to N packed queries: keys that are used once are not transposed.
  template <int N>
  void score_few(const bf16* keys, int64_t positions) const {
    for (int64_t t = 0; t < positions; t += 16) {
      _tile_zero(0);
      for (int i = 0; i < D; i += 32) {
        _tile_loadd(1, keys + t * D + i, 2 * D);
        _tile_loadd(2, packed_keys + i * 32, 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      alignas(64) float found[16 * N];
      _tile_stored(0, found, 4 * N);
      Floats v[N];
      for (int i = 0; i < N; i++) v[i] = load(found + i * W);
      if constexpr (N == 4) transpose_four(v);
      else transpose(v);
      for (int i = 0; i < N; i++) store(scores[i] + t, v[i]);
    }
  }

  // Adds the numbers [i, i + 64) of the values of a block to 16 results, or those up to D.
  void add(int64_t positions, int i, float* results) const {
    const bool half = i + 32 == D;
    _tile_loadd(4, results + i, 4 * D);
    _tile_loadd(5, results + i + 16, 4 * D);
    if (!half) _tile_loadd(6, results + i + 32, 4 * D);
    if (!half) _tile_loadd(7, results + i + 48, 4 * D);
    for (int64_t t = 0; t < positions; t += 32) {
      const char* tile = packed_values + t * D * 2 + i / 16 * 1024;
      _tile_loadd(3, (const bf16*)scores[0] + t, 4 * STRIDE);
      _tile_loadd(1, tile, 64);
      _tile_dpbf16ps(4, 3, 1);
      _tile_loadd(1, tile + 1024, 64);
      _tile_dpbf16ps(5, 3, 1);
      if (half) continue;
      _tile_loadd(1, tile + 2048, 64);
      _tile_dpbf16ps(6, 3, 1);
      _tile_loadd(1, tile + 3072, 64);
      _tile_dpbf16ps(7, 3, 1);
    }
    _tile_stored(4, results + i, 4 * D);
    _tile_stored(5, results + i + 16, 4 * D);
    if (!half) _tile_stored(6, results + i + 32, 4 * D);
    if (!half) _tile_stored(7, results + i + 48, 4 * D);
  }
};

}  // namespace attention

#endif
