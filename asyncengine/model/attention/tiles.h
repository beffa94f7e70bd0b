// Products of bfloat16 in the tile registers of AMX, for paged_attention.cpp and decoder.cpp, which include this.
//
// A tile of the left side is 16 rows of 16 steps, one of the right side 16 steps of 16 lanes, and a step is a pair of
// numbers: rows, packed weights and pages are read as they lie in memory.
//
// The instruction sums up the first and the second numbers of a tile's pairs by themselves, and adds both to what was
// there. A chain of dot products gives other bits. So where there are tiles, few rows, for which they do not pay, are
// multiplied in the same order.

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#else
#define HAS_TILES 0
#endif

constexpr int kTile = 16;  // rows, steps and lanes of a tile

#if HAS_TILES
namespace {

constexpr int kTileNumbers = 2 * kTile * kTile;

// Whether this process may use tiles: Linux lets those who ask. Asked once, so that no model changes its bits.
inline bool tiles_allowed() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// For compilers, which do not know what tiles read: everything is written by now.
inline void finish_writing() { __asm__ volatile("" ::: "memory"); }

// Gives this thread's tiles their sizes. Up to 16 rows: sums of four groups of lanes in 0 to 3, rows in 4, lanes in 5
// to 7. Up to 32 rows: sums of two groups in 0 and 1, those of the second 16 rows in 2 and 3; rows in 4 and 5, lanes in 6
// and 7. Rows and lanes have so many steps.
inline void configure_tiles(int rows, int steps = kTile) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const int upper = std::min(rows, kTile), lower = rows > kTile ? rows - kTile : rows;
  const int counts[] = {upper, upper, lower, lower, upper, rows > kTile ? lower : steps, steps, steps};
  for (int i = 0; i < 8; ++i) {
    const bool has_rows = i == 4 || (i == 5 && rows > kTile);
    config.bytes[i] = uint16_t(4 * (has_rows ? steps : kTile));
    config.rows[i] = uint8_t(counts[i]);
  }
  finish_writing();
  _tile_loadconfig(&config);
}

// Both sides of a product over the steps of some tiles.
struct TileOperands {
  const uint32_t *rows;  // pairs
  int64_t row_stride;    // pairs
  const uint16_t *lanes[4];
  int64_t step_stride;  // bytes
  int64_t tiles;        // that many, one after the other
};

// A tile of lanes that lies so many bytes further on.
inline void fetch_tile(const uint16_t *lanes, int64_t ahead) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) __builtin_prefetch(reinterpret_cast<const char *>(lanes) + i * 64 + ahead);
}

// sums[group] (rows, lanes) of up to 16 rows and four groups over some runs of tiles, onto what is there or from zero.
// `fetch(group, lanes)` is called beside each tile.
template <class Fetch>
__attribute__((noinline)) void multiply_flat(const TileOperands *runs, int count, float *const (&sums)[4],
                                             int64_t sum_stride, bool onto, Fetch fetch) {
  finish_writing();
  if (onto) {
    _tile_loadd(0, sums[0], sum_stride * 4);
    _tile_loadd(1, sums[1], sum_stride * 4);
    _tile_loadd(2, sums[2], sum_stride * 4);
    _tile_loadd(3, sums[3], sum_stride * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const TileOperands *run = runs; run < runs + count; ++run) {
    const uint16_t *lanes[4];
    std::memcpy(lanes, run->lanes, sizeof lanes);
    for (int64_t tile = 0; tile < run->tiles; ++tile) {
      _tile_loadd(4, run->rows + tile * kTile, run->row_stride * 4);
      _tile_loadd(5, lanes[0], run->step_stride);
      fetch(0, lanes[0]);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, lanes[1], run->step_stride);
      fetch(1, lanes[1]);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, lanes[2], run->step_stride);
      fetch(2, lanes[2]);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, lanes[3], run->step_stride);
      fetch(3, lanes[3]);
      _tile_dpbf16ps(3, 4, 5);
      for (const uint16_t *&each : lanes) each += run->step_stride * (kTile / 2);
    }
  }
  _tile_stored(0, sums[0], sum_stride * 4);
  _tile_stored(1, sums[1], sum_stride * 4);
  _tile_stored(2, sums[2], sum_stride * 4);
  _tile_stored(3, sums[3], sum_stride * 4);
}

// sums (rows, 2 groups) of 17 to 32 rows, over two runs of tiles, from zero.
template <class Fetch>
__attribute__((noinline)) void multiply_tall(const TileOperands (&runs)[2], float *sums, bool fetches,
                                             Fetch fetch) {
  finish_writing();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (const TileOperands &run : runs) {
    const uint16_t *first = run.lanes[0], *second = run.lanes[1];
    const uint32_t *upper = run.rows, *lower = run.rows + kTile * run.row_stride;
    for (int64_t tile = 0; tile < run.tiles; ++tile) {
      if (fetches) {
        fetch(0, first);
        fetch(1, second);
      }
      _tile_loadd(6, first, run.step_stride);
      _tile_loadd(4, upper, run.row_stride * 4);
      _tile_loadd(7, second, run.step_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, lower, run.row_stride * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      first += kTileNumbers;
      second += kTileNumbers;
      upper += kTile;
      lower += kTile;
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kTile, 128);
  _tile_stored(2, sums + 2 * kTile * kTile, 128);
  _tile_stored(3, sums + 2 * kTile * kTile + kTile, 128);
}

// Denormal numbers are zero in tiles; and so here, while this lives.
struct NoDenormals {
  const unsigned before = _mm_getcsr();
  NoDenormals() { _mm_setcsr(before | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before); }
};

// For who is done: the system keeps the contents of tiles that are in use whenever a thread waits.
inline void release_tiles() {
  if (tiles_allowed()) _tile_release();
}

}  // namespace
#else
inline void release_tiles() {}
#endif
