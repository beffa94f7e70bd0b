// What recurrent layers compute between their matrix products, on the CPU: the gated delta rule, selective scans and
// short convolutions, each over B sequences x T tokens from a state. Plain C ABI, compiled on first use by scans.py.
//
//     delta_rule      Gated DeltaNet (Yang et al., 2024); with a decay for each key channel Kimi Delta Attention (2025)
//     selective_scan  Mamba (Gu & Dao, 2023), and with one decay for each head Mamba-2 (Dao & Gu, 2024)
//     convolution     of each channel by itself over the tokens before, and its update behind a state
//
// Tokens are taken one after the other, which needs no more arithmetic than chunks of them (the products among the
// tokens of a chunk cost about what they save), since a thread's slice of a state stays in the nearest cache for all T:
// some columns of one head's state, or some rows, which know nothing of the others. A token gets the same bits alone
// or among others, whatever B, T and the number of threads are: each number comes of the same operations in the same
// order. For that, products are added by fused() and nothing else is contracted (-ffp-contract=off).
//
// All arithmetic is in float32. Inputs are widened as they are read, row by row, and outputs rounded once.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

// The entry points of torch's own OpenMP runtime, called directly: a second runtime would bring a second thread pool.
extern "C" {
#if defined(SCANS_SERIAL)
static void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }
static int omp_get_thread_num() { return 0; }
#else
void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
int omp_get_thread_num();
#endif
}

// The structures below are mirrored in scans.py.
extern "C" {
struct Tensor {
  char *data;
  int64_t dtype;      // 0 float32, 1 bfloat16, 2 float16
  int64_t stride[4];  // in elements
};

struct DeltaRule {
  Tensor query, key;  // (batch, tokens, key heads, key dim)
  Tensor value;       // (batch, tokens, heads, value dim)
  Tensor decay;       // (batch, tokens, heads, key dim or 1) its logarithm
  Tensor beta;        // (batch, tokens, heads, 1)
  Tensor output;      // (batch, tokens, heads, value dim)
  float *state;       // (batch, heads, key dim, value dim) before the tokens, and behind them afterwards
  int64_t state_batch;
  int64_t batch, tokens, key_heads, heads, key_dim, value_dim;
  int64_t fresh;        // nothing came before: the state is not read
  int64_t per_channel;  // the decay is
  int64_t normalise;    // queries and keys are given a length of 1
  int64_t threads;
  double scale;  // of the queries
};

struct SelectiveScan {
  Tensor input;   // (batch, tokens, heads, dim)
  Tensor step;    // (batch, tokens, heads, dim or 1) the time that passes, before bias and softplus
  Tensor b, c;    // (batch, tokens, groups, state dim)
  Tensor gate;    // as the input, or null
  Tensor output;  // as the input
  const float *a;     // (heads, dim, state dim), or (heads) with one step for each head
  const float *skip;  // (heads, dim) or (heads), or null
  const float *bias;  // the same, of the step
  float *state;       // (batch, heads, dim, state dim) before the tokens, and behind them afterwards
  int64_t state_batch;
  int64_t batch, tokens, groups, heads, dim, state_dim;
  int64_t fresh;
  int64_t per_head;  // step, a, skip and bias are
  int64_t softplus;
  int64_t threads;
  double least, most;  // of the step
};

struct Convolution {
  Tensor input;   // (batch, tokens, channels)
  Tensor weight;  // (channels, taps)
  Tensor bias;    // (channels), or null
  Tensor output;  // (batch, tokens, channels)
  char *state;    // (batch, channels, kept) of the input's dtype, with the token behind it afterwards; null: none
  int64_t state_batch;
  int64_t kept;
  int64_t batch, tokens, channels, taps;
  int64_t silu;
  int64_t threads;
};
}

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kCols = 2;  // of accumulators that the registers have room for, three times
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kCols = 4;
#else
constexpr int kVectorBytes = 16, kCols = 4;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kMaxTaps = 16;
constexpr int kChannels = 64;     // of a convolution, at once
constexpr int kTokens = 32;       // the same
constexpr int kRowFloats = 4096;  // of a scan's state, at once: half of the nearest cache
constexpr int kMaxRows = 64;
constexpr int kPiece = 16;    // tokens of a scan whose inputs are widened at once
constexpr int kTokensAhead = 3;
constexpr int kAhead = 4096;  // numbers of a state from what is read to what is fetched meanwhile
constexpr int64_t kWorkPerThread = 16384;  // vectors of arithmetic that are worth waking another thread

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

template <class To>
inline To load(const void *from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
inline Vec loaded(const float *from) { return load<Vec>(from); }
inline void store(float *to, Vec from) { std::memcpy(to, &from, sizeof from); }
inline Vec splat(float x) {  // not as Vec{} + x, which is an addition: it turns -0 into 0
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}
inline int64_t whole(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
inline Vec some(const float *from, int64_t count) {  // no more than there are
  if (count >= kLanes) return loaded(from);
  Vec to = {};
  std::memcpy(&to, from, size_t(count) * 4);
  return to;
}

// a * b + c, rounded once where the processor can.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  Vec to;
  for (int i = 0; i < kLanes; ++i) to[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return to;
#else
  return a * b + c;
#endif
}

// The sum across lanes of each of four vectors: to[i] of from[i].
inline void sums_of_four(const Vec *from, float *to) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  __m256 half[4];
  for (int i = 0; i < 4; ++i)
    half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)from[i]),
                            _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)from[i]), 1)));
#else
  const __m256 half[4] = {(__m256)from[0], (__m256)from[1], (__m256)from[2], (__m256)from[3]};
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = (from[i][0] + from[i][1]) + (from[i][2] + from[i][3]);
#endif
}
inline float sum_of(Vec v) {
  const Vec four[4] = {v};
  float sums[4];
  sums_of_four(four, sums);
  return sums[0];
}

// e^x, exact 0 below what a float32 can be without loss, and no infinity above; relative error below 2e-7. NaN stays.
inline Vec exp_of(Vec x) {
  const Vec least = splat(-87.0f), most = splat(88.0f);
  Vec clamped = x < least ? least : x;
  clamped = clamped > most ? most : clamped;
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = fused(clamped, splat(1.44269504088896340736f), shifter), n = shifted - shifter;
  Vec f = fused(n, splat(-0.693145751953125f), clamped);  // ln 2, in two parts
  f = fused(n, splat(-1.42860682030941723212e-6f), f);
  Vec p = splat(1.0f / 5040);
  p = fused(p, f, splat(1.0f / 720));
  p = fused(p, f, splat(1.0f / 120));
  p = fused(p, f, splat(1.0f / 24));
  p = fused(p, f, splat(1.0f / 6));
  p = fused(p, f, splat(0.5f));
  p = fused(p, f, splat(1.0f));
  p = fused(p, f, splat(1.0f));
  const Vec scaled = (Vec)((Ints)p + (((Ints)shifted - (Ints)shifter) << 23));
  return x < least ? splat(0.0f) : scaled;
}
inline float exp_of(float x) { return exp_of(splat(x))[0]; }

inline Vec silu_of(Vec x) { return x / (1.0f + exp_of(-x)); }

// log(1 + e^x) as max(x, 0) + log(1 + e^-|x|), and log(1 + e) = 2 artanh(e / (2 + e)), where the quotient is below 1/3.
inline Vec softplus_of(Vec x) {
  const Vec e = exp_of(x > 0.0f ? -x : x), s = e / (2.0f + e), s2 = s * s;
  Vec p = splat(2.0f / 17);
  p = fused(p, s2, splat(2.0f / 15));
  p = fused(p, s2, splat(2.0f / 13));
  p = fused(p, s2, splat(2.0f / 11));
  p = fused(p, s2, splat(2.0f / 9));
  p = fused(p, s2, splat(2.0f / 7));
  p = fused(p, s2, splat(2.0f / 5));
  p = fused(p, s2, splat(2.0f / 3));
  p = fused(p, s2, splat(2.0f));
  return fused(s, p, x < 0.0f ? splat(0.0f) : x);
}

// ---- rows of numbers as they are stored ----------------------------------------------------------------------------

struct Float32 {
  typedef uint32_t Stored;
  static Vec widen(const char *p) { return load<Vec>(p); }
  static float widen_one(const char *p) { return load<float>(p); }
  static void narrow(char *p, Vec x) { std::memcpy(p, &x, sizeof x); }
  static void narrow_one(char *p, float x) { std::memcpy(p, &x, sizeof x); }
};

struct BFloat16 {
  typedef uint16_t Stored;
  static Vec widen(const char *p) { return (Vec)(__builtin_convertvector(load<Shorts>(p), Words) << 16); }
  static float widen_one(const char *p) {
    const uint32_t bits = uint32_t(load<Stored>(p)) << 16;
    return load<float>(&bits);
  }
  static void narrow(char *p, Vec x) {
    const Words bits = (Words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words stays = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
    const Shorts shorts = __builtin_convertvector(stays, Shorts);
    std::memcpy(p, &shorts, sizeof shorts);
  }
  static void narrow_one(char *p, float x) {
    const uint32_t bits = load<uint32_t>(&x);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const Stored to = Stored(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(p, &to, sizeof to);
  }
};

struct Float16 {
  typedef uint16_t Stored;
  static Vec widen(const char *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(load<__m128i>(p));
#else
    const Words bits = __builtin_convertvector(load<Shorts>(p), Words), magnitude = (bits & 0x7fff) << 13;
    Words scaled = (Words)((Vec)magnitude * 0x1p112f);  // moves the exponent's bias; exact for denormals
    scaled = magnitude >= (0x7c00u << 13) ? scaled | 0x7f800000u : scaled;
    return (Vec)(scaled | (bits & 0x8000) << 16);
#endif
  }
  static float widen_one(const char *p) {
    Stored lanes[kLanes] = {load<Stored>(p)};
    return widen(reinterpret_cast<const char *>(lanes))[0];
  }
  static void narrow(char *p, Vec x) {
#if defined(__AVX512F__)
    const __m256i to = _mm512_cvtps_ph((__m512)x, 0);
    std::memcpy(p, &to, sizeof to);
#elif defined(__F16C__)
    const __m128i to = _mm256_cvtps_ph((__m256)x, 0);
    std::memcpy(p, &to, sizeof to);
#else
    for (int i = 0; i < kLanes; ++i) narrow_one(p + i * sizeof(Stored), x[i]);
#endif
  }
  static void narrow_one(char *p, float x) {
#if defined(__F16C__)
    const Stored to = Stored(_cvtss_sh(x, 0));
#else
    const uint32_t bits = load<uint32_t>(&x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    Stored to;
    if (magnitude > 0x7f800000) {
      to = Stored(sign | 0x7e00);
    } else if (magnitude >= 0x477ff000) {
      to = Stored(sign | 0x7c00);
    } else if (magnitude < 0x38800000) {  // denormal: let the addition round
      const float shifted = load<float>(&magnitude) + 0.5f;
      to = Stored(sign | (load<uint32_t>(&shifted) - 0x3f000000));
    } else {
      to = Stored(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13));
    }
#endif
    std::memcpy(p, &to, sizeof to);
  }
};

template <class Body>
inline void in_dtype(int64_t dtype, Body body) {
  if (dtype == 0)
    body(Float32());
  else if (dtype == 1)
    body(BFloat16());
  else
    body(Float16());
}

inline const char *at(const Tensor &t, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
  const int64_t element = i * t.stride[0] + j * t.stride[1] + k * t.stride[2] + l * t.stride[3];
  return t.data + element * (t.dtype == 0 ? 4 : 2);
}

// Numbers that lie a stride apart, as float32; up to the next whole vector there are zeros behind them.
template <class T>
inline void widen_in(float *to, const char *from, int64_t count, int64_t stride) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= count; i += kLanes) store(to + i, T::widen(from + i * sizeof(typename T::Stored)));
  for (; i < count; ++i) to[i] = T::widen_one(from + i * stride * sizeof(typename T::Stored));
  for (; i % kLanes; ++i) to[i] = 0.0f;
}
inline void widen(float *to, const Tensor &t, const char *from, int64_t count, int64_t stride) {
  in_dtype(t.dtype, [&](auto type) { widen_in<decltype(type)>(to, from, count, stride); });
}
inline float widen_one(const Tensor &t, const char *from) {
  float one = 0.0f;
  in_dtype(t.dtype, [&](auto type) { one = decltype(type)::widen_one(from); });
  return one;
}
inline void narrow(const Tensor &t, const char *to, const float *from, int64_t count) {  // beside each other
  in_dtype(t.dtype, [&](auto type) {
    typedef decltype(type) T;
    constexpr int size = sizeof(typename T::Stored);
    char *p = const_cast<char *>(to);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) T::narrow(p + i * size, loaded(from + i));
    for (; i < count; ++i) T::narrow_one(p + i * size, from[i]);
  });
}

// Brings nearer what is read soon.
inline void prefetch(const char *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}
inline void prefetch(const Tensor &t, const char *from, int64_t count, int64_t stride) {
  if (stride == 1) prefetch(from, count * (t.dtype == 0 ? 4 : 2));
}

// Numbers of some rows, (count) of each of several tokens, into (tokens, width).
template <class T>
inline void widen_tokens_in(float *to, int64_t width, const char *from, int64_t tokens, int64_t count,
                            int64_t stride) {
  constexpr int64_t some = 8;  // rows, whose tokens lie beside each other: few, as their stride may be a power of two
  for (int64_t first = 0; first < count; first += some)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = first; i < std::min(count, first + some); ++i)
        to[t * width + i] = T::widen_one(from + (i * stride + t) * int64_t(sizeof(typename T::Stored)));
}
inline void widen_tokens(float *to, int64_t width, const Tensor &t, const char *from, int64_t tokens, int64_t count,
                         int64_t token_stride, int64_t stride) {
  if (token_stride == 1 && stride != 1) {
    in_dtype(t.dtype, [&](auto type) { widen_tokens_in<decltype(type)>(to, width, from, tokens, count, stride); });
    return;
  }
  const int64_t step = token_stride * (t.dtype == 0 ? 4 : 2);
  for (int64_t i = 0; i < tokens; ++i) widen(to + i * width, t, from + i * step, count, stride);
}

// ---- threads -------------------------------------------------------------------------------------------------------

// Kept by each thread that calls, for its next call.
class Scratch {
 public:
  ~Scratch() { std::free(memory); }
  float *at_least(size_t floats) {
    if (floats <= size) return memory;
    std::free(memory);
    memory = static_cast<float *>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
    size = memory ? floats : 0;
    return memory;
  }

 private:
  float *memory = nullptr;
  size_t size = 0;
};

// Calls body(task, scratch) for each task, on several threads where that pays; 1 if there is no memory for scratch.
template <class Body>
int spread(int64_t tasks, int64_t work, int64_t most_threads, int64_t floats, const Body &body) {
  if (tasks <= 0) return 0;
  static thread_local Scratch kept;
  const int64_t threads = std::max<int64_t>(1, std::min({most_threads, tasks, tasks * work / kWorkPerThread}));
  floats = (floats + 63) / 64 * 64;
  struct Shared {
    const Body &body;
    std::atomic<int64_t> next;
    int64_t tasks, floats;
    float *scratch;
    void take() {
      float *own = scratch + floats * omp_get_thread_num();
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(i, own);
    }
  } shared{body, {0}, tasks, floats, kept.at_least(size_t(floats * threads))};
  if (!shared.scratch) return 1;
  if (threads == 1)
    for (int64_t i = 0; i < tasks; ++i) body(i, shared.scratch);
  else
    GOMP_parallel([](void *data) { static_cast<Shared *>(data)->take(); }, &shared, unsigned(threads), 0);
  return 0;
}

// ---- the gated delta rule ------------------------------------------------------------------------------------------
//
// With S the state, k and q of a token, v its value, and the decay d of each row:
//
//     delta = beta * (v - (d k) S)        S = d S + k delta        output = q S
//
// The sum over d k for a token is made while the one before writes S, so each token reads and writes S once.

struct TokenRows {
  float *key, *read, *query, *decay;  // (key dim); read is decay * key
};

inline void unit_length(float *row, int64_t count, float scale) {
  Vec squares = {};
  for (int64_t i = 0; i < count; i += kLanes) squares = fused(loaded(row + i), loaded(row + i), squares);
  const float inverse = scale / __builtin_sqrtf(sum_of(squares) + 1e-6f);
  for (int64_t i = 0; i < count; i += kLanes) store(row + i, loaded(row + i) * inverse);
}

inline void prepare(const DeltaRule &call, const TokenRows &rows, int64_t b, int64_t t, int64_t head) {
  const int64_t count = call.key_dim, key_head = head / (call.heads / call.key_heads);
  // A stride of all heads away, which no processor guesses.
  const int64_t later = std::min(call.tokens - 1, t + kTokensAhead);
  prefetch(call.key, at(call.key, b, later, key_head), count, call.key.stride[3]);
  prefetch(call.query, at(call.query, b, later, key_head), count, call.query.stride[3]);
  widen(rows.key, call.key, at(call.key, b, t, key_head), count, call.key.stride[3]);
  widen(rows.query, call.query, at(call.query, b, t, key_head), count, call.query.stride[3]);
  const float scale = float(call.scale);
  if (call.normalise) {
    unit_length(rows.key, count, 1.0f);
    unit_length(rows.query, count, scale);
  } else {
    for (int64_t i = 0; i < count; i += kLanes) store(rows.query + i, loaded(rows.query + i) * scale);
  }
  const char *decay = at(call.decay, b, t, head);
  if (call.per_channel) widen(rows.decay, call.decay, decay, count, call.decay.stride[3]);
  const Vec same = call.per_channel ? Vec{} : exp_of(splat(widen_one(call.decay, decay)));
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec d = call.per_channel ? exp_of(loaded(rows.decay + i)) : same;
    store(rows.decay + i, d);
    store(rows.read + i, d * loaded(rows.key + i));
  }
}

// Some columns of a state, from where they lie into (rows, Cols * kLanes), and what the first token reads of them.
template <int Cols>
inline void begin_columns(const float *from, int64_t stride, float *to, const float *read, int64_t rows, Vec *memory) {
  Vec sum[Cols] = {};
  for (int64_t k = 0; k < rows; ++k) {
    const Vec r = splat(read[k]);
#pragma GCC unroll 4
    for (int c = 0; c < Cols; ++c) {
      const Vec s = loaded(from + k * stride + c * kLanes);
      store(to + k * Cols * kLanes + c * kLanes, s);
      sum[c] = fused(s, r, sum[c]);
    }
  }
  for (int c = 0; c < Cols; ++c) memory[c] = sum[c];
}

// One token: moves the columns on, adds up its output and, where one follows, what that reads.
template <int Cols, bool Follows>
inline void move_columns(const float *from, float *to, int64_t stride, const TokenRows &now, const float *next,
                         int64_t rows, const Vec *delta_of, Vec *output, Vec *memory) {
  Vec delta[Cols], out[Cols] = {}, sum[Cols] = {};
  for (int c = 0; c < Cols; ++c) delta[c] = delta_of[c];
  for (int64_t k = 0; k < rows; ++k) {
    const Vec key = splat(now.key[k]), query = splat(now.query[k]), decay = splat(now.decay[k]);
    const Vec read = splat(Follows ? next[k] : 0.0f);
#pragma GCC unroll 4
    for (int c = 0; c < Cols; ++c) {
      const Vec s = fused(key, delta[c], loaded(from + k * Cols * kLanes + c * kLanes) * decay);
      store(to + k * stride + c * kLanes, s);
      out[c] = fused(s, query, out[c]);
      if (Follows) sum[c] = fused(s, read, sum[c]);
    }
  }
  for (int c = 0; c < Cols; ++c) {
    output[c] = out[c];
    memory[c] = sum[c];
  }
}

template <int Cols>
void delta_columns(const DeltaRule &call, int64_t b, int64_t head, int64_t first, float *scratch) {
  constexpr int width = Cols * kLanes;
  const int64_t rows = call.key_dim, padded = whole(rows), count = std::min<int64_t>(width, call.value_dim - first);
  const bool all = count == width;
  float *held = scratch;
  TokenRows now, next;
  float *row = held + rows * width;
  for (float **each : {&now.key, &now.read, &now.query, &now.decay, &next.key, &next.read, &next.query, &next.decay}) {
    *each = row;
    row += padded;
  }
  float *state = call.state + b * call.state_batch + (head * rows) * call.value_dim + first;
  Vec memory[Cols], delta[Cols], output[Cols];
  prepare(call, now, b, 0, head);
  if (call.fresh || !all) {
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t i = 0; i < width; ++i)
        held[k * width + i] = call.fresh || i >= count ? 0.0f : state[k * call.value_dim + i];
    begin_columns<Cols>(held, width, held, now.read, rows, memory);
  } else {
    begin_columns<Cols>(state, call.value_dim, held, now.read, rows, memory);
  }
  for (int64_t t = 0; t < call.tokens; ++t) {
    float numbers[width];
    prefetch(call.value, at(call.value, b, std::min(call.tokens - 1, t + kTokensAhead), head, first), count,
             call.value.stride[3]);
    widen(numbers, call.value, at(call.value, b, t, head, first), count, call.value.stride[3]);
    for (int64_t i = whole(count); i < width; ++i) numbers[i] = 0.0f;
    const float beta = widen_one(call.beta, at(call.beta, b, t, head));
    for (int c = 0; c < Cols; ++c) delta[c] = (loaded(numbers + c * kLanes) - memory[c]) * beta;
    if (t + 1 < call.tokens) {
      prepare(call, next, b, t + 1, head);
      move_columns<Cols, true>(held, held, width, now, next.read, rows, delta, output, memory);
    } else if (all) {  // to where it lies
      move_columns<Cols, false>(held, state, call.value_dim, now, nullptr, rows, delta, output, memory);
    } else {
      move_columns<Cols, false>(held, held, width, now, nullptr, rows, delta, output, memory);
      for (int64_t k = 0; k < rows; ++k) std::memcpy(state + k * call.value_dim, held + k * width, size_t(count) * 4);
    }
    for (int c = 0; c < Cols; ++c) store(numbers + c * kLanes, output[c]);
    narrow(call.output, at(call.output, b, t, head, first), numbers, count);
    std::swap(now, next);
  }
}

// A single token, over all columns of a head: its state comes from memory once, row after row as it lies, and that of
// the next head while this one is written.
template <int Rows>
inline void read_rows(const float *state, int64_t columns, const float *read, float *memory) {
  Vec r[Rows];
  for (int i = 0; i < Rows; ++i) r[i] = splat(read[i]);
  for (int64_t c = 0; c < columns; c += kLanes) {
    Vec sum = loaded(memory + c);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) sum = fused(loaded(state + i * columns + c), r[i], sum);
    store(memory + c, sum);
  }
}
template <int Rows>
inline void move_rows(float *state, int64_t columns, const TokenRows &now, int64_t row, const float *delta,
                      float *output, int64_t ahead) {
  Vec key[Rows], query[Rows], decay[Rows];
  for (int i = 0; i < Rows; ++i) {
    key[i] = splat(now.key[row + i]);
    query[i] = splat(now.query[row + i]);
    decay[i] = splat(now.decay[row + i]);
  }
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Vec d = loaded(delta + c);
    Vec out = loaded(output + c);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      float *place = state + i * columns + c;
      __builtin_prefetch(place + ahead, 0, 2);
      const Vec s = fused(key[i], d, loaded(place) * decay[i]);
      store(place, s);
      out = fused(s, query[i], out);
    }
    store(output + c, out);
  }
}

void delta_token(const DeltaRule &call, int64_t b, int64_t head, float *scratch) {
  const int64_t rows = call.key_dim, columns = call.value_dim, padded = whole(rows);
  TokenRows now;
  float *row = scratch;
  for (float **each : {&now.key, &now.read, &now.query, &now.decay}) row = (*each = row) + padded;
  float *memory = row, *delta = memory + columns, *output = delta + columns;
  float *state = call.state + b * call.state_batch + head * rows * columns;
  prepare(call, now, b, 0, head);
  std::fill(memory, memory + columns, 0.0f);
  std::fill(output, output + columns, 0.0f);
  int64_t k = 0;
  for (; k + 4 <= rows; k += 4) read_rows<4>(state + k * columns, columns, now.read + k, memory);
  for (; k < rows; ++k) read_rows<1>(state + k * columns, columns, now.read + k, memory);
  widen(delta, call.value, at(call.value, b, 0, head), columns, call.value.stride[3]);
  const float beta = widen_one(call.beta, at(call.beta, b, 0, head));
  for (int64_t c = 0; c < columns; c += kLanes) store(delta + c, (loaded(delta + c) - loaded(memory + c)) * beta);
  for (k = 0; k + 4 <= rows; k += 4) move_rows<4>(state + k * columns, columns, now, k, delta, output, rows * columns);
  for (; k < rows; ++k) move_rows<1>(state + k * columns, columns, now, k, delta, output, rows * columns);
  narrow(call.output, at(call.output, b, 0, head), output, columns);
}

// ---- selective scans -----------------------------------------------------------------------------------------------
//
// With h a row of the state, x the row's input, t the time that passes, and b and c of the token:
//
//     h = e^(t a) h + t x b        output = c h + skip x
//
// Lanes are the columns of a row, beside each other as they are stored, so a state is never turned around.

struct ScanRows {
  const float *b, *c;     // (columns)
  const float *decay;     // (rows) with one for each row: e^(t a); else t
  const float *arriving;  // (rows) t * x
};

template <int Rows>
inline void scan_rows(float *state, int64_t columns, const ScanRows &token, int64_t row, float *output) {
  Vec sum[4] = {}, arriving[Rows];
  const Vec decay = splat(token.decay[0]);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) arriving[r] = splat(token.arriving[row + r]);
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Vec b = loaded(token.b + i), c = loaded(token.c + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      float *place = state + (row + r) * columns + i;
      const Vec h = fused(b, arriving[r], loaded(place) * decay);
      store(place, h);
      sum[r] = fused(h, c, sum[r]);
    }
  }
  float sums[4];
  sums_of_four(sum, sums);
  for (int r = 0; r < Rows; ++r) output[row + r] = sums[r];
}

// The same row after row: where each number of the state has its own decay, so that the registers hold what exp_of
// needs; and for a single token, whose state comes from memory as it lies.
template <int Rows, bool PerState>
inline void scan_each(float *state, const float *a, int64_t columns, const ScanRows &token, int64_t row,
                      float *output) {
  Vec sum[4] = {};
  for (int r = 0; r < Rows; ++r) {
    const Vec step = splat(token.decay[PerState ? row + r : 0]), arriving = splat(token.arriving[row + r]);
    const float *rates = PerState ? a + (row + r) * columns : nullptr;
    float *own = state + (row + r) * columns;
    Vec total = {};
    for (int64_t i = 0; i < columns; i += kLanes) {
      __builtin_prefetch(own + i + kAhead, 0, 2);
      const Vec decay = PerState ? exp_of(loaded(rates + i) * step) : step;
      const Vec h = fused(loaded(token.b + i), arriving, loaded(own + i) * decay);
      store(own + i, h);
      total = fused(h, loaded(token.c + i), total);
    }
    sum[r] = total;
  }
  float sums[4];
  sums_of_four(sum, sums);
  for (int r = 0; r < Rows; ++r) output[row + r] = sums[r];
}

inline int64_t rows_at_once(const SelectiveScan &call) {
  return std::max<int64_t>(4, std::min<int64_t>(kMaxRows, kRowFloats / whole(call.state_dim)) / 4 * 4);
}

// (rows, count) into (rows, columns), with zeros behind each row.
inline void pad_rows(float *to, const float *from, int64_t rows, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; ++i) to[r * columns + i] = i < count ? from[r * count + i] : 0.0f;
}

struct ScanScratch {  // of a block of rows; inputs are of a piece of the tokens
  float *x, *step, *gate;         // (kPiece, kMaxRows)
  float *arriving, *output;       // (kMaxRows)
  float *b, *c;                   // (columns)
  float *state, *a;               // (rows, columns), where rows are no whole vectors as they lie
  ScanScratch(float *at, int64_t rows, int64_t columns) {
    for (float **each : {&x, &step, &gate}) at = (*each = at) + kPiece * kMaxRows;
    for (float **each : {&arriving, &output}) at = (*each = at) + kMaxRows;
    for (float **each : {&b, &c}) at = (*each = at) + columns;
    state = at;
    a = state + rows * columns;
  }
  static int64_t floats(int64_t rows, int64_t columns) {
    return (3 * kPiece + 2) * kMaxRows + 2 * columns + 2 * rows * columns;
  }
};

inline void widen_piece(float *to, const Tensor &t, const SelectiveScan &call, int64_t batch, int64_t token,
                        int64_t head, int64_t first, int64_t count) {
  widen_tokens(to, kMaxRows, t, at(t, batch, token, head, first), std::min<int64_t>(kPiece, call.tokens - token), count,
               t.stride[1], t.stride[3]);
}

// The time that passes with a token, for each row or all of them.
inline void pass_time(const SelectiveScan &call, float *step, const float *bias, int64_t count) {
  if (bias)
    for (int64_t r = 0; r < count; ++r) step[r] += bias[r];
  const Vec least = splat(float(call.least)), most = splat(float(call.most));
  for (int64_t r = 0; r < count; r += kLanes) {
    Vec s = loaded(step + r);
    if (call.softplus) s = softplus_of(s);
    s = s < least ? least : s;
    store(step + r, s > most ? most : s);
  }
}

template <bool PerHead>
void scan_block(const SelectiveScan &call, int64_t batch, int64_t head, int64_t first, int64_t rows, float *scratch) {
  const int64_t count = call.state_dim, columns = whole(count), group = head / (call.heads / call.groups);
  const int64_t row = head * call.dim + first, steps = PerHead ? 1 : rows;
  const ScanScratch s(scratch, rows, columns);
  const float *a = PerHead ? call.a + head : call.a + row * count;
  const float *skip = call.skip ? call.skip + (PerHead ? head : row) : nullptr;
  const float *bias = call.bias ? call.bias + (PerHead ? head : row) : nullptr;
  const bool in_place = count == columns, alone = call.tokens == 1;
  float *lies = call.state + batch * call.state_batch + row * count, *state = in_place ? lies : s.state;
  if (call.fresh)
    std::fill(state, state + rows * columns, 0.0f);
  else if (!in_place)
    pad_rows(state, lies, rows, count, columns);
  if (!PerHead && !in_place) {
    pad_rows(s.a, a, rows, count, columns);
    a = s.a;
  }
  for (int64_t t = 0; t < call.tokens; ++t) {
    float *x = s.x + t % kPiece * kMaxRows, *step = s.step + t % kPiece * kMaxRows;
    float *gate = s.gate + t % kPiece * kMaxRows;
    if (t % kPiece == 0) {
      widen_piece(x, call.input, call, batch, t, head, first, rows);
      widen_piece(step, call.step, call, batch, t, head, PerHead ? 0 : first, steps);
      if (call.gate.data) widen_piece(gate, call.gate, call, batch, t, head, first, rows);
    }
    widen(s.b, call.b, at(call.b, batch, t, group), count, call.b.stride[3]);
    widen(s.c, call.c, at(call.c, batch, t, group), count, call.c.stride[3]);
    pass_time(call, step, bias, steps);
    for (int64_t r = 0; r < rows; r += kLanes)
      store(s.arriving + r, loaded(x + r) * (PerHead ? splat(step[0]) : loaded(step + r)));
    if (PerHead) step[0] = exp_of(step[0] * a[0]);
    const ScanRows token{s.b, s.c, step, s.arriving};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      if (!PerHead)
        scan_each<4, true>(state, a, columns, token, r, s.output);
      else if (alone)
        scan_each<4, false>(state, a, columns, token, r, s.output);
      else
        scan_rows<4>(state, columns, token, r, s.output);
    }
    for (; r < rows; ++r) scan_each<1, !PerHead>(state, a, columns, token, r, s.output);
    if (skip)
      for (r = 0; r < rows; r += kLanes)
        store(s.output + r,
              fused(loaded(x + r), PerHead ? splat(skip[0]) : some(skip + r, rows - r), loaded(s.output + r)));
    if (call.gate.data)
      for (r = 0; r < rows; r += kLanes) store(s.output + r, loaded(s.output + r) * silu_of(loaded(gate + r)));
    narrow(call.output, at(call.output, batch, t, head, first), s.output, rows);
  }
  if (!in_place)
    for (int64_t r = 0; r < rows; ++r) std::memcpy(lies + r * count, state + r * columns, size_t(count) * 4);
}

// ---- convolutions --------------------------------------------------------------------------------------------------

// (channels, width) of numbers beside each other into (width, kChannels).
template <class T, int Width>
inline void turned_in(float *to, const char *from, int64_t channels, int64_t width) {
  if (Width) width = Width;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < width; ++i)
      to[i * kChannels + c] = T::widen_one(from + (c * width + i) * int64_t(sizeof(typename T::Stored)));
}
inline void turned(float *to, int64_t dtype, const char *from, int64_t channels, int64_t width) {
  in_dtype(dtype, [&](auto type) {
    typedef decltype(type) T;
    if (width == 4)
      turned_in<T, 4>(to, from, channels, 4);
    else if (width == 3)
      turned_in<T, 3>(to, from, channels, 3);
    else
      turned_in<T, 0>(to, from, channels, width);
  });
}

// Each channel's last tokens, moved on by one.
template <class Stored>
inline void push(char *state, const char *token, int64_t stride, int64_t channels, int64_t kept) {
  Stored *to = reinterpret_cast<Stored *>(state);
  const Stored *from = reinterpret_cast<const Stored *>(token);
  std::memmove(to, to + 1, size_t(channels * kept - 1) * sizeof(Stored));
  for (int64_t c = 0; c < channels; ++c) to[c * kept + kept - 1] = from[c * stride];
}

// Some channels over some tokens. Rows are of kChannels numbers; what is behind the last channel is not looked at.
void convolve(const Convolution &call, int64_t batch, int64_t first, int64_t start, float *scratch) {
  const int64_t channels = std::min<int64_t>(kChannels, call.channels - first), taps = call.taps;
  const int64_t end = std::min<int64_t>(call.tokens, start + kTokens), before = taps - 1;
  float *weight = scratch, *bias = weight + taps * kChannels, *seen = bias + kChannels,
        *output = seen + (kTokens + kMaxTaps + kMaxTaps) * kChannels;
  turned(weight, call.weight.dtype, at(call.weight, first), channels, taps);
  std::fill(bias, bias + kChannels, 0.0f);
  if (call.bias.data) widen(bias, call.bias, at(call.bias, first), channels, call.bias.stride[0]);
  const int64_t size = call.input.dtype == 0 ? 4 : 2;
  char *state = call.state ? call.state + (batch * call.state_batch + first * call.kept) * size : nullptr;
  if (state) {  // its last rows are those before the token
    turned(seen, call.input.dtype, state, channels, call.kept);
    seen += (call.kept - before) * kChannels;
  }
  const int64_t from = state ? start : std::max<int64_t>(0, start - before), row = before - (start - from);
  if (!state) std::fill(seen, seen + row * kChannels, 0.0f);
  widen_tokens(seen + row * kChannels, kChannels, call.input, at(call.input, batch, from, first), end - from, channels,
               call.input.stride[1], call.input.stride[2]);
  for (int64_t t = start; t < end; ++t) {
    const float *rows = seen + (t - start) * kChannels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Vec sum = loaded(bias + c);
      for (int64_t i = 0; i < taps; ++i)
        sum = fused(loaded(weight + i * kChannels + c), loaded(rows + i * kChannels + c), sum);
      store(output + c, call.silu ? silu_of(sum) : sum);
    }
    narrow(call.output, at(call.output, batch, t, first), output, channels);
  }
  if (!state) return;
  const char *token = at(call.input, batch, 0, first);
  if (size == 4)
    push<uint32_t>(state, token, call.input.stride[2], channels, call.kept);
  else
    push<uint16_t>(state, token, call.input.stride[2], channels, call.kept);
}

}  // namespace

// Each returns 0, or 1 when there is no memory for scratch space.
extern "C" int delta_rule(const DeltaRule *given) {
  const DeltaRule &call = *given;
  int64_t cols = kCols;  // as many as the columns of a head fill
  while (cols > 1 && cols / 2 * kLanes >= call.value_dim) cols /= 2;
  const int64_t width = cols * kLanes, blocks = (call.value_dim + width - 1) / width;
  const int64_t work = call.tokens * call.key_dim * cols * 3;
  const int64_t heads = call.batch * call.heads, each = heads / (4 * call.threads);  // to a task
  if (call.tokens == 1 && !call.fresh && call.value_dim % kLanes == 0 && each)
    return spread((heads + each - 1) / each, each * blocks * work, call.threads,
                  4 * whole(call.key_dim) + 3 * call.value_dim, [&](int64_t task, float *scratch) {
                    for (int64_t at = task * each; at < std::min(heads, (task + 1) * each); ++at)
                      delta_token(call, at / call.heads, at % call.heads, scratch);
                  });
  return spread(heads * blocks, work, call.threads, call.key_dim * width + 8 * whole(call.key_dim),
                [&](int64_t task, float *scratch) {
                  const int64_t b = task / blocks / call.heads, head = task / blocks % call.heads;
                  const int64_t first = task % blocks * width;
                  if (cols == 1)
                    delta_columns<1>(call, b, head, first, scratch);
                  else if (cols == 2)
                    delta_columns<2>(call, b, head, first, scratch);
                  else
                    delta_columns<4>(call, b, head, first, scratch);
                });
}

extern "C" int selective_scan(const SelectiveScan *given) {
  const SelectiveScan &call = *given;
  const int64_t rows = rows_at_once(call), blocks = (call.dim + rows - 1) / rows, columns = whole(call.state_dim);
  const int64_t work = call.tokens * rows * columns / kLanes * (call.per_head ? 2 : 8);
  return spread(call.batch * call.heads * blocks, work, call.threads,
                ScanScratch::floats(rows, columns), [&](int64_t task, float *scratch) {
                  const int64_t b = task / blocks / call.heads, head = task / blocks % call.heads;
                  const int64_t first = task % blocks * rows, count = std::min(rows, call.dim - first);
                  if (call.per_head)
                    scan_block<true>(call, b, head, first, count, scratch);
                  else
                    scan_block<false>(call, b, head, first, count, scratch);
                });
}

// With a state there is one token, and kMaxTaps - 1 are kept at most.
extern "C" int convolution(const Convolution *given) {
  const Convolution &call = *given;
  const int64_t blocks = (call.channels + kChannels - 1) / kChannels, pieces = (call.tokens + kTokens - 1) / kTokens;
  const int64_t work = kChannels / kLanes * std::min<int64_t>(call.tokens, kTokens) * (call.taps + 12);
  return spread(call.batch * blocks * pieces, work, call.threads,
                (call.taps + 1 + kTokens + 2 * kMaxTaps + 1) * kChannels, [&](int64_t task, float *scratch) {
                  const int64_t b = task / pieces / blocks, block = task / pieces % blocks;
                  convolve(call, b, block * kChannels, task % pieces * kTokens, scratch);
                });
}
