// Paged attention on the CPU: writes a step's keys and values into their pages, then attends, decode rows and
// prefill rows alike. Plain C ABI, compiled on first use by kernel.py with -march=native.
//
// Both products of attention are one loop here, C[row][lane] += sum over steps A[row][step] * B[step][lane]: keys have
// tokens for lanes, values have dimensions for lanes, and no product ever needs a sum across lanes. The pages are stored
// in just that order:
//
//     keys    (block, kv head, step, token, pair)    step = key_dim / pair
//     values  (block, kv head, step, value_dim, pair)    step = token / pair
//
// pair is 2 for bfloat16, as the dot-product instruction takes it, and 1 otherwise (also for the values of pages with
// an odd number of tokens). Pages that do not hold whole vectors of tokens are copied block by block before use.
//
// The same token always gets the same bits, whatever else is in the batch, whether it decodes or is prefilled, and on
// any number of threads: blocks of 128 tokens and splits of 512 begin at fixed multiples of the position, every block
// takes the same operations in the same order, and the splits are folded in ascending order. Tokens that a row must
// not see only ever contribute an exact zero. Cache positions that were never written are never multiplied.
//
// The method is that of FlashAttention (Dao et al., 2022) with the fixed splits of Flash-Decoding.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sched.h>
#include <type_traits>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "tiles.h"

// The entry points of torch's own OpenMP runtime, called directly: a second runtime would bring a second thread pool,
// and this way any compiler will do, with or without OpenMP of its own.
extern "C" {
#if defined(PAGED_ATTENTION_SERIAL)
static void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }
static int omp_get_thread_num() { return 0; }
#else
void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
int omp_get_thread_num();
#endif
}

// Which numbers are compiled: those of one kind, which kernel.py names, for each takes the compiler seconds. Kinds are
// dtypes as in Layer, and 3 and 4, which are bfloat16 with weights in int8 and in four bits.
#if defined(ONE_KIND)
#define HAS_KIND(kind) ((kind) == ONE_KIND)
#else
#define HAS_KIND(kind) 1
#endif
#define HAS_DTYPE(dtype) (HAS_KIND(dtype) || ((dtype) == 1 && (HAS_KIND(3) || HAS_KIND(4))))

// The three structures below are mirrored in cpu.py.
extern "C" {
struct Layer {
  void *keys;
  void *values;
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16: of the cache, the inputs and the output
  int64_t page_size;
  int64_t heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;
  int64_t window;       // 0 is unlimited
  int64_t looks_ahead;  // whether tokens see as far as the plan's `reach`
  double scaling;
  double soft_cap;  // 0 is off
};

struct Plan {
  const int32_t *query_start;   // (rows + 1)
  const int32_t *context_lens;  // (rows)
  const int32_t *block_tables;  // (rows, table_stride)
  const int64_t *slot_mapping;  // (tokens); negative is not written
  const int64_t *row_order;     // (rows), costly rows first
  const int32_t *reach;         // (tokens) how much of its row each token sees, ascending in a row; null: up to itself
  int64_t table_stride;
  int64_t rows;
  int64_t tokens;
  int64_t threads;
};

struct Call {  // strides in elements, of the token and of the head
  const void *query;
  int64_t query_token, query_head;
  const void *key;
  int64_t key_token, key_head;
  const void *value;
  int64_t value_token, value_head;
  const float *sinks;  // (heads) or null
  void *output;        // (tokens, heads, value_dim)
  const float *bias;   // (heads, distances), added to scaled scores; the last is that of all farther tokens. Or null
  int64_t distances;
};
}

namespace {

// How wide a vector is, and how many rows and columns of accumulators the registers have room for.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kMaxRows = 6, kMaxCols = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kMaxRows = 4, kMaxCols = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kMaxRows = 6, kMaxCols = 4;
#else
constexpr int kVectorBytes = 16, kMaxRows = 4, kMaxCols = 2;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kBlock = 128;  // tokens to one update of the running maximum
constexpr int kGroups = kBlock / kLanes;
constexpr int kSplit = 512;    // tokens to one partial result
constexpr int kTileRows = 48;  // (token, head) pairs that share one pass over the keys and values
#if HAS_TILES
constexpr int kChunkRows = kTile;  // the most of them that are multiplied at once
#else
constexpr int kChunkRows = kMaxRows;
#endif
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

template <class To>
inline To load(const void *from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
inline void store(float *to, Vec from) { std::memcpy(to, &from, sizeof from); }
inline Vec splat(float x) { return Vec{} + x; }
// a * b + c, rounded once where the processor can: said outright, because compilers choose by their own lights, which
// would give the same token other bits in another loop.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Ints iota() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

template <class Operation>
inline float across(Vec v, Operation operation) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = operation(lane[i], lane[i + width]);
  return lane[0];
}
#if defined(__AVX512F__)
inline float lanes_max(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
inline float lanes_sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float lanes_max(Vec v) {
  return across(v, [](float a, float b) { return a > b ? a : b; });
}
inline float lanes_sum(Vec v) {
  return across(v, [](float a, float b) { return a + b; });
}
#endif

// 2^x for x <= 0, exact 0 for -inf and whatever underflows; relative error below 2e-7, or 3e-6 where that is
// enough because the result is rounded to bfloat16.
template <bool Coarse = false>
inline Vec exp2_nonpositive(Vec x) {
#if defined(__AVX512F__)
  const Vec clamped = (Vec)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // in this order NaN stays NaN
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec clamped = x < -126.0f ? splat(-126.0f) : x;
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = clamped + shifter, whole = shifted - shifter;
#endif
  const Vec f = clamped - whole;  // -0.5 .. 0.5
  Vec p;
  if (Coarse) {
    p = splat(9.582853169e-3f);
    p = p * f + 5.590642504e-2f;
    p = p * f + 2.402409861e-1f;
    p = p * f + 6.931241934e-1f;
  } else {
    p = splat(1.326472725e-3f);
    p = p * f + 9.671512688e-3f;
    p = p * f + 5.550733744e-2f;
    p = p * f + 2.402224208e-1f;
    p = p * f + 6.931469776e-1f;
  }
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return x < -126.0f ? splat(0.0f) : (Vec)((Ints)p + (((Ints)shifted - (Ints)shifter) << 23));
#endif
}
inline float exp2_nonpositive(float x) { return exp2_nonpositive<false>(splat(x))[0]; }

inline Vec tanh_of(Vec x) {
  Vec magnitude = x < 0.0f ? -x : x;
  Vec e = exp2_nonpositive<false>(magnitude * (-2.0f * kLog2E));
  Vec large = (1.0f - e) / (1.0f + e);
  Vec x2 = x * x;  // below 0.25 the quotient cancels; a series does not
  Vec series = splat(0.0218694885f);
  series = series * x2 - 0.0539682540f;
  series = series * x2 + 0.133333333f;
  series = series * x2 - 0.333333333f;
  series = magnitude * (series * x2 + 1.0f);
  Vec t = magnitude < 0.25f ? series : large;
  return x < 0.0f ? -t : t;
}

// ---- the three storage types -------------------------------------------------------------------------------------
//
// Each says how a vector of the cache becomes an operand, how a query or a weight is packed for it, and how the two
// are multiplied. `Weight` is one step of a row: what is multiplied with all lanes of an operand.

struct Halves {  // of a vector of pairs
  Vec first, second;
};

inline void store_low_halves(uint16_t *to, Words words) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_cvtepi32_epi16((__m512i)words);
  std::memcpy(to, &low, sizeof low);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = uint16_t(words[i]);
#endif
}

struct Float32 {
  static constexpr bool kCoarse = false;
  typedef float Stored;
  typedef float Weight;
  typedef Vec Operand;
  static constexpr int kPair = 1;
  static Operand operand(const Stored *p) { return load<Vec>(p); }
  static Operand first_of_pair(const Stored *p) { return operand(p); }
  static Vec add_product(Vec sum, Weight w, Operand b) { return fused(splat(w), b, sum); }
  static void pack(Weight *to, int64_t i, float x) { to[i] = x; }
  static void pack_vector(Weight *to, Vec x) { store(to, x); }
  static float widen(Stored x) { return x; }
  static Stored narrow(float x) { return x; }
  static void narrow_vector(Stored *to, Vec x) { store(to, x); }
};

struct BFloat16 {
  static constexpr bool kCoarse = true;
  typedef uint16_t Stored;
  static constexpr int kPair = 2;
  static float widen(Stored x) {
    uint32_t bits = uint32_t(x) << 16;
    return load<float>(&bits);
  }
  static Stored narrow(float x) {
    uint32_t bits = load<uint32_t>(&x);
    if ((bits & 0x7fffffff) > 0x7f800000) return Stored((bits >> 16) | 0x40);
    return Stored((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static void narrow_vector(Stored *to, Vec x) {
    const Words bits = (Words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store_low_halves(to, (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
  }
#if defined(__AVX512BF16__)
  typedef uint32_t Weight;  // two bfloat16
  typedef __m512i Operand;
  static Operand operand(const Stored *p) { return _mm512_loadu_si512(p); }
  static Halves halves(Words pairs) { return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)}; }
  static Halves halves(const Stored *p) { return halves(load<Words>(p)); }
  static Operand first_of_pair(const Stored *p) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff));
  }
  static Vec add_product(Vec sum, Weight w, Operand b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32(int(w)));
  }
  static void pack(Weight *to, int64_t i, float x) {
    Stored narrowed = narrow(x);
    std::memcpy(reinterpret_cast<char *>(to) + i * 2, &narrowed, 2);
  }
  static void pack_vector(Weight *to, Vec x) {
    __m256bh narrowed = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &narrowed, 32);
  }
#else
  struct Weight {
    float first, second;
  };
  typedef Halves Operand;
  static Operand operand(const Stored *p) {
    Words pairs = load<Words>(p);
    return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
  }
  static Operand first_of_pair(const Stored *p) { return {(Vec)(load<Words>(p) << 16), Vec{}}; }
  static Vec add_product(Vec sum, Weight w, Operand b) {
    return fused(splat(w.second), b.second, fused(splat(w.first), b.first, sum));
  }
  static void pack(Weight *to, int64_t i, float x) { (i % 2 ? to[i / 2].second : to[i / 2].first) = x; }
  static void pack_vector(Weight *to, Vec x) { std::memcpy(to, &x, sizeof x); }
#endif
};

struct Float16 {
  static constexpr bool kCoarse = false;
  typedef uint16_t Stored;
  typedef float Weight;
  typedef Vec Operand;
  static constexpr int kPair = 1;
  static Vec widen_vector(const Stored *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(load<__m128i>(p));
#else
    Words bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = p[i];
    Words magnitude = (bits & 0x7fff) << 13;
    Words scaled = (Words)((Vec)magnitude * 0x1p112f);  // moves the exponent's bias; exact for denormals
    scaled = magnitude >= (0x7c00u << 13) ? scaled | 0x7f800000u : scaled;
    return (Vec)(scaled | (bits & 0x8000) << 16);
#endif
  }
  static Operand operand(const Stored *p) { return widen_vector(p); }
  static Operand first_of_pair(const Stored *p) { return operand(p); }
  static Vec add_product(Vec sum, Weight w, Operand b) { return fused(splat(w), b, sum); }
  static void pack(Weight *to, int64_t i, float x) { to[i] = x; }
  static void pack_vector(Weight *to, Vec x) { store(to, x); }
  static float widen(Stored x) {
    Stored lanes[kLanes] = {x};
    return widen_vector(lanes)[0];
  }
  static Stored narrow(float x) {
#if defined(__F16C__)
    return Stored(_cvtss_sh(x, 0));
#else
    uint32_t bits = load<uint32_t>(&x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return Stored(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return Stored(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // denormal: let the addition round
      float shifted = load<float>(&magnitude) + 0.5f;
      return Stored(sign | (load<uint32_t>(&shifted) - 0x3f000000));
    }
    magnitude += 0xfff + ((magnitude >> 13) & 1);
    return Stored(sign | ((magnitude - (112u << 23)) >> 13));
#endif
  }
  static void narrow_vector(Stored *to, Vec x) {
#if defined(__AVX512F__)
    const __m256i narrowed = _mm512_cvtps_ph((__m512)x, 0);
    std::memcpy(to, &narrowed, sizeof narrowed);
#elif defined(__F16C__)
    const __m128i narrowed = _mm256_cvtps_ph((__m256)x, 0);
    std::memcpy(to, &narrowed, sizeof narrowed);
#else
    for (int i = 0; i < kLanes; ++i) to[i] = narrow(x[i]);
#endif
  }
};

// to = from * factor, as it is stored.
template <class T>
inline void narrow_row(typename T::Stored *to, const float *from, int64_t count, float factor = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) T::narrow_vector(to + i, load<Vec>(from + i) * factor);
  for (; i < count; ++i) to[i] = T::narrow(from[i] * factor);
}

// ---- the inner loops ---------------------------------------------------------------------------------------------

// What to bring nearer meanwhile: the values while keys are multiplied, the next block's keys while values are. Without
// it arithmetic and memory wait for each other. Only towards the second-level cache: the queue towards the first is
// short, and when it is full nothing moves.
struct Ahead {
  const void *const *at;  // one for each group of tokens
  int64_t offset, stride;
  int lines;  // at each step of `multiply_values`
  const char *from(int group) const { return static_cast<const char *>(at[group]) + offset; }
};
inline void prefetch(const char *at) { __builtin_prefetch(at, 0, 2); }

// Keys: scores[row][token], each group of as many tokens as a vector has lanes at its own address.
template <class T, int Rows, int Cols>
__attribute__((noinline)) void multiply_keys(const typename T::Weight *queries, int64_t query_stride,
                                             const void *const *keys, int64_t step_stride, int64_t steps, float *scores,
                                             Ahead ahead) {
  Vec sum[Rows][Cols] = {};
  const typename T::Stored *column[Cols];
#pragma GCC unroll 8
  for (int c = 0; c < Cols; ++c) column[c] = static_cast<const typename T::Stored *>(keys[c]);
  for (int64_t step = 0; step < steps; ++step) {
    typename T::Operand key[Cols];
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) {
      key[c] = T::operand(column[c] + step * step_stride);
      prefetch(ahead.from(c) + step * ahead.stride);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename T::Weight w = queries[r * query_stride + step];
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) sum[r][c] = T::add_product(sum[r][c], w, key[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) store(scores + r * kBlock + c * kLanes, sum[r][c]);
}

// Values: sums[row][lane] = sums[row][lane] * correction[row] + weights x values, over `groups` of tokens, each at
// its own address; only the first `last_tokens` of the last group are read.
template <class T, int Rows, int Cols>
__attribute__((noinline)) void multiply_values(const typename T::Weight *weights, const void *const *values,
                                               int64_t offset, int64_t step_stride, int groups, int last_tokens,
                                               const float *correction, float *sums, int64_t sum_stride, Ahead ahead) {
  constexpr int kSteps = kLanes / T::kPair;
  Vec sum[Rows][Cols];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) sum[r][c] = load<Vec>(sums + r * sum_stride + c * kLanes) * correction[r];
  for (int g = 0; g < groups; ++g) {
    const typename T::Stored *row = static_cast<const typename T::Stored *>(values[g]) + offset;
    const typename T::Weight *weight = weights + g * kSteps;
    const char *next = ahead.from(g);
    const int tokens = g + 1 < groups ? kLanes : last_tokens;
    for (int step = 0; step < tokens / T::kPair; ++step, row += step_stride) {
      for (int i = 0; i < ahead.lines; ++i, next += ahead.stride) prefetch(next);
      typename T::Operand value[Cols];
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) value[c] = T::operand(row + c * kLanes * T::kPair);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const typename T::Weight w = weight[r * (kBlock / T::kPair) + step];
#pragma GCC unroll 8
        for (int c = 0; c < Cols; ++c) sum[r][c] = T::add_product(sum[r][c], w, value[c]);
      }
    }
    if (tokens % T::kPair) {  // the pair's other token was never written: it may be NaN, and 0 * NaN is not 0
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) {
        typename T::Operand value = T::first_of_pair(row + c * kLanes * T::kPair);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          sum[r][c] = T::add_product(sum[r][c], weight[r * (kBlock / T::kPair) + tokens / T::kPair], value);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) store(sums + r * sum_stride + c * kLanes, sum[r][c]);
}

template <class T>
struct Loops {
  decltype(&multiply_keys<T, 1, 1>) keys[kMaxRows + 1][2];
  decltype(&multiply_values<T, 1, 1>) values[kMaxRows + 1][2];
  template <int Rows>
  constexpr void fill() {
    keys[Rows][0] = multiply_keys<T, Rows, 1>;
    keys[Rows][1] = multiply_keys<T, Rows, kMaxCols>;
    values[Rows][0] = multiply_values<T, Rows, 1>;
    values[Rows][1] = multiply_values<T, Rows, kMaxCols>;
    if constexpr (Rows > 1) fill<Rows - 1>();
  }
  constexpr Loops() : keys(), values() { fill<kMaxRows>(); }
};
template <class T>
constexpr Loops<T> loops;

// ---- one step of one layer ---------------------------------------------------------------------------------------

struct Tile {  // query tokens of one row that share a pass over its keys
  int64_t row, first, count;
  int64_t context;  // position of the first of them
  int64_t limit;    // how much of the row the last of them sees, which is most
  int64_t split, splits;
  int64_t partials;  // where the results of its splits lie, when several threads share them
};

struct Unit {  // what one thread does at a time, for one KV head
  int64_t tile, split, splits;
};

// The running softmax of a tile's (token, head) rows, all in base 2.
struct State {
  float *maximum, *total, *sums;
};

struct Buffer {
  char *data = nullptr;
  size_t size = 0;
  char *at_least(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<char *>(std::aligned_alloc(4096, size));
      if (!data) size = 0;
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Items that the threads share out. Waiting is for the items, not for the threads: one that the system has not
// scheduled yet, on a busy machine, holds nobody up until the end.
struct Phase {
  std::atomic<int64_t> next{0}, done{0};
  template <class Body>
  void run(int64_t count, Body body) {
    int64_t mine = 0;
    for (int64_t i; (i = take()) < count; ++mine) body(i);
    done.fetch_add(mine, std::memory_order_release);
  }
  // The same; a body knows which item its thread does after its own, or gets its own again where there is none.
  template <class Body>
  void run_in_sight(int64_t count, Body body) {
    int64_t mine = 0, after;
    for (int64_t i = take(); i < count; i = after, ++mine) {
      after = take();
      body(i, after < count ? after : i);
    }
    done.fetch_add(mine, std::memory_order_release);
  }
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
  void wait(int64_t count) const {
    for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins)
      if (spins > 1000) sched_yield();
  }
};

template <class T>
struct Step {
  typedef typename T::Stored Stored;
  typedef typename T::Weight Weight;

  const Layer layer;
  const Plan plan;
  const Call call;
  const bool tiled;  // whether tiles multiply, see tiles.h
  const int32_t *const reach;  // of the plan, if the layer looks ahead
  const int64_t per_kv_head, key_steps, query_steps, value_pair, key_block, value_block, sum_width, max_rows;
  const int64_t bias_width;  // of a row of `Scratch::biases`
  const bool direct;  // pages can be read where they are
  const float score_scale, tanh_scale;
  std::vector<Tile> &tiles;
  std::vector<Unit> &units;
  bool split_units = false;
  int64_t partial_floats = 0, scratch_bytes = 0;
  char *scratch = nullptr;
  float *partials = nullptr;
  Phase writing, attending, merging;

  Step(const Layer &l, const Plan &p, const Call &c, std::vector<Tile> &t, std::vector<Unit> &u)
      : layer(l),
        plan(p),
        call(c),
        tiled(by_tiles()),
        reach(l.looks_ahead ? p.reach : nullptr),
        per_kv_head(l.heads / l.kv_heads),
        key_steps((l.key_dim + T::kPair - 1) / T::kPair),
        query_steps(tiled ? round_up(key_steps, kTile) : key_steps),
        value_pair(l.page_size % T::kPair ? 1 : T::kPair),
        key_block(key_steps * l.page_size * T::kPair),
        value_block(l.page_size * l.value_dim),
        sum_width(round_up(l.value_dim, kLanes)),
        max_rows(std::max<int64_t>(kTileRows / per_kv_head, 1) * per_kv_head),
        bias_width(c.bias ? round_up(c.distances + 2 * kLanes, kLanes) : 0),
        direct(l.page_size % kLanes == 0),
        score_scale(l.soft_cap != 0 || c.bias ? 1.0f : float(l.scaling * 1.44269504088896340736)),
        tanh_scale(l.soft_cap != 0 ? float(l.scaling / l.soft_cap) : 0.0f),
        tiles(t),
        units(u) {}

  static bool by_tiles() {
#if HAS_TILES
    return std::is_same<T, BFloat16>::value && tiles_allowed();
#else
    return false;
#endif
  }

  // -- sizes and shares

  // Divides the work, for this layer and those that are `measure_like` it.
  void measure() {
    tiles.clear();
    units.clear();
    const int64_t tile_tokens = max_rows / per_kv_head;
    int64_t all_splits = 0, partial_rows = 0;
    for (int64_t i = 0; i < plan.rows; ++i) {
      const int64_t row = plan.row_order[i];
      const int64_t start = plan.query_start[row], count = plan.query_start[row + 1] - start;
      for (int64_t first = round_up(count, tile_tokens) - tile_tokens; first >= 0; first -= tile_tokens) {
        const int64_t tokens = std::min(tile_tokens, count - first), context = plan.context_lens[row] + first;
        const int64_t split = first_visible(context) / kSplit;
        const int64_t limit = reach ? reach[start + first + tokens - 1] : context + tokens;
        const int64_t splits = (limit - 1) / kSplit + 1 - split;
        tiles.push_back({row, start + first, tokens, context, limit, split, splits, partial_rows});
        partial_rows += splits * tokens * per_kv_head;
        all_splits += splits;
      }
    }
    const int64_t unsplit = int64_t(tiles.size()) * layer.kv_heads;
    partial_floats = partial_rows * (sum_width + kLanes);
    // With few rows the splits are what there is to share out. It changes nothing in the results.
    split_units = plan.threads > 1 && unsplit < 4 * plan.threads && all_splits > int64_t(tiles.size()) &&
                  partial_floats * layer.kv_heads <= (int64_t(1) << 24);
    for (size_t t = 0; t < tiles.size(); ++t) {
      const int64_t each = split_units ? 1 : tiles[t].splits;
      for (int64_t s = 0; s < tiles[t].splits; s += each) units.push_back({int64_t(t), tiles[t].split + s, each});
    }
    scratch_bytes = layout(nullptr).bytes;
  }

  void measure_like(const Step &other) {
    split_units = other.split_units;
    partial_floats = other.partial_floats;
    scratch_bytes = other.scratch_bytes;
  }

  int64_t partial_bytes() const { return split_units ? partial_floats * layer.kv_heads * 4 : 0; }

  // Memory of scratch_bytes for each thread, and of partial_bytes().
  void use(char *scratch_memory, char *partial_memory) {
    scratch = scratch_memory;
    partials = reinterpret_cast<float *>(partial_memory);
  }

  struct Scratch {
    Weight *queries, *weights;
    State running, total;
    float *scores;
    float *biases;  // of the KV head's query heads, by ascending position, see `arrange_biases`
    Stored *keys, *values;
    Stored *key_ends, *value_tiles;  // where tiles multiply: what does not make whole ones where it lies
    int64_t bytes;
  };

  Scratch layout(char *base) const {
    int64_t used = 0;
    auto take = [&](int64_t bytes) {
      char *at = base + used;
      used += round_up(bytes, 64);
      return at;
    };
    Scratch s;
    s.queries = reinterpret_cast<Weight *>(take(max_rows * query_steps * sizeof(Weight)));
    s.weights = reinterpret_cast<Weight *>(take(kChunkRows * (kBlock / T::kPair) * sizeof(Weight)));
    s.scores = reinterpret_cast<float *>(take(kChunkRows * kBlock * 4));
    s.biases = reinterpret_cast<float *>(take(per_kv_head * bias_width * 4));
    for (State *state : {&s.running, &s.total}) {
      state->maximum = reinterpret_cast<float *>(take(max_rows * 4));
      state->total = reinterpret_cast<float *>(take(max_rows * kLanes * 4));
      state->sums = reinterpret_cast<float *>(take(max_rows * sum_width * 4));
    }
    // One vector more than the block: lanes past the last dimension are read and dropped.
    s.keys = reinterpret_cast<Stored *>(take(direct ? 0 : key_steps * kBlock * T::kPair * sizeof(Stored)));
    s.values = reinterpret_cast<Stored *>(take(direct ? 0 : (layer.value_dim * kBlock + 64) * sizeof(Stored)));
    s.key_ends = reinterpret_cast<Stored *>(take(tiled ? kBlock * kTile * T::kPair * sizeof(Stored) : 0));
    s.value_tiles = reinterpret_cast<Stored *>(take(tiled ? (layer.value_dim * kBlock + 64) * sizeof(Stored) : 0));
    s.bytes = round_up(used, 4096);
    return s;
  }

  int64_t first_visible(int64_t position) const {
    return layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0;
  }

  // -- writing

  static constexpr int64_t kWriteTokens = 16;

  void write(int64_t item) const {
    const int64_t head = item % layer.kv_heads, first = item / layer.kv_heads * kWriteTokens;
    const int64_t last = std::min(first + kWriteTokens, plan.tokens), page = layer.page_size;
    for (int64_t token = first; token < last; ++token) {
      const int64_t slot = plan.slot_mapping[token];
      if (slot < 0) continue;
      const int64_t block = slot / page * layer.kv_heads + head, at = slot % page;
      const Stored *key = static_cast<const Stored *>(call.key) + token * call.key_token + head * call.key_head;
      Stored *keys = static_cast<Stored *>(layer.keys) + block * key_block + at * T::kPair;
      for (int64_t step = 0; step < layer.key_dim / T::kPair; ++step)
        std::memcpy(keys + step * page * T::kPair, key + step * T::kPair, sizeof(Stored) * T::kPair);
      if (layer.key_dim % T::kPair) {
        Stored *pair = keys + (key_steps - 1) * page * T::kPair;
        pair[0] = key[layer.key_dim - 1];
        pair[1] = 0;
      }
      const Stored *value = static_cast<const Stored *>(call.value) + token * call.value_token + head * call.value_head;
      Stored *values = static_cast<Stored *>(layer.values) + block * value_block +
                       at / value_pair * layer.value_dim * value_pair + at % value_pair;
      if (value_pair == 1)
        std::memcpy(values, value, layer.value_dim * sizeof(Stored));
      else
        for (int64_t i = 0; i < layer.value_dim; ++i) values[i * 2] = value[i];
    }
  }

  // -- attending

  void pack_queries(const Tile &tile, int64_t kv_head, Weight *to) const {
    for (int64_t t = 0; t < tile.count; ++t)
      for (int64_t g = 0; g < per_kv_head; ++g, to += query_steps) {
        const Stored *query = static_cast<const Stored *>(call.query) + (tile.first + t) * call.query_token +
                              (kv_head * per_kv_head + g) * call.query_head;
        for (int64_t step = layer.key_dim / T::kPair; step < query_steps; ++step) to[step] = Weight{};
        if (sizeof(Weight) == sizeof(Stored) * T::kPair)
          std::memcpy(to, query, layer.key_dim * sizeof(Stored));
        else
          for (int64_t i = 0; i < layer.key_dim; ++i) T::pack(to, i, T::widen(query[i]));
      }
  }

  // How many distances a tile's tokens tell apart: none is as far from another as there are tokens.
  int64_t distances_of(const Tile &tile) const { return std::min(call.distances, tile.context + tile.count); }

  // The biases of a group of tokens as one vector: the distance falls where the position rises. Before the farthest stand
  // as many of it as a vector has lanes, and behind the nearest as many of that, for tokens that nobody sees.
  void arrange_biases(const Tile &tile, int64_t kv_head, float *to) const {
    const int64_t distances = distances_of(tile);
    for (int64_t g = 0; g < per_kv_head; ++g, to += bias_width) {
      const float *from = call.bias + (kv_head * per_kv_head + g) * call.distances;
      for (int64_t i = 0; i < bias_width; ++i)
        to[i] = from[std::min(std::max<int64_t>(kLanes + distances - 1 - i, 0), distances - 1)] * kLog2E;
    }
  }

  // A block of a row's tokens: where its groups lie. Groups before `first` and from `last` on are not read.
  struct Block {
    int64_t begin, end;  // positions
    int first, last;
    const void *keys[kGroups], *values[kGroups];
  };

  Block locate(const Tile &tile, int64_t kv_head, int64_t begin, int64_t end, const Scratch &s) const {
    const int64_t page = layer.page_size;
    const int32_t *table = plan.block_tables + tile.row * plan.table_stride;
    Block block;
    block.begin = begin;
    block.end = end;
    block.first = int((std::max(begin, first_visible(tile.context)) - begin) / kLanes);
    block.last = int((end - begin + kLanes - 1) / kLanes);
    for (int i = 0; i < kGroups; ++i) {
      const int g = std::min(std::max(i, block.first), block.last - 1);  // the others may be fetched, so they exist
      if (direct) {
        const int64_t position = begin + g * kLanes, at = position % page;
        const int64_t physical = table[position / page] * layer.kv_heads + kv_head;
        block.keys[i] = static_cast<const Stored *>(layer.keys) + physical * key_block + at * T::kPair;
        block.values[i] = static_cast<const Stored *>(layer.values) + physical * value_block + at * layer.value_dim;
      } else {
        block.keys[i] = s.keys + g * kLanes * T::kPair;
        block.values[i] = s.values + g * kLanes * layer.value_dim;
      }
    }
    return block;
  }

  // Brings a block's tokens from pages that do not hold whole groups into the order of one page of 128.
  void gather(const Tile &tile, int64_t kv_head, const Block &where, const Scratch &s) const {
    const int64_t page = layer.page_size, begin = where.begin;
    const int32_t *table = plan.block_tables + tile.row * plan.table_stride;
    for (int64_t position = begin + where.first * kLanes; position < where.end; ++position) {
      const int64_t block = table[position / page] * layer.kv_heads + kv_head, at = position % page;
      const int64_t to = position - begin;
      const Stored *key = static_cast<const Stored *>(layer.keys) + block * key_block + at * T::kPair;
      Stored *keys = s.keys + to * T::kPair;
      for (int64_t step = 0; step < key_steps; ++step)
        std::memcpy(keys + step * kBlock * T::kPair, key + step * page * T::kPair, sizeof(Stored) * T::kPair);
      const Stored *value = static_cast<const Stored *>(layer.values) + block * value_block +
                            at / value_pair * layer.value_dim * value_pair + at % value_pair;
      Stored *values = s.values + to / T::kPair * layer.value_dim * T::kPair + to % T::kPair;
      if (T::kPair == 1)
        std::memcpy(values, value, layer.value_dim * sizeof(Stored));
      else
        for (int64_t i = 0; i < layer.value_dim; ++i) values[i * T::kPair] = value[i * value_pair];
    }
  }

  // As many of a tile's (token, head) rows as the inner loops take at once, against one block.
  struct Chunk {
    int64_t row;  // the first of them
    int rows;
    int64_t context, per_kv_head;  // of the tile
    const int32_t *reach;          // of the tile's tokens, or null
    int64_t distances;             // of the tile, where there is a bias
    int first, last;               // groups of the block that some row sees
    float correction[kChunkRows];  // what the sums so far are multiplied by
    int64_t token(int r) const { return (row + r) / per_kv_head; }
    int64_t position(int r) const { return context + token(r); }
    int64_t limit(int r) const { return reach ? reach[token(r)] : position(r) + 1; }
  };

  // Scores become weights 2^(score - maximum); updates the maximum and the total of each of the rows. `Whole` is the
  // same for a block without masks, in fewer instructions.
  template <bool Whole>
  __attribute__((noinline)) void softmax(const Block &block, Chunk &chunk, const Scratch &s) const {
    const int first = Whole ? 0 : chunk.first, last = Whole ? kGroups : chunk.last;
    float *maxima = s.running.maximum + chunk.row, *totals = s.running.total + chunk.row * kLanes;
    alignas(64) float reference[16] = {}, before[16] = {}, correction[16];
    for (int r = 0; r < chunk.rows; ++r) {
      float *row = s.scores + r * kBlock;
      if (!Whole && call.bias)
        hide<true>(block, chunk, r, row, s.biases + (chunk.row + r) % per_kv_head * bias_width);
      else if (!Whole)
        hide<false>(block, chunk, r, row, nullptr);
      Vec highest = splat(-kInfinity);
#pragma GCC unroll 8
      for (int g = first; g < last; ++g) highest = maximum(highest, load<Vec>(row + g * kLanes));
      const float block_maximum = lanes_max(highest) * score_scale;
      before[r] = maxima[r];
      maxima[r] = before[r] > block_maximum ? before[r] : block_maximum;
      reference[r] = maxima[r] == -kInfinity ? 0.0f : maxima[r];
    }
    for (int r = 0; r < chunk.rows; r += kLanes)
      store(correction + r, exp2_nonpositive(load<Vec>(before + r) - load<Vec>(reference + r)));
    for (int r = 0; r < chunk.rows; ++r) {
      const float *row = s.scores + r * kBlock;
      Weight *weights = s.weights + r * (kBlock / T::kPair);
      Vec sum[4] = {};
#pragma GCC unroll 8
      for (int g = first; g < last; ++g) {
        const Vec weight = exp2_nonpositive<T::kCoarse>(load<Vec>(row + g * kLanes) * score_scale - reference[r]);
        T::pack_vector(weights + g * (kLanes / T::kPair), weight);
        sum[g % 4] = sum[g % 4] + weight;
      }
      const Vec total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      store(totals + r * kLanes, load<Vec>(totals + r * kLanes) * correction[r] + total);
      chunk.correction[r] = correction[r];
    }
  }

  // Caps the scores of a row, adds its head's biases to them if there are any, and those of the tokens that it must not
  // see become -inf.
  template <bool Biased>
  __attribute__((noinline)) void hide(const Block &block, const Chunk &chunk, int r, float *row,
                                      const float *biases) const {
    const int64_t until = chunk.limit(r) - block.begin;
    const int64_t from = layer.window ? chunk.position(r) + 1 - layer.window - block.begin : 0;
    const int high = int(std::min<int64_t>(until, kBlock));
    const int low = int(std::min<int64_t>(std::max<int64_t>(from, 0), kBlock));
    const float cap = float(layer.soft_cap), scale = float(layer.scaling * 1.44269504088896340736);
    const int64_t nearest = kLanes + chunk.distances - 1, at = nearest - chunk.position(r) + block.begin;
    for (int g = chunk.first; g < chunk.last; ++g) {
      const Ints token = iota() + g * kLanes;
      Vec x = load<Vec>(row + g * kLanes);
      if (Biased) {
        if (cap != 0) x = tanh_of(x * tanh_scale);
        const Vec bias = load<Vec>(biases + std::min(std::max<int64_t>(at + g * kLanes, 0), nearest + 1));
        x = fused(x, splat(cap != 0 ? cap * kLog2E : scale), bias);
      } else if (cap != 0) {
        x = tanh_of(x * tanh_scale) * (cap * kLog2E);
      }
      store(row + g * kLanes, (token < high) & (token >= low) ? x : splat(-kInfinity));
    }
  }

  // One block against all of a tile's (token, head) rows; `next` is the block after it, or the same again.
  void attend_block(const Tile &tile, int64_t kv_head, const Block &block, const Block &next, const Scratch &s,
                    int &configured) const {
    if (!direct) gather(tile, kv_head, block, s);
    const int64_t at_once = tiled ? kChunkRows : kMaxRows;
    const int64_t rows = tile.count * per_kv_head, chunks = (rows + at_once - 1) / at_once;
    ValueTiles values = {};
    if (tiled) values = arrange_tiles(block, s);
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t row = tiled ? i * at_once : rows * i / chunks;
      const int count = int((tiled ? std::min(rows, row + at_once) : rows * (i + 1) / chunks) - row);
      Chunk chunk = {row, count, tile.context, per_kv_head, reach ? reach + tile.first : nullptr,
                     distances_of(tile), block.first, block.last, {}};
      const int64_t lowest = chunk.limit(0), highest = chunk.limit(chunk.rows - 1);
      const int64_t first_seen = chunk.position(0) + 1 - layer.window;  // with a window
      if (highest <= block.begin || (layer.window && first_seen >= block.begin + kBlock)) continue;
      chunk.last = int(std::min<int64_t>(block.last, (highest - block.begin + kLanes - 1) / kLanes));
      if (tiled) {
        chunk.first = chunk.first / 2 * 2;
        chunk.last = (chunk.last + 1) / 2 * 2;
        configure(count, configured);
        multiply_keys_by_tiles(block, chunk, i == 0, s);
      } else {
        multiply_keys(block, chunk, i == 0, s);
      }
      const bool all_see_all =
          lowest >= block.begin + kBlock &&
          (!layer.window || chunk.position(chunk.rows - 1) + 1 - layer.window <= block.begin);
      if (all_see_all && layer.soft_cap == 0 && !call.bias)
        softmax<true>(block, chunk, s);
      else
        softmax<false>(block, chunk, s);
      if (tiled) {
        multiply_values_by_tiles(values, next, chunk, i == 0, s);
        continue;
      }
      const int64_t in_last = highest - block.begin - (chunk.last - 1) * kLanes;
      multiply_values(block, next, chunk, int(std::min<int64_t>(in_last, kLanes)), i == 0, s);
    }
  }

  void multiply_keys(const Block &block, const Chunk &chunk, bool fetch, const Scratch &s) const {
    const int64_t stride = (direct ? layer.page_size : kBlock) * T::kPair;
    const int64_t fetch_stride = fetch ? layer.value_dim * kLanes * int64_t(sizeof(Stored)) / key_steps : 0;
    for (int g = chunk.first; g < chunk.last;) {
      const bool wide = g + kMaxCols <= chunk.last;
      loops<T>.keys[chunk.rows][wide](s.queries + chunk.row * query_steps, query_steps, block.keys + g, stride,
                                      key_steps, s.scores + g * kLanes, {block.values + g, 0, fetch_stride, 0});
      g += wide ? kMaxCols : 1;
    }
  }

  void multiply_values(const Block &block, const Block &next, const Chunk &chunk, int last_tokens, bool fetch,
                       const Scratch &s) const {
    constexpr int64_t kSteps = kLanes / T::kPair, kWide = kMaxCols * kLanes;
    const int64_t passes = sum_width / kWide + sum_width % kWide / kLanes;
    const int lines = fetch ? int((key_steps + passes * kSteps - 1) / (passes * kSteps)) : 0;
    Ahead ahead = {next.keys + chunk.first, 0, layer.page_size * T::kPair * int64_t(sizeof(Stored)), lines};
    for (int64_t v = 0; v < sum_width;) {
      const bool wide = v + kWide <= sum_width;
      loops<T>.values[chunk.rows][wide](s.weights + chunk.first * kSteps, block.values + chunk.first, v * T::kPair,
                                        layer.value_dim * T::kPair, chunk.last - chunk.first, last_tokens,
                                        chunk.correction, s.running.sums + chunk.row * sum_width + v, sum_width, ahead);
      v += wide ? kWide : kLanes;
      ahead.offset += kSteps * lines * ahead.stride;
    }
  }

  // -- by tiles, of 16 steps of keys or of 32 tokens' values

  struct ValueTiles {
    const Stored *at[kBlock / (2 * kTile)];
  };

#if HAS_TILES
  static void configure(int rows, int &configured) {
    if (rows != configured) configure_tiles(rows);
    configured = rows;
  }

  // Copies, beside zeros, what does not make a whole tile where it lies: a key's last steps; values on two pages, or of
  // tokens that were never written, which may be NaN.
  ValueTiles arrange_tiles(const Block &block, const Scratch &s) const {
    if constexpr (!std::is_same<T, BFloat16>::value) return {};
    const int64_t whole = key_steps / kTile, left = key_steps % kTile;
    const int64_t key_stride = (direct ? layer.page_size : kBlock) * T::kPair;
    for (int g = block.first; left && g < (block.last + 1) / 2 * 2; ++g) {  // tiles take groups in pairs
      const Stored *from = static_cast<const Stored *>(block.keys[g]) + whole * kTile * key_stride;
      Stored *to = s.key_ends + g * kLanes * kTile * T::kPair;
      std::memset(to, 0, kLanes * kTile * T::kPair * sizeof(Stored));
      for (int64_t step = 0; step < left; ++step)
        std::memcpy(to + step * kLanes * T::kPair, from + step * key_stride, kLanes * T::kPair * sizeof(Stored));
    }
    ValueTiles tiles;
    const int64_t group_values = kLanes * layer.value_dim;
    for (int g = block.first / 2 * 2; g < block.last; g += 2) {
      tiles.at[g / 2] = static_cast<const Stored *>(block.values[g]);
      if (g >= block.first && block.end - block.begin >= (g + 2) * kLanes && layer.page_size % (2 * kLanes) == 0)
        continue;
      Stored *to = s.value_tiles + g * group_values;
      tiles.at[g / 2] = to;
      for (int part = g; part < g + 2; ++part, to += group_values) {
        const bool read = part >= block.first && part < block.last;
        const int64_t tokens = read ? std::min<int64_t>(block.end - block.begin - part * kLanes, kLanes) : 0;
        const Stored *from = static_cast<const Stored *>(block.values[part]);
        const int64_t count = tokens / T::kPair * T::kPair * layer.value_dim;
        std::memcpy(to, from, size_t(count) * sizeof(Stored));
        std::memset(to + count, 0, size_t(group_values - count) * sizeof(Stored));
        if (tokens % T::kPair)
          for (int64_t i = count; i < count + T::kPair * layer.value_dim; i += T::kPair) to[i] = from[i];
      }
    }
    return tiles;
  }

  void multiply_keys_by_tiles(const Block &block, const Chunk &chunk, bool fetch, const Scratch &s) const {
    if constexpr (std::is_same<T, BFloat16>::value) {
      const int64_t whole = key_steps / kTile, stride = (direct ? layer.page_size : kBlock) * T::kPair * sizeof(Stored);
      const int64_t lines = fetch ? layer.value_dim * kLanes * int64_t(sizeof(Stored)) / 64 : 0;
      const uint32_t *queries = s.queries + chunk.row * query_steps;
      for (int g = chunk.first / 4 * 4; g < chunk.last; g += 4) {
        TileOperands runs[] = {{queries, query_steps, {}, stride, whole},
                               {queries + whole * kTile, query_steps, {}, 4 * kTile, 1}};
        const char *values[4];
        for (int c = 0; c < 4; ++c) {
          const int group = std::min(std::max(g + c, chunk.first), chunk.last - 1);
          runs[0].lanes[c] = static_cast<const Stored *>(block.keys[group]);
          runs[1].lanes[c] = s.key_ends + std::max(group, block.first) * kTileNumbers;
          values[c] = static_cast<const char *>(block.values[group]);
        }
        float *to = s.scores + g * kLanes;
        const int64_t each = whole ? (lines + whole - 1) / whole : 0;
        multiply_flat(runs, key_steps % kTile ? 2 : 1, {to, to + kLanes, to + 2 * kLanes, to + 3 * kLanes}, kBlock, false,
                      [&](int c, const uint16_t *) {
                        for (int64_t i = 0; i < each; ++i, values[c] += 64) prefetch(values[c]);
                      });
      }
    }
  }

  void multiply_values_by_tiles(const ValueTiles &values, const Block &next, const Chunk &chunk, bool fetch,
                                const Scratch &s) const {
    if constexpr (std::is_same<T, BFloat16>::value) {
      float *sums = s.running.sums + chunk.row * sum_width;
      for (int r = 0; r < chunk.rows; ++r)
        for (int64_t i = 0; chunk.correction[r] != 1.0f && i < sum_width; i += kLanes)
          store(sums + r * sum_width + i, load<Vec>(sums + r * sum_width + i) * chunk.correction[r]);
      const int64_t passes = (sum_width + 4 * kLanes - 1) / (4 * kLanes), parts = 2 * passes;
      const int64_t lines = fetch ? (key_steps + parts - 1) / parts : 0;
      const int64_t stride = layer.page_size * T::kPair * sizeof(Stored);
      for (int64_t pass = 0; pass < passes; ++pass) {
        TileOperands runs[kGroups / 2];
        float *to[4];
        int count = 0;
        for (int tile = chunk.first / 2; tile < chunk.last / 2; ++tile) {
          TileOperands &run = runs[count++];
          run = {s.weights + tile * kTile, kBlock / T::kPair, {}, layer.value_dim * 4, 1};
          for (int64_t c = 0; c < 4; ++c) {  // the last ones again in the place of those that there are not
            const int64_t at = std::min((pass * 4 + c) * kLanes, sum_width - kLanes);
            run.lanes[c] = values.at[tile] + at * T::kPair;
            to[c] = sums + at;
          }
        }
        int group = chunk.first;
        multiply_flat(runs, count, to, sum_width, true, [&](int c, const uint16_t *) {
          const char *from = static_cast<const char *>(next.keys[group + c % 2]) + (2 * pass + c / 2) * lines * stride;
          for (int64_t i = 0; i < lines; ++i) prefetch(from + i * stride);
          if (c == 3) group += 2;
        });
      }
    }
  }
#else
  static void configure(int, int &) {}
  ValueTiles arrange_tiles(const Block &, const Scratch &) const { return {}; }
  void multiply_keys_by_tiles(const Block &, const Chunk &, bool, const Scratch &) const {}
  void multiply_values_by_tiles(const ValueTiles &, const Block &, const Chunk &, bool, const Scratch &) const {}
#endif

  static void clear(const State &state, int64_t rows, int64_t totals, int64_t sum_width) {
    std::fill_n(state.maximum, rows, -kInfinity);
    std::fill_n(state.total, rows * totals, 0.0f);
    std::fill_n(state.sums, rows * sum_width, 0.0f);
  }

  // into += part, both over disjoint tokens, the ones of `part` later.
  __attribute__((noinline)) static void fold(float &into_maximum, float &into_total, float *into_sums, float maximum,
                                             float total, const float *sums, int64_t sum_width) {
    if (maximum == -kInfinity && total == 0) return;  // saw none of its tokens
    const float now = into_maximum > maximum ? into_maximum : maximum;
    const float keep = exp2_nonpositive(into_maximum - now), add = exp2_nonpositive(maximum - now);
    into_maximum = now;
    into_total = into_total * keep + total * add;
    for (int64_t i = 0; i < sum_width; i += kLanes)
      store(into_sums + i, load<Vec>(into_sums + i) * keep + load<Vec>(sums + i) * add);
  }

  void finish(const Tile &tile, int64_t kv_head, const State &state) const {
    for (int64_t r = 0; r < tile.count * per_kv_head; ++r) {
      const int64_t token = tile.first + r / per_kv_head, head = kv_head * per_kv_head + r % per_kv_head;
      float maximum = state.maximum[r], total = state.total[r], factor = 1.0f;
      if (call.sinks) {  // one more logit, whose value is zero
        const float sink = call.sinks[head] * kLog2E, now = maximum > sink ? maximum : sink;
        factor = exp2_nonpositive(maximum - now);
        total = total * factor + exp2_nonpositive(sink - now);
      }
      factor /= total;
      Stored *output = static_cast<Stored *>(call.output) + (token * layer.heads + head) * layer.value_dim;
      narrow_row<T>(output, state.sums + r * sum_width, layer.value_dim, factor);
    }
  }

  float *partial(const Tile &tile, int64_t kv_head, int64_t split) const {
    const int64_t row = tile.partials + (split - tile.split) * tile.count * per_kv_head;
    return partials + kv_head * partial_floats + row * (sum_width + kLanes);
  }

  // The first block that an item reads.
  Block first_block(int64_t item, const Scratch &s) const {
    const Unit &unit = units[item / layer.kv_heads];
    const Tile &tile = tiles[unit.tile];
    const int64_t first = std::max(unit.split * kSplit, first_visible(tile.context) / kBlock * kBlock);
    return locate(tile, item % layer.kv_heads, first, std::min(first + kBlock, tile.limit), s);
  }

  // Keys of the groups that have none beside them in the block before; values are fetched beside keys.
  void fetch_keys(const Block &block, int from) const {
    const int64_t stride = layer.page_size * T::kPair * int64_t(sizeof(Stored));
    for (int g = std::max(from, block.first); direct && g < block.last; ++g)
      for (int64_t step = 0; step < key_steps; ++step)
        prefetch(static_cast<const char *>(block.keys[g]) + step * stride);
  }

  // `after` is the item that this thread does next: its first keys are fetched beside the last values of this one.
  void attend(int64_t item, int64_t after, const Scratch &s) const {
    const Unit &unit = units[item / layer.kv_heads];
    const int64_t kv_head = item % layer.kv_heads;
    const Tile &tile = tiles[unit.tile];
    const int64_t rows = tile.count * per_kv_head, limit = tile.limit;
    const bool whole = !split_units && unit.splits == 1;  // there is nothing to fold it into
    int configured = 0;
    pack_queries(tile, kv_head, s.queries);
    if (call.bias) arrange_biases(tile, kv_head, s.biases);
    if (!split_units && !whole) clear(s.total, rows, 1, sum_width);
    for (int64_t split = unit.split; split < unit.split + unit.splits; ++split) {
      clear(s.running, rows, kLanes, sum_width);
      const int64_t first = std::max(split * kSplit, first_visible(tile.context) / kBlock * kBlock);
      const int64_t last = std::min((split + 1) * kSplit, limit);
      Block block = locate(tile, kv_head, first, std::min(first + kBlock, last), s);
      for (int64_t begin = first; begin < last; begin += kBlock) {
        const bool leaves = after != item && begin + kBlock >= last && split + 1 == unit.split + unit.splits;
        const int64_t next_begin = begin + kBlock < limit ? begin + kBlock : begin;
        const Block next = leaves ? first_block(after, s)
                                  : locate(tile, kv_head, next_begin, std::min(next_begin + kBlock, limit), s);
        attend_block(tile, kv_head, block, next, s, configured);
        if (leaves) fetch_keys(next, block.last);
        block = next;
      }
      if (split_units) {
        float *to = partial(tile, kv_head, split);
        for (int64_t r = 0; r < rows; ++r, to += sum_width + kLanes) {
          std::memcpy(to, s.running.sums + r * sum_width, sum_width * 4);
          to[sum_width] = s.running.maximum[r];
          to[sum_width + 1] = lanes_sum(load<Vec>(s.running.total + r * kLanes));
        }
      } else if (whole) {
        for (int64_t r = 0; r < rows; ++r) s.total.total[r] = lanes_sum(load<Vec>(s.running.total + r * kLanes));
      } else {
        for (int64_t r = 0; r < rows; ++r)
          fold(s.total.maximum[r], s.total.total[r], s.total.sums + r * sum_width, s.running.maximum[r],
               lanes_sum(load<Vec>(s.running.total + r * kLanes)), s.running.sums + r * sum_width, sum_width);
      }
    }
    if (!split_units) finish(tile, kv_head, whole ? State{s.running.maximum, s.total.total, s.running.sums} : s.total);
  }

  void merge(int64_t item, const Scratch &s) const {
    const Tile &tile = tiles[item / layer.kv_heads];
    const int64_t kv_head = item % layer.kv_heads, rows = tile.count * per_kv_head;
    clear(s.total, rows, 1, sum_width);
    for (int64_t split = tile.split; split < tile.split + tile.splits; ++split) {
      const float *from = partial(tile, kv_head, split);
      for (int64_t r = 0; r < rows; ++r, from += sum_width + kLanes)
        fold(s.total.maximum[r], s.total.total[r], s.total.sums + r * sum_width, from[sum_width], from[sum_width + 1],
             from, sum_width);
    }
    finish(tile, kv_head, s.total);
  }

  void work() {
    const Scratch s = layout(scratch + scratch_bytes * omp_get_thread_num());
    const int64_t writes = (plan.tokens + kWriteTokens - 1) / kWriteTokens * layer.kv_heads;
    const int64_t attends = int64_t(units.size()) * layer.kv_heads;
    writing.run(writes, [&](int64_t i) { write(i); });
    writing.wait(writes);
    attending.run_in_sight(attends, [&](int64_t i, int64_t after) { attend(i, after, s); });
    if (!split_units) return;
    attending.wait(attends);
    merging.run(int64_t(tiles.size()) * layer.kv_heads, [&](int64_t i) { merge(i, s); });
  }

  // Until all threads' output is there.
  void wait() const {
    if (split_units)
      merging.wait(int64_t(tiles.size()) * layer.kv_heads);
    else
      attending.wait(int64_t(units.size()) * layer.kv_heads);
  }
};

template <class T>
int run(const Layer &layer, const Plan &plan, const Call &call) {
  static thread_local Buffer scratch, partials;
  static thread_local std::vector<Tile> tiles;
  static thread_local std::vector<Unit> units;
  Step<T> step(layer, plan, call, tiles, units);
  step.measure();
  step.use(scratch.at_least(size_t(step.scratch_bytes * plan.threads)), partials.at_least(size_t(step.partial_bytes())));
  if (!step.scratch || (step.split_units && !step.partials)) return 1;
  GOMP_parallel(
      [](void *data) {
        static_cast<Step<T> *>(data)->work();
        release_tiles();
      },
      &step, unsigned(plan.threads), 0);
  return 0;
}

}  // namespace

// Returns 0, or 1 when there is no memory for scratch space, which the calling thread keeps for its next call.
extern "C" int paged_attention(const Layer *layer, const Plan *plan, const Call *call) {
  switch (layer->dtype) {
#if HAS_DTYPE(0)
    case 0:
      return run<Float32>(*layer, *plan, *call);
#endif
#if HAS_DTYPE(1)
    case 1:
      return run<BFloat16>(*layer, *plan, *call);
#endif
#if HAS_DTYPE(2)
    case 2:
      return run<Float16>(*layer, *plan, *call);
#endif
  }
  return 1;
}

// Asks for huge pages, where the system has them: the pages of a KV cache are read in long runs.
extern "C" void paged_attention_advise(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (uintptr_t(start) + page - 1) / page * page, last = (uintptr_t(start) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}
