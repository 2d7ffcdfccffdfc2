// Products by AMX tiles: 16 rows times one strip of 16 outputs, 64 bytes of K at a time (64 int8 or 32 bfloat16).
//
// A strip of packed weights is a tile as it is. The rows after the last one, up to a multiple of 16, are read and must
// exist. Linux permits the tiles to a process that asks for them.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define SERVE_APP_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int64_t ROWS = 16, DEPTH = 64, AHEAD = 4096;

#ifdef SERVE_APP_TILES

// ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA: https://docs.kernel.org/arch/x86/xstate.html
inline const bool usable = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

// The tiles of a thread while this object lives, each of 16 rows of 64 bytes. Products: 0 to 5 are sums, 6 weights, 7 rows.
// Without an object, the system saves no tiles when it switches the thread. With a `size` below 16, the tiles of the
// attention are smaller: 0 and 2 have as many columns, 3 to 7 as many rows.
class Configuration {
 public:
  explicit Configuration(int size = 16) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; tile++) {
      config.columns[tile] = tile == 0 || tile == 2 ? 4 * size : 64;
      config.rows[tile] = tile < 3 ? 16 : size;
    }
    asm volatile("" : : "m"(config));  // GCC's intrinsic says that it reads the first 8 bytes only
    _tile_loadconfig(&config);
  }
  ~Configuration() { _tile_release(); }
  Configuration(const Configuration&) = delete;
};

// Signed bytes times unsigned bytes, or bfloat16 times bfloat16. The numbers of tiles are constants of the instructions.
#define SERVE_APP_TILE_DOT(sums) \
  if constexpr (std::is_same_v<Sum, int32_t>) _tile_dpbsud(sums, 7, 6); \
  else _tile_dpbf16ps(sums, 7, 6)

// Adds the products of tile 6 with 16 rows to the sums of tile TILE.
template <class Sum, int TILE>
void add_products(const char* rows, int64_t stride) {
  _tile_loadd(7, rows, stride);
  if constexpr (TILE == 0) { SERVE_APP_TILE_DOT(0); }
  if constexpr (TILE == 1) { SERVE_APP_TILE_DOT(1); }
  if constexpr (TILE == 2) { SERVE_APP_TILE_DOT(2); }
  if constexpr (TILE == 3) { SERVE_APP_TILE_DOT(3); }
  if constexpr (TILE == 4) { SERVE_APP_TILE_DOT(4); }
  if constexpr (TILE == 5) { SERVE_APP_TILE_DOT(5); }
}

// Sums of G (1 or 2) groups of 16 rows of `bytes` bytes times S (1 to 3) adjacent strips. Weights that are not in the
// cache are read once for both groups. One group alone waits for the weights of a decode step from memory: they are
// prefetched AHEAD bytes of each strip ahead, and then those of the strips at `next`.
template <class Sum, int G, int S>
void product(const char* rows, int64_t bytes, const char* strip, const char* next, Sum (*sums)[3][16][16]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t k = 0; k < bytes; k += DEPTH) {
    const char *weights = strip + k * 16, *second = rows + 16 * bytes + k;
    const char* soon = 16 * k + AHEAD < 16 * bytes ? weights + AHEAD : next + (16 * (k - bytes) + AHEAD);
    for (int64_t i = 0; G == 1 && i < 16 * S; i++) __builtin_prefetch(soon + i / 16 * 16 * bytes + i % 16 * 64, 0, 3);
    _tile_loadd(6, weights, 64);
    add_products<Sum, 0>(rows + k, bytes);
    if constexpr (G > 1) add_products<Sum, 3>(second, bytes);
    if constexpr (S > 1) {
      _tile_loadd(6, weights + 16 * bytes, 64);
      add_products<Sum, 1>(rows + k, bytes);
      if constexpr (G > 1) add_products<Sum, 4>(second, bytes);
    }
    if constexpr (S > 2) {
      _tile_loadd(6, weights + 32 * bytes, 64);
      add_products<Sum, 2>(rows + k, bytes);
      if constexpr (G > 1) add_products<Sum, 5>(second, bytes);
    }
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  _tile_stored(2, sums[0][2], 64);
  if constexpr (G > 1) {
    _tile_stored(3, sums[1][0], 64);
    _tile_stored(4, sums[1][1], 64);
    _tile_stored(5, sums[1][2], 64);
  }
}

template <class Sum, int G>
void strips_product(const char* rows, int64_t bytes, const char* strip, int64_t strips, const char* next, Sum (*sums)[3][16][16]) {
  if (strips == 3) product<Sum, G, 3>(rows, bytes, strip, next, sums);
  else if (strips == 2) product<Sum, G, 2>(rows, bytes, strip, next, sums);
  else product<Sum, G, 1>(rows, bytes, strip, next, sums);
}

#endif

}  // namespace tiles
