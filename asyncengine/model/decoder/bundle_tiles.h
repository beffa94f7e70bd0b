// Products of bundles in the tile registers of AMX, for decoder.cpp, which includes this where there are tiles.
//
// A tile's instruction multiplies bfloat16 and adds float32, and what bundles.h adds up are integers. A number of 16 bits
// is the sum of two that bfloat16 has exactly: what its lower byte stands for, from -128 to 127, and a multiple of 256; and
// so are weights. Of the 32 products of a bundle, the sums of either part are exact in float32, in whatever order they
// are added: the first stay below 2^20, the second are multiples of 256 below 2^28. The instruction adds a tile's products
// up before it adds them to what was there. So both together are rounded once, as an integer is that becomes a float: a
// row has the same bits as without tiles, and rows that do not fill a tile go without.

namespace {

constexpr int kTileBlocks = 4;    // blocks of 16 rows for which codes are widened once
constexpr int kTileBundles = 32;  // bundles of them that stay in the outer cache meanwhile
constexpr int kTileSteps = 4;     // bundles, or halves of some, that stay in the inner cache, and are added up at a time
constexpr int kTileGroups = 32;   // vectors of outputs for which rows are parted once
constexpr int kFewForTiles = 12;  // rows for which a tile does not pay
constexpr int kFewForBytes = 32;  // rows for which no tiles pay, if weights are bytes

// Between rows of sums: not a power of two, for which all rows would share a few places of the cache.
constexpr int kSumStride = (kTileGroups + 1) * kLanes;

// How many of some rows enter tiles.
constexpr int64_t rows_for_tiles(int64_t rows, int bits) {
  if (bits == 8 && rows <= kFewForBytes) return 0;
  return rows % kTile > kFewForTiles ? rows : rows - rows % kTile;
}

struct BundleBlock {  // one bundle of 16 rows, those that there are not being zero
  alignas(64) uint16_t low[kTile][kBundle], high[kTile][kBundle];  // bfloat16
  float scales[kTile];
  float sums[2][kTile];  // less than none: of all numbers, or of each half
};

struct BundleTiles {  // what a thread works with
  BundleBlock rows[kTileBlocks][kTileBundles];
  alignas(64) uint16_t lanes[2][kTileSteps * kBundle * kTile];  // what the codes of two vectors of outputs stand for
  alignas(64) float sums[kTileBlocks * kTile][kSumStride];
};

// Two vectors of outputs over some steps: bundles, or halves of some.
struct TileColumns {
  const uint16_t *scales[2], *zeros[2];  // of all steps; or null
  int64_t shares[kTileSteps];            // where those of a step are
  int count, steps;                      // of the vectors
};

// Parts some bundles of up to 16 rows, which are `stride` bundles apart.
inline void part_rows(const Bundle *from, int64_t stride, int64_t rows, int64_t bundles, bool halves, BundleBlock *to) {
  const auto whole = [](Ints x) { return (Vec)_mm512_cvtepi32_ps((__m512i)x); };
  const auto pairs_of = [](Vec first, Vec second) { return __m512i((Words)first >> 16 | (Words)second); };
  for (int64_t b = 0; b < bundles; ++b, ++to)
    for (int64_t r = 0; r < kTile; ++r) {
      if (r >= rows) {
        std::memset(to->low[r], 0, sizeof to->low[r]);
        std::memset(to->high[r], 0, sizeof to->high[r]);
        to->scales[r] = to->sums[0][r] = to->sums[1][r] = 0;
        continue;
      }
      const Bundle &bundle = from[r * stride + b];
      const Ints pairs = load<Ints>(bundle.numbers);
      const Vec first = whole(pairs << 24 >> 24), second = whole(pairs << 8 >> 24);
      _mm512_store_si512(to->low[r], pairs_of(first, second));
      _mm512_store_si512(to->high[r], pairs_of(whole(pairs << 16 >> 16) - first, whole(pairs >> 16) - second));
      to->scales[r] = bundle.scale;
      to->sums[0][r] = -float(halves ? bundle.half : bundle.sum);
      to->sums[1][r] = halves ? -float(bundle.sum - bundle.half) : 0.0f;
    }
}

// What codes of some bundles of one vector of outputs stand for, as the steps of tiles; of four bits, what `values` say.
// Those that lie `ahead` bytes further on are brought nearer.
template <int Bits>
inline void widen_codes(const char *from, int64_t bundles, __m512i values, int64_t ahead, uint16_t *to) {
  for (int64_t eight = 0; eight < bundles * (kBundle / 8); ++eight, from += Bits * kLanes) {
    prefetch(from + ahead);
    if (Bits == 8) prefetch(from + ahead + 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, to += 2 * kLanes)
      if constexpr (Bits == 4)
        _mm512_store_si512(to, _mm512_permutexvar_epi16((__m512i)(load<Words>(from) >> (4 * i)), values));
      else
        _mm512_store_si512(to, (__m512i)Int8::operand(reinterpret_cast<const int8_t *>(from) + i * 2 * kLanes));
  }
}

// Adds what 16 rows and two vectors of outputs come to over some steps, of which a bundle has so many parts, to their sums.
template <int Parts>
__attribute__((noinline)) void multiply_block(const BundleBlock *rows, const uint16_t *const (&lanes)[2],
                                              const TileColumns &columns, float *sums) {
  constexpr int kNumbers = kBundle / Parts;
  alignas(64) float dots[kTileSteps][2][kTile][kTile];
  finish_writing();
  for (int step = 0; step < columns.steps; ++step) {
    const BundleBlock &block = rows[step / Parts];
    const int first = step % Parts * kNumbers;
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(6, lanes[0] + step * kNumbers * kTile, 4 * kTile);
    _tile_loadd(4, block.low[0] + first, 2 * kBundle);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, lanes[1] + step * kNumbers * kTile, 4 * kTile);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, block.high[0] + first, 2 * kBundle);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, dots[step][0], 4 * kTile);
    _tile_stored(1, dots[step][1], 4 * kTile);
  }
  for (int g = 0; g < columns.count; ++g, sums += kLanes) {
    const uint16_t *scales = columns.scales[g], *zeros = columns.zeros[g];
    Vec sum[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) sum[r] = load<Vec>(sums + r * kSumStride);
    for (int step = 0; step < columns.steps; ++step) {
      const BundleBlock &block = rows[step / Parts];
      const float *dot = dots[step][g][0], *entered = block.sums[step % Parts];
      const Vec scale = scales ? Float16::widen_vector(scales + columns.shares[step]) : splat(1.0f);
      const Vec zero = zeros ? Float16::widen_vector(zeros + columns.shares[step]) : Vec{};
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        Vec whole = load<Vec>(dot + r * kTile);
        if (zeros) whole = fused(zero, (Vec)_mm512_set1_ps(entered[r]), whole);
        sum[r] = fused(whole, scale * block.scales[r], sum[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) store(sums + r * kSumStride, sum[r]);
  }
}

// room.sums[row] (groups, lane) of up to `kTileBlocks` blocks of rows and `kTileGroups` vectors of outputs, which are `stride`
// bytes apart. Bits and group as in `multiply_bundles`.
template <int Bits, int Group>
void multiply_in_tiles(const Bundle *inputs, int64_t bundles, int64_t rows, const char *weights, int64_t stride,
                       int64_t groups, const Format *format, BundleTiles &room) {
  constexpr int kParts = Group == kBundle / 2 ? 2 : 1;
  constexpr int kCodes = kBundle * kLanes * Bits / 8;  // bytes of a bundle's codes
  const bool zeros = Group && format->zeros;
  const int64_t blocks = (rows + kTile - 1) / kTile, run = Group == kBundle ? format->group / kBundle : 1;
  alignas(64) uint16_t values[32] = {};
  for (int i = 0; Bits == 4 && i < 32; ++i) values[i] = BFloat16::narrow(format->values[i]);
  const uint16_t *const lanes[2] = {room.lanes[0], room.lanes[1]};
  configure_tiles(2 * kTile, kTile / kParts);
  for (int64_t r = 0; r < blocks * kTile; ++r) std::memset(room.sums[r], 0, size_t(groups * kLanes) * sizeof(float));
  for (int64_t begin = 0; begin < bundles; begin += kTileBundles) {
    const int64_t end = std::min<int64_t>(begin + kTileBundles, bundles);
    for (int64_t block = 0; block < blocks; ++block)
      part_rows(inputs + block * kTile * bundles + begin, bundles, std::min<int64_t>(rows - block * kTile, kTile),
                end - begin, kParts == 2 && zeros, room.rows[block]);
    for (int64_t first = begin; first < end; first += kTileSteps / kParts) {
      const int64_t count = std::min<int64_t>(end - first, kTileSteps / kParts);
      TileColumns columns{{}, {}, {}, 0, int(count * kParts)};
      for (int step = 0; step < columns.steps; ++step) columns.shares[step] = (first * kParts + step) / run * kLanes;
      for (int64_t g = 0; g < groups; g += 2) {
        columns.count = int(std::min<int64_t>(groups - g, 2));
        for (int i = 0; i < columns.count; ++i) {
          const char *group = weights + (g + i) * stride;
          widen_codes<Bits>(group + first * kCodes, count, _mm512_load_si512(values), 2 * stride, room.lanes[i]);
          if (!Group) continue;
          columns.scales[i] = reinterpret_cast<const uint16_t *>(group + bundles * kCodes);
          columns.zeros[i] = zeros ? columns.scales[i] + bundles * kParts / run * kLanes : nullptr;
        }
        for (int64_t block = 0; block < blocks; ++block)
          multiply_block<kParts>(room.rows[block] + (first - begin), lanes, columns, room.sums[block * kTile] + g * kLanes);
      }
    }
  }
}

}  // namespace
