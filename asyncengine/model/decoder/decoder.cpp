// A whole step of a decoder on the CPU in one call: embedding, layers, head. Plain C ABI; built with the attention kernel.
//
// Every product is C[row][lane] += sum over steps A[row][step] * B[step][lane], as in paged_attention.cpp: weights are
// packed so that what one vector of outputs needs lies in one run of memory,
//
//     weights (group, step, lane, pair)    group = output / lanes, step = input / pair
//
// and are read once for up to six tokens at a time. Each output is one chain of additions over its inputs, in ascending
// order, in one accumulator, or in the order that tiles.h tells, or that of bundles.h, where weights of four bits have an
// order of their own too: a token gets the same bits whatever else is in the batch, on any number of threads, whether it
// decodes or is prefilled.
//
// One team of threads runs through all phases of a step. Within a phase they share out items; between phases they wait
// for the items, not for each other (see Phase). Activations between layers are float32; what enters a product is
// rounded to the type of the weights where the processor multiplies in it, and to integers of 16 bits where the weights
// are bytes or less.

#include "../attention/paged_attention.cpp"

#include <deque>
#include <utility>

#include "bundles.h"

// The structures below are mirrored in program.py and weights.py.
extern "C" {
struct Matrix {
  const void *weights;  // packed; null: there is none
  const float *scales;  // (outputs) of weights in int8 or four bits, or null
  const float *bias;    // (outputs) or null
  int64_t outputs, inputs;
  const Format *format;  // how they are stored, if as codes with scales for some inputs each; or null
};

struct Norm {  // (x - mean(x)) / deviation(x) * weight + bias, or x / rms(x) * weight + bias
  const float *weight;  // null: there is no norm
  const float *bias;    // like weight, or null
  int64_t size;         // 0: the whole row; else each head of this size
  int64_t stride;       // from the weights of one head to those of the next; 0: they share them
  int64_t centred;      // whether the mean is taken off
  double epsilon;
};

struct Experts {  // in the place of an MLP, or beside it; each has a gate
  Matrix router;            // an output for each of them, and behind these, from a whole vector on, one that tells how
                            // much the MLP beside them counts; no experts: there is an MLP alone
  Matrix gate_up, down;     // of all of them, one after the other
  const float *correction;  // (count) added to what chooses, not to what weighs; or null
  int64_t count, top;       // how many there are, and to how many a token is sent
  int64_t groups, groups_asked;  // neighbours that are chosen together, by their two best; of how many groups
  int64_t sigmoid;          // whether scores are sigmoids; else they are a softmax
  int64_t chosen_first;     // whether that is over those that were chosen; else over all
  int64_t normalised;       // whether the weights of those that were chosen add up to 1
  int64_t beside_gated;     // whether the MLP beside them is multiplied by a sigmoid
  int64_t activation;
  double alpha, limit;          // of activation 5
  double scale, beside_scale;  // what their answers, and those of the MLP beside them, are multiplied by at last
};

struct Latents {  // what is kept of a token: attention sees one key of all heads, whose beginning is the value
  Matrix query;           // from what `query_norm` leaves to queries of all heads; null: these are the beginning of `qkv`
  Norm query_norm, norm;  // of its inputs, and of latents
  Matrix into, out_of;    // of all heads, one after the other: from queries to latents, from latents to values
  int64_t rank, plain;    // numbers of a latent, and of a head's query that do not rotate; 0: there are no latents
};

struct DecoderLayer {
  Norm before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
  Matrix qkv, output, gate_up, down;  // gate and up by turns, a group of each; or up alone
  Experts experts;
  Latents latents;  // with them `qkv` gives queries, or what they are made of, then latents and what rotates of the key
  int64_t gated;                      // whether there is a gate
  int64_t parallel;                   // whether the MLP sees what attention sees, not what it leaves
  const float *cosines, *sines;       // (positions, rotary / 2), or null: no rotation
  const float *sinks;                 // (heads) or null
  Layer attention;
};

struct Decoder {
  const DecoderLayer *layers;
  int64_t num_layers;
  int64_t dtype;  // as Layer's
  int64_t narrow;  // 1: the weights are int8; 2: or in four bits, where their matrix says so; with bfloat16 only
  int64_t hidden, intermediate, rotary;
  int64_t activation;      // 0 silu, 1 gelu by tanh, 2 gelu by erf, 3 relu, 4 relu squared, 5 see `gated`
  int64_t pairs;           // whether dimensions 2 i and 2 i + 1 rotate together; else i and i + rotary / 2
  const float *positions;  // (positions, hidden), added to embeddings, or null
  Matrix embedding;        // packed like the head
  double embedding_scale, residual_scale, logit_scale, logit_cap;  // a cap of 0 is off
  Norm norm;
  Matrix head;
};

struct AdaptedMatrix {   // what an adapter adds to a product's outputs: up(down(x)), of low rank
  Matrix down;           // (ranks of all parts, inputs); null: nothing is added
  Matrix up;             // (outputs, rank of each part)
  const int32_t *first;  // for each group of outputs, the first of the numbers that it takes; -1: nothing is added
};

struct AdaptedPiece {  // neighbouring tokens with one adapter
  int64_t adapter, first, count;
};

struct DecoderStep {
  const int32_t *token_ids, *positions;  // (tokens)
  const int64_t *sample_index;           // (samples) tokens whose logits are wanted
  int64_t samples;
  float *logits;  // (samples, vocabulary)
  const Plan *plan;
  const int64_t *pool_spans;  // (pools, 2) tokens, from and to, whose hidden states are summed
  int64_t pools;
  float *pooled;  // (pools, hidden), behind the last norm
  const AdaptedMatrix *const *adapters;  // of each, (layers, 6): qkv, output, gate_up, down, router, query
  const int32_t *token_adapters;         // (tokens) indices, or -1
  const AdaptedPiece *pieces;            // all tokens that have an adapter
  int64_t num_pieces;
  const int64_t *seen;             // (tokens) which of `images` a token is embedded with, or -1; null: none is
  const float *images;             // (rows, hidden)
  const float *cosines, *sines;    // (tokens, rotary / 2), in the place of the layers'; or null
  const float *const *deep;        // of each of the first layers, (rows, hidden), added behind it
  int64_t num_deep;
  float *const *taps;  // (layers + 1) where hidden states go as they enter each layer, or leave the last: (tokens, hidden),
                       // or null; null itself: none are wanted
};

struct Product {  // of a matrix, by itself
  Matrix matrix;
  int64_t dtype, narrow;  // as Decoder's
};

struct Asking {  // of experts, by themselves
  Experts experts;  // but for how many a token is sent to, and no router
  int64_t dtype, narrow;
};

struct Packing {  // one matrix that is to be packed
  int64_t dtype;  // as Layer's
  const void *from;
  int64_t outputs, inputs, row_stride;
  void *to;
  int64_t first_group, group_step;  // group g of the outputs becomes group first_group + g * group_step
  float *scales;                    // of int8 weights, or null
};

struct Rounding {  // of numbers to codes, and what these stand for
  const uint16_t *from;  // bfloat16
  int64_t outputs, inputs, row_stride;
  int64_t bits, group;  // of a code; inputs that share a scale
  float *to;            // (outputs, inputs)
};
}

namespace {

// Weights of one byte, one scale per output. Integers are exact in float32 and, so small, in bfloat16, so the scale is
// applied to the sum. Without tiles they are multiplied so where inputs are no whole bundles.
#if HAS_TILES
struct Int8 : BFloat16 {  // what enters a product is bfloat16; a step has its pairs' first numbers, then the second
  typedef int8_t Stored;
  static Vec vector(const Stored *p) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p))); }
  static Halves halves(const Stored *p) { return {vector(p), vector(p + kLanes)}; }
  static Operand operand(const Stored *p) {
    const Halves pairs = halves(p);
    return (Operand)((Words)pairs.first >> 16 | ((Words)pairs.second & 0xffff0000u));
  }
  static float widen(Stored x) { return float(x); }
};
#else
struct Int8 {
  typedef int8_t Stored;
  typedef float Weight;
  typedef Vec Operand;
  static constexpr int kPair = 1;
  static Operand operand(const Stored *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
#else
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    return __builtin_convertvector(load<Bytes>(p), Vec);
#endif
  }
  static Vec add_product(Vec sum, Weight w, Operand b) { return fused(splat(w), b, sum); }
  static void pack_vector(Weight *to, Vec x) { store(to, x); }
  static float widen(Stored x) { return float(x); }
};
#endif

// Weights of four bits, and of bytes, whose rows come in bundles, see bundles.h.
struct Int4 {
  typedef char Stored;
  typedef Bundle Weight;
  static constexpr int kPair = kBundle;
};
struct BundledInt8 : Int4 {
  typedef int8_t Stored;
};
struct GroupedInt8 : Int4 {};  // with a scale for some bundles each
struct FineInt8 : Int4 {};     // with one for each half
template <class W>
constexpr bool takes_bundles() {
  return std::is_base_of<Int4, W>::value;
}
template <class W>
constexpr int bits_of() {  // of a code in bundles
  return std::is_same<W, Int4>::value ? 4 : 8;
}
template <class W>
constexpr int group_of() {  // inputs that share a scale, or that many times some number; 0 where an output has one
  return std::is_same<W, BundledInt8>::value ? 0 : std::is_same<W, FineInt8>::value ? kBundle / 2 : kBundle;
}

#if HAS_TILES
}  // namespace
#include "bundle_tiles.h"
namespace {
#endif

// int8 leaves the router of experts out, which is as exact as what enters the products.
typedef std::conditional<Int8::kPair == 2, BFloat16, Float32>::type RouterOfInt8;

// Where a number lies in its step.
template <class W>
constexpr int64_t place_of(int64_t lane, int64_t of_pair) {
  return std::is_same<W, Int8>::value ? of_pair * kLanes + lane : lane * W::kPair + of_pair;
}

// Rows at once, and the most columns with so many rows: enough sums to hide an addition's latency, not more than there
// are registers. In bundles there is a second one of each, that of a bundle. Where registers are few, the first ones lie in
// memory if there are many rows: they are needed once for a bundle.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;
template <class W>
constexpr int rows_of() {
  return 6;
}
constexpr int bundle_sums(int) { return kSums / 2; }
#else
constexpr int kSums = 12;
template <class W>
constexpr int rows_of() {
  return takes_bundles<W>() ? 6 : 3;
}
constexpr int bundle_sums(int rows) { return rows < 4 ? kSums / 2 : kSums; }
#endif
constexpr int kMostCols = 8;
template <class W>
constexpr int cols_of(int rows) {
  int cols = kMostCols;
  while (cols * rows > (takes_bundles<W>() ? bundle_sums(rows) : kSums)) cols /= 2;
  return cols;
}
template <class W>
constexpr int64_t chunks_of(int64_t rows) {  // of rows that are multiplied at once
  return (rows + rows_of<W>() - 1) / rows_of<W>();
}
constexpr int64_t kAhead = 1024;  // bytes that weights are fetched ahead, where they come from memory
constexpr int64_t kTileAhead = 2048;

// Some numbers of a row that enters products with bytes.
inline Vec widen_input(const typename Int8::Weight *row, int64_t i) {
#if HAS_TILES
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(reinterpret_cast<const uint16_t *>(row) + i)), 16);
#else
  return load<Vec>(row + i);
#endif
}

// sums[row][lane] of `Rows` tokens and `Cols` groups of outputs.
template <class W, int Rows, int Cols>
__attribute__((noinline)) void multiply(const typename W::Weight *inputs, int64_t input_stride,
                                        const typename W::Stored *weights, int64_t group_stride, int64_t steps,
                                        float *sums, int64_t sum_stride, int64_t ahead) {
  Vec sum[Rows][Cols] = {};
  const typename W::Stored *column[Cols];
#pragma GCC unroll 8
  for (int c = 0; c < Cols; ++c) column[c] = weights + c * group_stride;
  for (int64_t step = 0; step < steps; ++step) {
    if constexpr (Rows <= Cols) {  // the order that needs the fewer registers
      typename W::Weight w[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) w[r] = inputs[r * input_stride + step];
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) {
        const typename W::Operand b = W::operand(column[c]);
        prefetch(reinterpret_cast<const char *>(column[c]) + ahead);
        column[c] += kLanes * W::kPair;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) sum[r][c] = W::add_product(sum[r][c], w[r], b);
      }
    } else {
      typename W::Operand b[Cols];
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) {
        b[c] = W::operand(column[c]);
        prefetch(reinterpret_cast<const char *>(column[c]) + ahead);
        column[c] += kLanes * W::kPair;
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const typename W::Weight w = inputs[r * input_stride + step];
#pragma GCC unroll 8
        for (int c = 0; c < Cols; ++c) sum[r][c] = W::add_product(sum[r][c], w, b[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) store(sums + r * sum_stride + c * kLanes, sum[r][c]);
}

template <class W>
struct Products {
  decltype(&multiply<W, 1, 1>) of[rows_of<W>() + 1][kMostCols + 1];
  template <int Rows, int Cols>
  constexpr void fill() {
    of[Rows][Cols] = multiply<W, Rows, Cols>;
    if constexpr (Cols > 1)
      fill<Rows, Cols / 2>();
    else if constexpr (Rows > 1)
      fill<Rows - 1, cols_of<W>(Rows - 1)>();
  }
  constexpr Products() : of() { fill<rows_of<W>(), cols_of<W>(rows_of<W>())>(); }
};
template <class W>
constexpr Products<W> products;

// The same of bundles.
template <class W>
struct BundleProducts {
  decltype(&multiply_bundles<4, kBundle, 1, 1>) of[rows_of<W>() + 1][kMostCols + 1];
  template <int Rows, int Cols>
  constexpr void fill() {
    of[Rows][Cols] = multiply_bundles<bits_of<W>(), group_of<W>(), Rows, Cols>;
    if constexpr (Cols > 1)
      fill<Rows, Cols / 2>();
    else if constexpr (Rows > 1)
      fill<Rows - 1, cols_of<W>(Rows - 1)>();
  }
  constexpr BundleProducts() : of() { fill<rows_of<W>(), cols_of<W>(rows_of<W>())>(); }
};
template <class W>
constexpr BundleProducts<W> bundle_products;

#if HAS_TILES
// As `multiply`, with the bits that tiles give. Each output has three sums, so there are half as many.
template <class W, int Rows, int Cols>
__attribute__((noinline)) void multiply_like_tiles(const typename W::Weight *inputs, int64_t input_stride,
                                                   const typename W::Stored *weights, int64_t group_stride,
                                                   int64_t steps, float *sums, int64_t sum_stride, int64_t ahead) {
  const NoDenormals flushed;
  Vec sum[Rows][Cols] = {};
  const typename W::Stored *column[Cols];
#pragma GCC unroll 8
  for (int c = 0; c < Cols; ++c) column[c] = weights + c * group_stride;
  for (int64_t step = 0; step < steps;) {
    Vec firsts[Rows][Cols] = {}, seconds[Rows][Cols] = {};
    for (const int64_t end = std::min(step + kTile, steps); step < end; ++step) {
      Halves w[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) w[r] = BFloat16::halves(Words{} + inputs[r * input_stride + step]);
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) {
        const Halves b = W::halves(column[c]);
        prefetch(reinterpret_cast<const char *>(column[c]) + ahead);
        column[c] += kLanes * W::kPair;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          firsts[r][c] = fused(w[r].first, b.first, firsts[r][c]);
          seconds[r][c] = fused(w[r].second, b.second, seconds[r][c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) sum[r][c] = sum[r][c] + (firsts[r][c] + seconds[r][c]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) store(sums + r * sum_stride + c * kLanes, sum[r][c]);
}

// What to bring nearer while a tile of weights is multiplied: those that follow; or where weights were widened before,
// what the thread will probably widen for its next item.
template <class Stored>
struct FetchWeights {
  const uint16_t *weights;
  const Stored *next_item;
  void operator()(int, const uint16_t *lanes) const {
    if constexpr (std::is_same<Stored, uint16_t>::value) {
      fetch_tile(lanes, kTileAhead);
    } else {
      const char *at = reinterpret_cast<const char *>(next_item + (lanes - weights));
      for (int i = 0; i < kTileNumbers; i += 64) prefetch(at + i);
    }
  }
};

constexpr int kFewRows = 3;
constexpr int few_cols_of(int rows) { return rows == 1 ? kMostCols : kMostCols / 2; }

template <class W>
struct FewRowsProducts {
  decltype(&multiply_like_tiles<W, 1, 1>) of[kFewRows + 1][kMostCols + 1];
  template <int Rows, int Cols>
  constexpr void fill() {
    of[Rows][Cols] = multiply_like_tiles<W, Rows, Cols>;
    if constexpr (Cols > 1)
      fill<Rows, Cols / 2>();
    else if constexpr (Rows > 1)
      fill<Rows - 1, few_cols_of(Rows - 1)>();
  }
  constexpr FewRowsProducts() : of() { fill<kFewRows, few_cols_of(kFewRows)>(); }
};
template <class W>
constexpr FewRowsProducts<W> few_rows_products;
#endif

inline Vec erf_of(Vec x) {
  Vec y = x;
  for (int i = 0; i < kLanes; ++i) y[i] = std::erf(x[i]);
  return y;
}

inline float sigmoid(float x) {  // from the side that cannot overflow
  const float e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

inline Vec activate(Vec x, int64_t kind) {
  switch (kind) {
    case 0: {  // x / (1 + e^-x), from the side that cannot overflow
      Vec e = exp2_nonpositive<false>((x < 0.0f ? x : -x) * kLog2E);
      return x * ((x < 0.0f ? e : splat(1.0f)) / (1.0f + e));
    }
    case 1:
      return 0.5f * x * (1.0f + tanh_of(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case 2:
      return 0.5f * x * (1.0f + erf_of(x * 0.7071067811865476f));
    default: {
      Vec positive = maximum(x, splat(0.0f));
      return kind == 3 ? positive : positive * positive;
    }
  }
}

// What becomes of the outputs of a gate and of an up projection. The last kind, gpt-oss's, clamps both.
inline Vec gated(Vec gate, Vec up, int64_t kind, float alpha, float limit) {
  if (kind != 5) return activate(gate, kind) * up;
  const Vec low = gate > limit ? splat(limit) : gate, bounded = maximum(up > limit ? splat(limit) : up, splat(-limit));
  const Vec x = alpha * low, e = exp2_nonpositive<false>((x < 0.0f ? x : -x) * kLog2E);
  return (bounded + 1.0f) * low * ((x < 0.0f ? e : splat(1.0f)) / (1.0f + e));
}

inline Vec square_sum(const float *x, int64_t count, Vec mean) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec v = load<Vec>(x + i + j * kLanes) - mean;
      sum[j] = sum[j] + v * v;
    }
  for (; i < count; i += kLanes) {
    Vec v = load<Vec>(x + i) - mean;
    sum[0] = sum[0] + v * v;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline float row_sum(const float *x, int64_t count) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load<Vec>(x + i + j * kLanes);
  for (; i < count; i += kLanes) sum[0] = sum[0] + load<Vec>(x + i);
  return lanes_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// What a norm makes of one row, or of one head.
struct Normed {
  const float *x, *weight, *bias;
  Vec mean, factor;
  Normed(const float *from, int64_t count, const Norm &norm, int64_t first_weight = 0)
      : x(from), weight(norm.weight + first_weight), bias(norm.bias ? norm.bias + first_weight : nullptr) {
    const float middle = norm.centred ? row_sum(x, count) / float(count) : 0.0f;
    mean = splat(middle);
    const float squares = lanes_sum(square_sum(x, count, mean));
    factor = splat(1.0f / std::sqrt(squares / float(count) + float(norm.epsilon)));
  }
  Vec at(int64_t i) const {
    const Vec v = (load<Vec>(x + i) - mean) * factor * load<Vec>(weight + i);
    return bias ? v + load<Vec>(bias + i) : v;
  }
};

constexpr int64_t kItemBytes = 128 << 10;

// Where tiles multiply, weights are not all there is to read: many rows are shared out as well, and stay in the cache for
// more of the weights.
constexpr int64_t kRowsEach = 64, kManyRowsItemBytes = 1 << 20;

struct Memory {  // hands out pieces of one allocation, or counts what they would take
  char *base;
  int64_t used = 0;
  template <class Element>
  Element *take(int64_t count) {
    char *at = base + used;
    used += round_up(count * int64_t(sizeof(Element)), 64);
    return reinterpret_cast<Element *>(at);
  }
};

struct alignas(64) PaddedPhase : Phase {};

// What the layers' attention shares: layers of one shape have the same tiles.
struct Tiles {
  const Layer *like;
  std::vector<Tile> tiles;
  std::vector<Unit> units;
};

bool same_shape(const Layer &a, const Layer &b) {
  return a.heads == b.heads && a.kv_heads == b.kv_heads && a.key_dim == b.key_dim && a.value_dim == b.value_dim &&
         a.window == b.window && a.looks_ahead == b.looks_ahead;
}

template <class T, class W>
struct Run {
  typedef typename T::Stored Stored;
  // Whether rows can enter products in bundles. Where tiles multiply bytes, that is for matrices with a format alone.
  static constexpr bool kBundles = takes_bundles<W>() || std::is_same<W, Int8>::value;
  // How rows are multiplied that are no whole bundles, and how an embedding is read.
  typedef typename std::conditional<kBundles, Int8, W>::type Plain;
  typedef typename Plain::Weight Input;  // one step of a row that enters a product
  // Whether what attention writes can enter a product as it is.
  static constexpr bool kSame = std::is_same<typename T::Weight, Input>::value && T::kPair == Plain::kPair &&
                                sizeof(Input) == sizeof(Stored) * T::kPair;
  struct Entering {  // rows, one after the other
    Input *plain;
    Bundle *bundles;  // the same numbers, where they enter products so
  };

  const Decoder &decoder;
  const DecoderStep &step;
  const int64_t tokens, threads;
  bool bundled = takes_bundles<W>();  // whether they do
  bool halved = false;                // whether sums of their halves are wanted
  int64_t qkv_width = 0, heads_width = 0, attended_width = 0, most_top = 0, most_experts = 0, most_scores = 0,
          expert_inner = 0;
  float *hidden, *branch, *qkv;
  Entering normed, inner, widened;
  // Of layers with latents. Rows of a head, one for each token, lie together where they enter products of its own.
  int64_t asked_width = 0, asking_width = 0, absorbing_width = 0, leaving_width = 0, valued_width = 0, most_heads = 0;
  float *asked;                                // (tokens, asked_width) queries, where they are a product by itself
  Entering asking, absorbing, leaving, valued;  // what makes queries; queries, what was attended to, by head; values
  int32_t *head_first, *every_head;            // (heads + 1), (heads): as `first` and `busy`
  Stored *heads, *attended;
  // Of a layer with experts. What is sent to them is sorted by expert: `sent` rows, `top` for each token.
  float *scores, *shares, *answers;  // (tokens, outputs of the router), (sent), (sent, hidden)
  int32_t *chosen, *place;           // (tokens, top): experts in ascending order; where they are among those sent
  int32_t *owner, *first, *busy;     // (sent): which entry of `chosen`; (experts + 1); experts that something is sent to
  // How many of `busy` there are, for each layer by itself: a thread may come to a phase after the others have gone on,
  // into the next layer, and must then still find how many items the phase had.
  std::vector<int64_t> num_busy;
  Entering sent, sent_inner;
  float *low;  // (tokens, low_width): the inputs of a product behind the first factor of each token's adapter
  int64_t low_width = 0;
  uint16_t *widened_weights;  // (threads, what an item has of them), where tiles multiply bytes
  int64_t widened_count = 0;
#if HAS_TILES
  BundleTiles *bundle_tiles;  // (threads), where they multiply bundles
#endif
  std::vector<PaddedPhase> phases;
  std::deque<Step<T>> attention;

  Run(const Decoder &d, const DecoderStep &s)
      : decoder(d), step(s), tokens(s.plan->tokens), threads(s.plan->threads), num_busy(size_t(d.num_layers)), phases(size_t(d.num_layers * 36 + 4)) {
    for (int64_t i = 0; i < s.num_pieces; ++i)
      for (int64_t place = 0; place < kPlaces * d.num_layers; ++place)
        low_width = std::max(low_width, round_up(s.adapters[s.pieces[i].adapter][place].down.outputs, kLanes));
    for (int64_t i = 0; i < d.num_layers; ++i) {
      const Layer &a = d.layers[i].attention;
      const Experts &e = d.layers[i].experts;
      most_top = std::max(most_top, e.top);
      most_experts = std::max(most_experts, e.count);
      most_scores = std::max(most_scores, round_up(e.router.outputs, kLanes));
      expert_inner = std::max(expert_inner, e.down.inputs);
      const Latents &l = d.layers[i].latents;
      if (l.rank) {
        const int64_t queries = a.heads * (l.plain + a.key_dim - l.rank);
        qkv_width = std::max(qkv_width, round_up((l.query.weights ? l.query.inputs : queries) + a.key_dim, kLanes));
        heads_width = std::max(heads_width, (a.heads + 1) * a.key_dim);
        asked_width = std::max(asked_width, l.query.weights ? queries : 0);
        asking_width = std::max(asking_width, l.query.inputs);
        absorbing_width = std::max(absorbing_width, a.heads * l.plain);
        leaving_width = std::max(leaving_width, a.heads * l.rank);
        valued_width = std::max(valued_width, l.out_of.outputs);
        most_heads = std::max(most_heads, a.heads);
      } else {
        const int64_t width = a.heads * a.key_dim + a.kv_heads * (a.key_dim + a.value_dim);
        qkv_width = std::max(qkv_width, width);
        heads_width = std::max(heads_width, width);
      }
      attended_width = std::max(attended_width, a.heads * a.value_dim);
      for (const Matrix *each : {&d.layers[i].qkv, &d.layers[i].output, &d.layers[i].gate_up, &d.layers[i].down, &e.gate_up,
                                 &e.down, &l.query, &l.into, &l.out_of})
        expect(*each);
    }
    expect(d.head);
    if (std::is_same<Plain, Int8>::value && by_tiles<Plain>()) {
      const int64_t inputs = std::max({decoder.hidden, decoder.intermediate, attended_width, expert_inner, asking_width,
                                       valued_width});
      widened_count = std::max(kManyRowsItemBytes / 2, kMostCols * kLanes * inputs);
    }
  }

  void expect(const Matrix &matrix) {
    bundled = bundled || matrix.format;
    halved = halved || (is_fine(matrix) && matrix.format->zeros);
  }

  int64_t arrange(char *base) {
    Memory memory{base};
    const int64_t rows = std::max(tokens, step.samples);
    const auto take = [&](int64_t count, int64_t width, bool plain = true) {
      Entering entering;
      entering.plain = memory.take<Input>(plain ? count * (width / Plain::kPair) : 0);
      entering.bundles = memory.take<Bundle>(kBundles && bundled ? count * (width / kBundle) : 0);
      return entering;
    };
    hidden = memory.take<float>(tokens * decoder.hidden);
    branch = memory.take<float>(tokens * decoder.hidden);
    qkv = memory.take<float>(tokens * qkv_width);
    normed = take(rows, decoder.hidden);
    inner = take(tokens, decoder.intermediate);
    widened = take(tokens, attended_width, !kSame);
    asked = memory.take<float>(tokens * asked_width);
    asking = take(tokens, asking_width);
    absorbing = take(tokens, absorbing_width);
    leaving = take(tokens, leaving_width);
    valued = take(tokens, valued_width);
    head_first = memory.take<int32_t>(most_heads + 1);
    every_head = memory.take<int32_t>(most_heads);
    heads = memory.take<Stored>(tokens * heads_width);
    attended = memory.take<Stored>(tokens * attended_width);
    const int64_t rows_sent = tokens * most_top;
    scores = memory.take<float>(tokens * most_scores);
    shares = memory.take<float>(rows_sent);
    answers = memory.take<float>(rows_sent * decoder.hidden);
    chosen = memory.take<int32_t>(rows_sent);
    place = memory.take<int32_t>(rows_sent);
    owner = memory.take<int32_t>(rows_sent);
    first = memory.take<int32_t>(most_experts + 1);
    busy = memory.take<int32_t>(most_experts);
    sent = take(rows_sent, decoder.hidden);
    sent_inner = take(rows_sent, expert_inner);
    low = memory.take<float>(tokens * low_width);
    widened_weights = memory.take<uint16_t>(threads * widened_count);
#if HAS_TILES
    bundle_tiles = memory.take<BundleTiles>(kBundles && bundled && tiles_allowed() ? threads : 0);
#endif
    return memory.used;
  }

  bool prepare(Buffer &memory) {
    char *base = memory.at_least(size_t(arrange(nullptr)));
    if (base) arrange(base);
    for (int64_t h = 0; base && h <= most_heads; ++h) {
      head_first[h] = int32_t(h * tokens);
      if (h < most_heads) every_head[h] = int32_t(h);
    }
    return base;
  }

  bool prepare(Buffer &memory, Buffer &scratch, Buffer &partials, std::deque<Tiles> &shared) {
    if (!prepare(memory)) return false;
    shared.clear();
    for (int64_t i = 0; i < decoder.num_layers; ++i) {
      const DecoderLayer &layer = decoder.layers[i];
      const Layer &a = layer.attention;
      const Stored *keys = heads + a.heads * a.key_dim;
      const Stored *values = layer.latents.rank ? keys : keys + a.kv_heads * a.key_dim;
      const Call call = {heads,  heads_width, a.key_dim,   keys,        heads_width, a.key_dim,
                         values, heads_width, a.value_dim, layer.sinks, attended};
      Tiles *tiles = nullptr;
      for (Tiles &known : shared)
        if (same_shape(*known.like, a)) tiles = &known;
      const bool first = !tiles;
      if (first) {
        shared.push_back({&a, {}, {}});
        tiles = &shared.back();
      }
      attention.emplace_back(a, *step.plan, call, tiles->tiles, tiles->units);
      Step<T> &mine = attention.back();
      if (first)
        mine.measure();
      else
        mine.measure_like(attention[index_of(tiles->like)]);
    }
    int64_t most_scratch = 0, most_partials = 0;
    for (Step<T> &each : attention) {
      most_scratch = std::max(most_scratch, each.scratch_bytes * threads);
      most_partials = std::max(most_partials, each.partial_bytes());
    }
    char *scratch_base = scratch.at_least(size_t(most_scratch)), *partial_base = partials.at_least(size_t(most_partials));
    if (!scratch_base || (most_partials && !partial_base)) return false;
    for (Step<T> &each : attention) each.use(scratch_base, partial_base);
    return true;
  }

  size_t index_of(const Layer *layer) const {
    for (int64_t i = 0; i < decoder.num_layers; ++i)
      if (&decoder.layers[i].attention == layer) return size_t(i);
    return 0;
  }

  // -- products

  template <class M>
  static bool by_tiles() {
#if HAS_TILES
    return (std::is_same<M, BFloat16>::value || std::is_same<M, Int8>::value) && tiles_allowed();
#else
    return false;
#endif
  }

  // Whether bundles of many rows are multiplied in tiles, which give them the same bits.
  template <class M>
  static bool bundles_by_tiles() {
#if HAS_TILES
    return takes_bundles<M>() && tiles_allowed();
#else
    return false;
#endif
  }

  struct Adapting;

  // What becomes of outputs: `each(row, group, cols, sums)` gets `cols` vectors of them. By reference and called through
  // a pointer, so that products are compiled once for all that may become of them.
  class Outcome {
   public:
    template <class Each>
    Outcome(const Each &each)
        : owner(&each), over([](const void *of, int64_t row, int64_t count, int64_t group, int64_t cols, float *sums,
                                int64_t sum_stride) {
            for (int64_t r = 0; r < count; ++r)
              (*static_cast<const Each *>(of))(row + r, group, cols, sums + r * sum_stride);
          }) {}
    Outcome(const Adapting &adapting)  // all rows at once
        : owner(&adapting), over([](const void *of, int64_t row, int64_t count, int64_t group, int64_t cols, float *sums,
                                    int64_t sum_stride) {
            (*static_cast<const Adapting *>(of))(row, count, group, cols, sums, sum_stride);
          }) {}
    void operator()(int64_t row, int64_t count, int64_t group, int64_t cols, float *sums, int64_t sum_stride) const {
      over(owner, row, count, group, cols, sums, sum_stride);
    }

   private:
    const void *owner;
    void (*over)(const void *, int64_t, int64_t, int64_t, int64_t, float *, int64_t);
  };

  // Groups `begin` to `last` of a matrix's outputs, counted from group `from`, for some rows, the first of which is the
  // outcome's `first_row`. `M` is W, unless a matrix is stored otherwise.
  template <class M>
  void part(const Matrix &matrix, int64_t from, int64_t begin, int64_t last, const typename M::Weight *inputs,
            int64_t rows, int64_t first_row, const Outcome &outcome) {
#if HAS_TILES
    if constexpr (M::kPair == 2)
      if (by_tiles<M>()) return part_by_tiles<M>(matrix, from, begin, last, inputs, rows, first_row, outcome);
    if constexpr (takes_bundles<M>())
      if (const int64_t tiled = bundles_by_tiles<M>() ? rows_for_tiles(rows, bits_of<M>()) : 0; tiled) {
        multiply_bundles_in_tiles<M>(matrix, from, begin, last, inputs, tiled, first_row, outcome);
        if (tiled == rows) return;
        inputs += tiled * (matrix.inputs / kBundle);
        first_row += tiled;
        rows -= tiled;
      }
#endif
    alignas(64) float sums[kSums * kLanes];
    const int64_t steps = matrix.inputs / M::kPair, group_stride = stride_of<M>(matrix);
    const int64_t chunks = chunks_of<M>(rows), most_cols = cols_of<M>(int((rows + chunks - 1) / chunks));
    const auto *weights = static_cast<const typename M::Stored *>(matrix.weights) + from * group_stride;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t row = rows * i / chunks, count = rows * (i + 1) / chunks - row;
      for (int64_t group = begin, cols; group < last; group += cols) {
        cols = std::min<int64_t>(most_cols, cols_of<M>(int(count)));
        while (cols > last - group) cols /= 2;
        if constexpr (takes_bundles<M>()) {
          // The next groups, or those that the thread will probably come to with its next item.
          const int64_t next = group + cols < last ? cols : threads * (last - begin) - (group - begin);
          bundle_products<M>.of[count][cols](inputs + row * steps, steps, weights + group * group_stride, group_stride,
                                             matrix.format, steps, sums, cols * kLanes, i ? 0 : next * group_stride);
        } else {
          products<M>.of[count][cols](inputs + row * steps, steps, weights + group * group_stride, group_stride, steps,
                                      sums, cols * kLanes, i ? 0 : kAhead);
        }
        scale_and_shift(matrix, (from + group) * kLanes, count, cols, sums, cols * kLanes);
        outcome(first_row + row, count, group, cols, sums, cols * kLanes);
      }
    }
  }

  // What one vector of outputs has of a matrix.
  template <class M>
  static int64_t stride_of(const Matrix &matrix) {
    if constexpr (takes_bundles<M>() && !std::is_same<M, BundledInt8>::value)
      return matrix.format->stride;
    else
      return matrix.inputs * kLanes;
  }

  // Sums become outputs, the first of which is `output`.
  static void scale_and_shift(const Matrix &matrix, int64_t output, int64_t rows, int64_t cols, float *sums,
                              int64_t sum_stride) {
    if (!matrix.scales && !matrix.bias) return;
    for (int64_t c = 0; c < cols * kLanes; c += kLanes) {
      const Vec scales = matrix.scales ? load<Vec>(matrix.scales + output + c) : splat(1.0f);
      const Vec bias = matrix.bias ? load<Vec>(matrix.bias + output + c) : splat(-0.0f);
      for (int64_t r = 0; r < rows; ++r)
        store(sums + r * sum_stride + c, load<Vec>(sums + r * sum_stride + c) * scales + bias);
    }
  }

#if HAS_TILES
  template <class M>
  void multiply_bundles_in_tiles(const Matrix &matrix, int64_t from, int64_t begin, int64_t last, const Bundle *inputs,
                                 int64_t rows, int64_t first_row, const Outcome &outcome) const {
    BundleTiles &room = bundle_tiles[omp_get_thread_num()];
    const int64_t bundles = matrix.inputs / kBundle, stride = stride_of<M>(matrix);
    const char *weights = static_cast<const char *>(matrix.weights) + from * stride;
    for (int64_t row = 0; row < rows; row += kTileBlocks * kTile)
      for (int64_t group = begin; group < last; group += kTileGroups) {
        const int64_t count = std::min<int64_t>(rows - row, kTileBlocks * kTile);
        const int64_t cols = std::min<int64_t>(last - group, kTileGroups);
        multiply_in_tiles<bits_of<M>(), group_of<M>()>(inputs + row * bundles, bundles, count, weights + group * stride,
                                                       stride, cols, matrix.format, room);
        scale_and_shift(matrix, (from + group) * kLanes, count, cols, room.sums[0], kSumStride);
        outcome(first_row + row, count, group, cols, room.sums[0], kSumStride);
      }
  }

  static const uint16_t *widen_weights(const uint16_t *stored, int64_t, int64_t) { return stored; }

  // In this thread's own memory, which stays in its cache; at the same places, counted from what is returned.
  const uint16_t *widen_weights(const int8_t *stored, int64_t begin, int64_t end) const {
    uint16_t *to = widened_weights + omp_get_thread_num() * widened_count - begin;
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      prefetch(reinterpret_cast<const char *>(stored + i) + kAhead);
      _mm512_store_si512(to + i, Int8::operand(stored + i));
    }
    return to;
  }

  template <class M>
  void part_by_tiles(const Matrix &matrix, int64_t from, int64_t begin, int64_t last, const Input *inputs, int64_t rows,
                     int64_t first_row, const Outcome &outcome) const {
    alignas(64) float sums[4 * kTile * kTile];
    const int64_t steps = matrix.inputs / M::kPair, group_stride = steps * kLanes * M::kPair;
    const auto *stored = static_cast<const typename M::Stored *>(matrix.weights) + from * group_stride;
    if (rows <= (std::is_same<M, Int8>::value ? 2 * kFewRows : kFewRows)) {  // to widen bytes for tiles pays off later
      const int64_t chunks = (rows + kFewRows - 1) / kFewRows;
      for (int64_t group = begin, cols; group < last; group += cols) {
        cols = few_cols_of(int(rows));
        while (cols > last - group) cols /= 2;
        for (int64_t i = 0; i < chunks; ++i) {
          const int64_t row = rows * i / chunks, count = rows * (i + 1) / chunks - row;
          few_rows_products<M>.of[count][cols](inputs + row * steps, steps, stored + group * group_stride, group_stride,
                                               steps, sums, cols * kLanes, i ? 0 : kAhead);
          scale_and_shift(matrix, (from + group) * kLanes, count, cols, sums, cols * kLanes);
          outcome(first_row + row, count, group, cols, sums, cols * kLanes);
        }
      }
      return;
    }
    const uint16_t *weights = widen_weights(stored, begin * group_stride, last * group_stride);
    const FetchWeights<typename M::Stored> fetch{weights, stored + threads * (last - begin) * group_stride};
    // What is left behind the last whole tile is copied beside zeros.
    alignas(64) Input last_rows[2 * kTile * kTile] = {};
    alignas(64) uint16_t last_lanes[4][kTileNumbers] = {};
    const int64_t whole = steps / kTile, left = steps % kTile;
    for (int64_t row = 0; row < rows; row += 2 * kTile) {
      const int64_t count = std::min<int64_t>(rows - row, 2 * kTile), wide = count > kTile ? 2 : 4;
      if (row == 0 || count < 2 * kTile) configure_tiles(int(count));
      TileOperands runs[] = {{inputs + row * steps, steps, {}, 4 * kTile, whole},
                             {last_rows, kTile, {}, 4 * kTile, left ? 1 : 0}};
      for (int64_t r = 0; left && r < count; ++r)
        std::memcpy(last_rows + r * kTile, inputs + (row + r) * steps + whole * kTile, size_t(left) * sizeof(Input));
      for (int64_t group = begin; group < last; group += wide) {
        for (int64_t c = 0; c < 4; ++c) {  // the last one again in the place of those that there are not
          runs[0].lanes[c] = weights + std::min(group + c, last - 1) * group_stride;
          runs[1].lanes[c] = last_lanes[c];
          std::memcpy(last_lanes[c], runs[0].lanes[c] + whole * kTileNumbers, size_t(left * kLanes) * 4);
        }
        if (wide == 2)
          multiply_tall(runs, sums, row == 0, fetch);
        else
          multiply_flat(runs, 2, {sums, sums + kTile, sums + 2 * kTile, sums + 3 * kTile}, 4 * kTile, false,
                        fetch);
        const int64_t cols = std::min(wide, last - group);
        scale_and_shift(matrix, (from + group) * kLanes, count, cols, sums, wide * kLanes);
        outcome(first_row + row, count, group, cols, sums, wide * kLanes);
      }
    }
  }
#endif

  // How many groups of outputs a thread takes at a time. What an item has of the weights stays in the cache while its
  // rows pass; the items are small enough for the threads to end together.
  template <class M>
  int64_t groups_each(const Matrix &matrix, int64_t groups, int64_t least, int64_t row_parts = 1) const {
    constexpr int64_t kStored = sizeof(typename M::Stored);
    const int64_t bytes = stride_of<M>(matrix) * (by_tiles<M>() && kStored == 1 ? 3 : kStored);  // widened ones beside them
    const int64_t most = row_parts > 1 ? kManyRowsItemBytes : kItemBytes;
    int64_t each = least;
    while (2 * each * bytes <= most && groups * row_parts >= 12 * threads * each) each *= 2;
    return each;
  }

  // A product over all rows.
  template <class M>
  void product(Phase &phase, const Matrix &matrix, const typename M::Weight *inputs, int64_t rows,
               const Outcome &outcome) {
    const int64_t groups = (matrix.outputs + kLanes - 1) / kLanes, chunks = chunks_of<M>(rows);
    const bool tiles = by_tiles<M>() || bundles_by_tiles<M>();
    const int64_t row_parts = tiles ? (rows + kRowsEach - 1) / kRowsEach : 1, steps = matrix.inputs / M::kPair;
    const int64_t each = groups_each<M>(matrix, groups, cols_of<M>(int((rows + chunks - 1) / chunks)), row_parts);
    const int64_t items = (groups + each - 1) / each * row_parts;
    phase.run(items, [&](int64_t item) {
      const int64_t begin = item / row_parts * each, row = item % row_parts * kRowsEach;
      part<M>(matrix, 0, begin, std::min(groups, begin + each), inputs + row * steps,
              row_parts > 1 ? std::min(rows - row, kRowsEach) : rows, row, outcome);
    });
    phase.wait(items);
  }

  // Whether rows of so many numbers enter products in bundles.
  bool are_bundles(int64_t inputs) const { return kBundles && bundled && inputs % kBundle == 0; }

  static bool is_fine(const Matrix &matrix) { return matrix.format && matrix.format->group < kBundle; }

  // The same, whatever the matrix is stored in.
  void product_of(Phase &phase, const Matrix &matrix, const Entering &inputs, int64_t rows, const Outcome &outcome) {
    if constexpr (std::is_same<W, Int4>::value)
      if (matrix.format && matrix.format->bits == 4) return product<Int4>(phase, matrix, inputs.bundles, rows, outcome);
    if constexpr (kBundles) {
      if (is_fine(matrix)) return product<FineInt8>(phase, matrix, inputs.bundles, rows, outcome);
      if (matrix.format) return product<GroupedInt8>(phase, matrix, inputs.bundles, rows, outcome);
    }
    if constexpr (takes_bundles<W>())
      if (are_bundles(matrix.inputs)) return product<BundledInt8>(phase, matrix, inputs.bundles, rows, outcome);
    product<Plain>(phase, matrix, inputs.plain, rows, outcome);
  }

  // -- adapters

  // int8 leaves out what is as small as this, and the router of experts.
  typedef typename std::conditional<std::is_same<Plain, Int8>::value, RouterOfInt8, W>::type Small;

  enum Place { kQkv, kOutput, kGateUp, kDown, kRouter, kQuery, kPlaces };

  // A product over all tokens, and what their adapters add to it.
  template <class Next>
  void adapted_product(Next next, int64_t layer, Place place, const Matrix &matrix, const Entering &inputs,
                       const Outcome &outcome) {
    const auto multiply = [&](const Outcome &then) {
      if (place == kRouter) return product<Small>(next(), matrix, inputs.plain, tokens, then);
      product_of(next(), matrix, inputs, tokens, then);
    };
    if (!step.num_pieces) return multiply(outcome);
    const int64_t at = kPlaces * layer + place;
    rows(next(), step.num_pieces, [&](int64_t i) {
      const AdaptedPiece &piece = step.pieces[i];
      const Matrix &down = step.adapters[piece.adapter][at].down;
      if (!down.weights) return;
      part<Small>(down, 0, 0, (down.outputs + kLanes - 1) / kLanes,
                  inputs.plain + piece.first * (down.inputs / Small::kPair), piece.count, piece.first, [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                    copy(low + row * low_width + group * kLanes, sums, cols);
                  });
    });
    multiply(Adapting{*this, at, outcome});
  }

  // What adapters add to outputs before anything else becomes of them.
  struct Adapting {
    const Run &run;
    const int64_t at;
    const Outcome &outcome;

    void operator()(int64_t row, int64_t count, int64_t group, int64_t cols, float *sums, int64_t sum_stride) const {
      const int32_t *adapters = run.step.token_adapters + row;
      for (int64_t r = 0, rows; r < count; r += rows) {
        rows = count - r >= 4 && std::all_of(adapters + r, adapters + r + 4, [&](int32_t a) { return a == adapters[r]; }) ? 4 : 1;
        if (adapters[r] < 0) continue;
        const AdaptedMatrix &matrix = run.step.adapters[adapters[r]][at];
        if (!matrix.down.weights) continue;
        for (int64_t c = 0; c < cols; ++c) {
          const int64_t first = matrix.first[group + c];
          if (first < 0) continue;
          const float *from = run.low + (row + r) * run.low_width + first;
          (rows == 4 ? add<4> : add<1>)(matrix.up, group + c, from, run.low_width, sums + r * sum_stride + c * kLanes, sum_stride);
        }
      }
      outcome(row, count, group, cols, sums, sum_stride);
    }

    template <int Rows>
    static void add(const Matrix &up, int64_t group, const float *from, int64_t stride, float *sums, int64_t sum_stride) {
      const auto *weights = static_cast<const typename Small::Stored *>(up.weights) + group * up.inputs * kLanes;
      Vec sum[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sum[r] = load<Vec>(sums + r * sum_stride);
      for (int64_t i = 0; i < up.inputs; i += Small::kPair, weights += kLanes * Small::kPair) {
        if constexpr (Small::kPair == 2) {
          const Words pairs = load<Words>(weights);
          const Vec even = (Vec)(pairs << 16), odd = (Vec)(pairs & 0xffff0000u);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r)
            sum[r] = fused(splat(from[r * stride + i + 1]), odd, fused(splat(from[r * stride + i]), even, sum[r]));
        } else {
          const Vec column = Small::operand(weights);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r) sum[r] = fused(splat(from[r * stride + i]), column, sum[r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) store(sums + r * sum_stride, sum[r]);
    }
  };

  size_t number_of(const Experts &experts) const {
    size_t layer = 0;
    while (&decoder.layers[layer].experts != &experts) ++layer;
    return layer;
  }

  struct Sorted {  // rows, each of which is multiplied with one of several parts of a matrix: experts, or heads
    int64_t count;         // parts
    const int32_t *first;  // (count + 1) of the rows of each
    const int32_t *busy;   // those that have some
    int64_t asked;         // how many these are
  };

  Sorted by_expert(const Experts &experts) const { return {experts.count, first, busy, num_busy[number_of(experts)]}; }

  Sorted by_head(int64_t count) const { return {count, head_first, every_head, count}; }

  // A product of the rows of each part with that part of the matrix.
  template <class M>
  void sorted_product(Phase &phase, const Sorted &sorted, const Matrix &matrix, const typename M::Weight *inputs,
                      const Outcome &outcome) {
    const int64_t groups = matrix.outputs / sorted.count / kLanes, steps = matrix.inputs / M::kPair;
    const int64_t each = groups_each<M>(matrix, groups * sorted.asked, kMostCols);
    const int64_t parts = (groups + each - 1) / each;
    phase.run(sorted.asked * parts, [&](int64_t item) {
      const int64_t at = sorted.busy[item / parts], begin = item % parts * each, start = sorted.first[at];
      part<M>(matrix, at * groups, begin, std::min(groups, begin + each), inputs + start * steps,
              sorted.first[at + 1] - start, start, outcome);
    });
    phase.wait(sorted.asked * parts);
  }

  void sorted_product_of(Phase &phase, const Sorted &sorted, const Matrix &matrix, const Entering &inputs,
                         const Outcome &outcome) {
    if constexpr (std::is_same<W, Int4>::value)
      if (matrix.format && matrix.format->bits == 4)
        return sorted_product<Int4>(phase, sorted, matrix, inputs.bundles, outcome);
    if constexpr (kBundles) {
      if (is_fine(matrix)) return sorted_product<FineInt8>(phase, sorted, matrix, inputs.bundles, outcome);
      if (matrix.format) return sorted_product<GroupedInt8>(phase, sorted, matrix, inputs.bundles, outcome);
    }
    if constexpr (takes_bundles<W>())
      if (are_bundles(matrix.inputs)) return sorted_product<BundledInt8>(phase, sorted, matrix, inputs.bundles, outcome);
    sorted_product<Plain>(phase, sorted, matrix, inputs.plain, outcome);
  }

  static void copy(float *to, const float *sums, int64_t cols) {
    for (int64_t c = 0; c < cols * kLanes; c += kLanes) store(to + c, load<Vec>(sums + c));
  }

  // hidden += outputs, or where a norm comes in between, branch = outputs.
  void add(int64_t row, int64_t group, int64_t cols, const float *sums, bool norm_follows) const {
    float *to = (norm_follows ? branch : hidden) + row * decoder.hidden + group * kLanes;
    const float scale = float(decoder.residual_scale);
    for (int64_t c = 0; c < cols * kLanes; c += kLanes)
      store(to + c, norm_follows ? load<Vec>(sums + c) : load<Vec>(to + c) + load<Vec>(sums + c) * scale);
  }

  void activate_inner(const DecoderLayer &layer, int64_t row, int64_t group, int64_t cols, const float *sums) const {
    Input *to = inner.plain + row * (layer.down.inputs / Plain::kPair);
    if (!layer.gated) {
      for (int64_t c = 0; c < cols; ++c)
        Plain::pack_vector(to + (group + c) * (kLanes / Plain::kPair),
                           activate(load<Vec>(sums + c * kLanes), decoder.activation));
      return;
    }
    activate_pairs(to, group, cols, sums, decoder.activation, 0, 0);
  }

  static void activate_pairs(Input *to, int64_t group, int64_t cols, const float *sums, int64_t kind, float alpha,
                             float limit) {
    for (int64_t c = 0; c < cols; c += 2) {  // gate, up
      const Vec gate = load<Vec>(sums + c * kLanes), up = load<Vec>(sums + (c + 1) * kLanes);
      Plain::pack_vector(to + (group + c) / 2 * (kLanes / Plain::kPair), gated(gate, up, kind, alpha, limit));
    }
  }

  // -- experts

  // To which experts a token is sent, in ascending order, and what their answers are multiplied by.
  void choose(int64_t token, const Experts &experts) const {
    float *score = scores + token * round_up(experts.router.outputs, kLanes), *share = shares + token * experts.top;
    int32_t *mine = chosen + token * experts.top;
    const int64_t count = experts.count, each = count / experts.groups;
    if (experts.sigmoid) {
      for (int64_t i = 0; i < count; ++i) score[i] = sigmoid(score[i]);
    } else if (experts.correction) {  // which is added to the softmax
      const float most = *std::max_element(score, score + count);
      float all = 0;
      for (int64_t i = 0; i < count; ++i) all += score[i] = std::exp(score[i] - most);
      for (int64_t i = 0; i < count; ++i) score[i] /= all;
    }
    const auto by = [&](int64_t i) { return experts.correction ? score[i] + experts.correction[i] : score[i]; };
    const bool limited = experts.groups_asked < experts.groups;
    uint64_t open = 0;  // groups that are chosen from
    for (int64_t k = 0; limited && k < experts.groups_asked; ++k) {
      int64_t best = -1;
      float highest = 0;
      for (int64_t group = 0; group < experts.groups; ++group) {
        if (open >> group & 1) continue;
        float first_two[2] = {-kInfinity, -kInfinity};
        for (int64_t i = group * each; i < (group + 1) * each; ++i) {
          first_two[1] = std::max(first_two[1], std::min(first_two[0], by(i)));
          first_two[0] = std::max(first_two[0], by(i));
        }
        const float sum = first_two[0] + first_two[1];
        if (best < 0 || sum > highest) best = group, highest = sum;
      }
      open |= uint64_t(1) << best;
    }
    for (int64_t k = 0; k < experts.top; ++k) {
      int64_t best = -1;
      float most = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (limited && !(open >> i / each & 1)) continue;
        if ((best >= 0 && !(by(i) > most)) || std::find(mine, mine + k, int32_t(i)) != mine + k) continue;
        best = i, most = by(i);
      }
      mine[k] = int32_t(best);
    }
    const float highest = score[mine[0]], scale = float(experts.scale);
    std::sort(mine, mine + experts.top);
    float all = 0, own = 0;
    if (experts.sigmoid || experts.correction) {
      for (int64_t k = 0; k < experts.top; ++k) own += share[k] = score[mine[k]];
      all = 1;
    } else {
      for (int64_t i = 0; i < count; ++i) all += std::exp(score[i] - highest);
      for (int64_t k = 0; k < experts.top; ++k) own += share[k] = std::exp(score[mine[k]] - highest);
    }
    const float total = experts.chosen_first || experts.normalised ? std::max(own, 1e-20f) : all;
    for (int64_t k = 0; k < experts.top; ++k) share[k] = share[k] / total * scale;
  }

  // Sorts what is sent by expert, and within each by token.
  void arrange(const Experts &experts) {
    const int64_t count = tokens * experts.top;
    std::fill_n(first, experts.count + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++first[chosen[i] + 1];
    int64_t asked = 0;
    for (int64_t i = 0; i < experts.count; ++i) {
      if (first[i + 1]) busy[asked++] = int32_t(i);
      first[i + 1] += first[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t at = first[chosen[i]]++;
      place[i] = at;
      owner[at] = int32_t(i);
    }
    for (int64_t i = experts.count; i; --i) first[i] = first[i - 1];
    first[0] = 0;
    num_busy[number_of(experts)] = asked;
  }

  // What the answer of an MLP beside experts, which is in `branch`, is multiplied by.
  float share_beside(int64_t token, const Experts &experts) const {
    if (!experts.beside_gated) return float(experts.beside_scale);
    const float *score = scores + token * round_up(experts.router.outputs, kLanes);
    return float(experts.beside_scale) * sigmoid(score[round_up(experts.count, kLanes)]);
  }

  // The answers to a token, weighed and added up.
  void gather_answers(int64_t token, const DecoderLayer &layer) const {
    const int64_t top = layer.experts.top;
    const bool beside = layer.down.weights;
    const float share = beside ? share_beside(token, layer.experts) : 0.0f;
    for (int64_t i = 0; i < decoder.hidden; i += kLanes) {
      Vec sum = {};
      if (beside) sum = share * load<Vec>(branch + token * decoder.hidden + i);
      for (int64_t k = token * top; k < (token + 1) * top; ++k)
        sum = sum + shares[k] * load<Vec>(answers + place[k] * decoder.hidden + i);
      add(token, i / kLanes, 1, reinterpret_cast<const float *>(&sum), layer.after_mlp.weight);
    }
  }

  template <class Next>
  void ask_experts(Next next, int64_t i) {
    const DecoderLayer &layer = decoder.layers[i];
    const Experts &experts = layer.experts;
    // Whom a token is sent to must not hang on a byte's precision.
    const int64_t width = round_up(experts.router.outputs, kLanes);
    adapted_product(next, i, kRouter, experts.router, normed,
                    [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                      copy(scores + row * width + group * kLanes, sums, cols);
                    });
    rows(next(), tokens, [&](int64_t token) { choose(token, experts); });
    answer(next, experts);
    if (layer.down.weights)
      ask_mlp(next, i, [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
        copy(branch + row * decoder.hidden + group * kLanes, sums, cols);
      });
    rows(next(), tokens, [&](int64_t token) { gather_answers(token, layer); });
  }

  template <class Next>
  void ask_mlp(Next next, int64_t i, const Outcome &outcome) {
    const DecoderLayer &layer = decoder.layers[i];
    adapted_product(next, i, kGateUp, layer.gate_up, normed,
                    [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                      activate_inner(layer, row, group, cols, sums);
                    });
    bundle_rows(next, layer.down.inputs, inner, tokens);
    adapted_product(next, i, kDown, layer.down, inner, outcome);
  }

  // What each expert makes of what it is sent.
  template <class Next>
  void answer(Next next, const Experts &experts) {
    rows(next(), 1, [&](int64_t) { arrange(experts); });
    rows(next(), tokens * experts.top, [&](int64_t i) {
      const int64_t token = owner[i] / experts.top, steps = decoder.hidden / Plain::kPair;
      const int64_t bundles = decoder.hidden / kBundle;
      const bool bundles_sent = are_bundles(decoder.hidden);
      if (bundles_sent)
        std::memcpy(sent.bundles + i * bundles, normed.bundles + token * bundles, size_t(bundles) * sizeof(Bundle));
      if (!bundles_sent || !takes_bundles<W>())
        std::memcpy(sent.plain + i * steps, normed.plain + token * steps, size_t(steps) * sizeof(Input));
    });
    sorted_product_of(next(), by_expert(experts), experts.gate_up, sent,
                    [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                      activate_pairs(sent_inner.plain + row * (experts.down.inputs / Plain::kPair), group, cols, sums,
                                     experts.activation, float(experts.alpha), float(experts.limit));
                    });
    bundle_rows(next, experts.down.inputs, sent_inner, tokens * experts.top);
    sorted_product_of(next(), by_expert(experts), experts.down, sent_inner,
                    [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                      copy(answers + row * decoder.hidden + group * kLanes, sums, cols);
                    });
  }

  // -- rows

  template <class Body>
  void rows(Phase &phase, int64_t count, Body body) {
    phase.run(count, body);
    phase.wait(count);
  }

  // The embedding is packed like the weights of a product: an output is a token, an input a dimension.
  void embed(int64_t token) const {
    float *to = hidden + token * decoder.hidden;
    if (step.seen && step.seen[token] >= 0) {
      std::copy_n(step.images + step.seen[token] * decoder.hidden, decoder.hidden, to);
      return;
    }
    const Matrix &matrix = decoder.embedding;
    const int64_t id = step.token_ids[token], steps = decoder.hidden / Plain::kPair;
    const int64_t stride = steps * kLanes * Plain::kPair * int64_t(sizeof(typename Plain::Stored));
    const char *stored = static_cast<const char *>(matrix.weights) + id / kLanes * (matrix.format ? matrix.format->stride : stride);
    const auto *from = reinterpret_cast<const typename Plain::Stored *>(stored);
    const float scale = float(decoder.embedding_scale) * (matrix.scales ? matrix.scales[id] : 1.0f);
    for (int64_t i = 0; i < steps; ++i, from += kLanes * Plain::kPair)
      for (int p = 0; p < Plain::kPair; ++p)
        to[i * Plain::kPair + p] = Plain::widen(from[place_of<Plain>(id % kLanes, p)]) * scale;
    if (matrix.format) {  // bytes, which lie as those without one; their scales and zeros come behind them
      const auto *scales = reinterpret_cast<const uint16_t *>(stored + stride) + id % kLanes;
      const auto *zeros = scales + decoder.hidden / matrix.format->group * kLanes;
      for (int64_t i = 0; i < decoder.hidden; ++i) {
        const int64_t at = i / matrix.format->group * kLanes;
        if (matrix.format->zeros) to[i] -= Float16::widen(zeros[at]) * scale;
        to[i] *= Float16::widen(scales[at]);
      }
    }
    if (!decoder.positions) return;
    const float *added = decoder.positions + step.positions[token] * decoder.hidden;
    for (int64_t i = 0; i < decoder.hidden; ++i) to[i] += added[i];
  }

  void enter(const float *x, const Norm &norm, Input *to) const {
    if (norm.weight) {
      const Normed row(x, decoder.hidden, norm);
      for (int64_t i = 0; i < decoder.hidden; i += kLanes) Plain::pack_vector(to + i / Plain::kPair, row.at(i));
    } else {
      for (int64_t i = 0; i < decoder.hidden; i += kLanes) Plain::pack_vector(to + i / Plain::kPair, load<Vec>(x + i));
    }
  }

  void enter_next(int64_t token, const Norm &norm) const {
    enter(hidden + token * decoder.hidden, norm, normed.plain + token * (decoder.hidden / Plain::kPair));
    bundle(normed, token, decoder.hidden);
  }

  // One of the rows that enter products, in bundles where it can.
  void bundle(const Entering &entering, int64_t row, int64_t width) const {
    if constexpr (kBundles) {
      if (!are_bundles(width)) return;
      const Input *from = entering.plain + row * (width / Plain::kPair);
      Bundle *to = entering.bundles + row * (width / kBundle);
      for (int64_t i = 0; i < width; i += kBundle) {
        Vec x[kBundle / kLanes];
#pragma GCC unroll 8
        for (int part = 0; part < kBundle / kLanes; ++part) x[part] = widen_input(from, i + part * kLanes);
        fill(to + i / kBundle, x, halved);
      }
    }
  }

  // All of them, once they are whole.
  template <class Next>
  void bundle_rows(Next next, int64_t width, const Entering &entering, int64_t count) {
    if (are_bundles(width)) rows(next(), count, [&](int64_t row) { bundle(entering, row, width); });
  }

  // hidden += norm(branch), where the branch has a norm of its own.
  void leave(int64_t token, const Norm &norm) const {
    if (!norm.weight) return;
    float *to = hidden + token * decoder.hidden;
    const float *x = branch + token * decoder.hidden;
    const float scale = float(decoder.residual_scale);
    const Normed row(x, decoder.hidden, norm);
    for (int64_t i = 0; i < decoder.hidden; i += kLanes) store(to + i, load<Vec>(to + i) + row.at(i) * scale);
  }

  void tap(int64_t layer, int64_t token) const {
    if (!step.taps || !step.taps[layer]) return;
    std::copy_n(hidden + token * decoder.hidden, decoder.hidden, step.taps[layer] + token * decoder.hidden);
  }

  // Hidden states as the head sees them, but not rounded, one after the other.
  void sum_up(int64_t pool) const {
    const Norm &norm = decoder.norm;
    float *to = step.pooled + pool * decoder.hidden;
    for (int64_t i = 0; i < decoder.hidden; ++i) to[i] = 0.0f;
    for (int64_t token = step.pool_spans[2 * pool]; token < step.pool_spans[2 * pool + 1]; ++token) {
      const float *x = hidden + token * decoder.hidden;
      if (norm.weight) {
        const Normed row(x, decoder.hidden, norm);
        for (int64_t i = 0; i < decoder.hidden; i += kLanes) store(to + i, load<Vec>(to + i) + row.at(i));
      } else {
        for (int64_t i = 0; i < decoder.hidden; i += kLanes) store(to + i, load<Vec>(to + i) + load<Vec>(x + i));
      }
    }
  }

  static void norm_heads(float *x, int64_t count, const Norm &norm) {
    if (!norm.weight) return;
    const int64_t size = norm.size ? norm.size : count;
    for (int64_t start = 0, weights = 0; start < count; start += size, weights += norm.stride) {
      const Normed head(x + start, size, norm, weights);
      for (int64_t i = 0; i < size; i += kLanes) store(x + start + i, head.at(i));
    }
  }

  template <class Number>  // one, or a vector of them
  static void rotate_numbers(float *first, float *second, const float *cosine, const float *sine) {
    const Number a = load<Number>(first), b = load<Number>(second), c = load<Number>(cosine), s = load<Number>(sine);
    const Number x = a * c - b * s, y = b * c + a * s;
    std::memcpy(first, &x, sizeof x);
    std::memcpy(second, &y, sizeof y);
  }

  void rotate(float *x, int64_t count, int64_t dim, const float *cosine, const float *sine) const {
    const int64_t half = decoder.rotary / 2;
    for (int64_t head = 0; head < count; head += dim) {
      float *first = x + head, *second = first + half;
      int64_t i = 0;
      if (decoder.pairs)
        for (; i < half; ++i) rotate_numbers<float>(first + 2 * i, first + 2 * i + 1, cosine + i, sine + i);
      for (; i + kLanes <= half; i += kLanes) rotate_numbers<Vec>(first + i, second + i, cosine + i, sine + i);
      for (; i < half; ++i) rotate_numbers<float>(first + i, second + i, cosine + i, sine + i);
    }
  }

  // Cosines and sines of a token.
  std::pair<const float *, const float *> turned(int64_t token, const DecoderLayer &layer) const {
    const int64_t at = (step.cosines ? token : int64_t(step.positions[token])) * (decoder.rotary / 2);
    return {(step.cosines ? step.cosines : layer.cosines) + at, (step.cosines ? step.sines : layer.sines) + at};
  }

  void position(int64_t token, const DecoderLayer &layer) const {
    if (layer.latents.rank) return position_latents(token, layer);
    const Layer &a = layer.attention;
    const int64_t q = a.heads * a.key_dim, k = a.kv_heads * a.key_dim, width = q + k + a.kv_heads * a.value_dim;
    float *x = qkv + token * qkv_width;
    norm_heads(x, q, layer.query_norm);
    norm_heads(x + q, k, layer.key_norm);
    if (layer.cosines) {
      const auto [cosines, sines] = turned(token, layer);
      rotate(x, q, a.key_dim, cosines, sines);
      rotate(x + q, k, a.key_dim, cosines, sines);
    }
    narrow_row<T>(heads + token * heads_width, x, width);
  }

  // -- latents

  // How many of the outputs of `qkv` come before latents.
  static int64_t before_latents(const DecoderLayer &layer) {
    const Latents &l = layer.latents;
    return l.query.weights ? l.query.inputs : layer.attention.heads * (l.plain + layer.attention.key_dim - l.rank);
  }

  // The key, and what queries are made of.
  void position_latents(int64_t token, const DecoderLayer &layer) const {
    const Latents &l = layer.latents;
    const Layer &a = layer.attention;
    float *x = qkv + token * qkv_width, *key = x + before_latents(layer);
    if (l.query.weights) {
      const int64_t width = l.query.inputs;
      norm_heads(x, width, l.query_norm);
      Input *to = asking.plain + token * (width / Plain::kPair);
      for (int64_t i = 0; i < width; i += kLanes) Plain::pack_vector(to + i / Plain::kPair, load<Vec>(x + i));
      bundle(asking, token, width);
    }
    norm_heads(key, l.rank, l.norm);
    if (layer.cosines) {
      const auto [cosines, sines] = turned(token, layer);
      rotate(key + l.rank, a.key_dim - l.rank, a.key_dim - l.rank, cosines, sines);
    }
    narrow_row<T>(heads + token * heads_width + a.heads * a.key_dim, key, a.key_dim);
  }

  // A query's rotated part goes to attention, the other enters the product with its head's matrix.
  void ask_latents(int64_t token, int64_t head, const DecoderLayer &layer) const {
    const Latents &l = layer.latents;
    const Layer &a = layer.attention;
    const int64_t rotated = a.key_dim - l.rank, row = head * tokens + token;
    float *x = (l.query.weights ? asked + token * asked_width : qkv + token * qkv_width) + head * (l.plain + rotated);
    if (layer.cosines) {
      const auto [cosines, sines] = turned(token, layer);
      rotate(x + l.plain, rotated, rotated, cosines, sines);
    }
    narrow_row<T>(heads + token * heads_width + head * a.key_dim + l.rank, x + l.plain, rotated);
    Input *to = absorbing.plain + row * (l.plain / Plain::kPair);
    for (int64_t i = 0; i < l.plain; i += kLanes) Plain::pack_vector(to + i / Plain::kPair, load<Vec>(x + i));
    bundle(absorbing, row, l.plain);
  }

  // From queries to latents.
  template <class Next>
  void enter_latents(Next next, int64_t i) {
    const DecoderLayer &layer = decoder.layers[i];
    const Layer &a = layer.attention;
    const Latents &l = layer.latents;
    if (l.query.weights)
      adapted_product(next, i, kQuery, l.query, asking, [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
        copy(asked + row * asked_width + group * kLanes, sums, cols);
      });
    rows(next(), tokens * a.heads, [&](int64_t item) { ask_latents(item / a.heads, item % a.heads, layer); });
    sorted_product_of(next(), by_head(a.heads), l.into, absorbing,
                      [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                        Stored *to = heads + row % tokens * heads_width + row / tokens * a.key_dim + group * kLanes;
                        narrow_row<T>(to, sums, cols * kLanes);
                      });
  }

  // From what was attended to to values.
  template <class Next>
  void leave_latents(Next next, const DecoderLayer &layer) {
    const Layer &a = layer.attention;
    const Latents &l = layer.latents;
    const int64_t width = l.out_of.outputs, each = width / a.heads;
    rows(next(), tokens * a.heads, [&](int64_t item) {
      const int64_t row = item % a.heads * tokens + item / a.heads;
      widen(attended + item * l.rank, leaving.plain + row * (l.rank / Plain::kPair), l.rank);
      bundle(leaving, row, l.rank);
    });
    sorted_product_of(next(), by_head(a.heads), l.out_of, leaving,
                      [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                        Input *to = valued.plain + (row % tokens * width + row / tokens * each) / Plain::kPair;
                        for (int64_t c = 0; c < cols; ++c)
                          Plain::pack_vector(to + (group + c) * (kLanes / Plain::kPair), load<Vec>(sums + c * kLanes));
                      });
    bundle_rows(next, width, valued, tokens);
  }

  // Rows in the type of what attends, as they enter a product: in their own place, or where there is room for them.
  static Entering entering_of(Stored *from, const Entering &room) {
    if constexpr (kSame)
      return {reinterpret_cast<Input *>(from), room.bundles};
    else
      return room;
  }

  // Brings them there.
  template <class Next>
  void enter_rows(Next next, const Stored *from, const Entering &to, int64_t width) {
    if (kSame && !are_bundles(width)) return;
    rows(next(), tokens, [&](int64_t row) {
      if (!kSame) widen(from + row * width, to.plain + row * (width / Plain::kPair), width);
      bundle(to, row, width);
    });
  }

  static void widen(const Stored *from, Input *to, int64_t width) {
    alignas(64) float lanes[kLanes];
    for (int64_t i = 0; i < width; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] = T::widen(from[i + j]);
      Plain::pack_vector(to + i / Plain::kPair, load<Vec>(lanes));
    }
  }

  // -- products by themselves

  void multiply(const Matrix &matrix, Stored *from, Stored *to) {
    size_t at = 0;
    auto next = [&]() -> Phase & { return phases[at++]; };
    const Entering entering = entering_of(from, inner);
    enter_rows(next, from, entering, matrix.inputs);
    product_of(next(), matrix, entering, tokens, [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
      const int64_t first = group * kLanes, count = std::min(cols * kLanes, matrix.outputs - first);
      narrow_row<T>(to + row * matrix.outputs + first, sums, count);
    });
    release_tiles();
  }

  // Notes to whom tokens are sent, (tokens, top); false if there is no such expert. `from` is what they are sent.
  bool send(const Experts &experts, const int64_t *to, const float *weights, Stored *from) {
    std::vector<std::pair<int64_t, float>> mine(size_t(experts.top));
    for (int64_t i = 0; i < tokens * experts.top; i += experts.top) {
      for (int64_t k = 0; k < experts.top; ++k) {
        if (to[i + k] < 0 || to[i + k] >= experts.count) return false;
        mine[size_t(k)] = {to[i + k], weights[i + k]};
      }
      std::sort(mine.begin(), mine.end());
      for (int64_t k = 0; k < experts.top; ++k) {
        chosen[i + k] = int32_t(mine[size_t(k)].first);
        shares[i + k] = mine[size_t(k)].second;
      }
    }
    normed = entering_of(from, normed);
    return true;
  }

  void ask(const DecoderLayer &layer, Stored *from, Stored *to) {
    size_t at = 0;
    auto next = [&]() -> Phase & { return phases[at++]; };
    enter_rows(next, from, normed, decoder.hidden);
    answer(next, layer.experts);
    rows(next(), tokens, [&](int64_t token) {
      float *sum = hidden + token * decoder.hidden;
      std::fill_n(sum, decoder.hidden, 0.0f);
      gather_answers(token, layer);
      narrow_row<T>(to + token * decoder.hidden, sum, decoder.hidden);
    });
    release_tiles();
  }

  // -- the step

  void work() {
    work_through();
    release_tiles();
  }

  void work_through() {
    Phase *phase = nullptr;
    size_t at = 0;
    auto next = [&]() -> Phase & { return *(phase = &phases[at++]); };
    rows(next(), tokens, [&](int64_t token) {
      embed(token);
      tap(0, token);
      enter_next(token, decoder.layers[0].before_attention);
    });
    for (int64_t i = 0; i < decoder.num_layers; ++i) {
      const DecoderLayer &layer = decoder.layers[i];
      const Norm &following = i + 1 < decoder.num_layers ? decoder.layers[i + 1].before_attention : decoder.norm;
      adapted_product(next, i, kQkv, layer.qkv, normed, [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
        copy(qkv + row * qkv_width + group * kLanes, sums, cols);
      });
      rows(next(), tokens, [&](int64_t token) {
        position(token, layer);
        if (layer.parallel && layer.before_mlp.weight) enter_next(token, layer.before_mlp);
      });
      if (layer.latents.rank) enter_latents(next, i);
      attention[size_t(i)].work();
      attention[size_t(i)].wait();
      Entering attending = valued;
      if (layer.latents.rank) {
        leave_latents(next, layer);
      } else {
        attending = entering_of(attended, widened);
        enter_rows(next, attended, attending, layer.attention.heads * layer.attention.value_dim);
      }
      adapted_product(next, i, kOutput, layer.output, attending,
                      [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
                        add(row, group, cols, sums, layer.after_attention.weight);
                      });
      rows(next(), tokens, [&](int64_t token) {
        leave(token, layer.after_attention);
        if (!layer.parallel) enter_next(token, layer.before_mlp);
      });
      if (layer.experts.count) {
        ask_experts(next, i);
      } else {
        ask_mlp(next, i, [&](int64_t row, int64_t group, int64_t cols, const float *sums) {
          add(row, group, cols, sums, layer.after_mlp.weight);
        });
      }
      rows(next(), tokens, [&](int64_t token) {
        leave(token, layer.after_mlp);
        if (i < step.num_deep && step.seen[token] >= 0) {
          const float *added = step.deep[i] + step.seen[token] * decoder.hidden;
          for (int64_t j = 0; j < decoder.hidden; ++j) hidden[token * decoder.hidden + j] += added[j];
        }
        tap(i + 1, token);
        if (i + 1 < decoder.num_layers) enter_next(token, following);
      });
    }
    if (step.pools) rows(next(), step.pools, [&](int64_t pool) { sum_up(pool); });
    if (!step.samples) return;
    rows(next(), step.samples, [&](int64_t sample) {
      enter(hidden + step.sample_index[sample] * decoder.hidden, decoder.norm,
            normed.plain + sample * (decoder.hidden / Plain::kPair));
      bundle(normed, sample, decoder.hidden);
    });
    product_of(next(), decoder.head, normed, step.samples,
               [&](int64_t row, int64_t group, int64_t cols, float *sums) { write_logits(row, group, cols, sums); });
  }

  void write_logits(int64_t row, int64_t group, int64_t cols, float *sums) const {
    const float scale = float(decoder.logit_scale), cap = float(decoder.logit_cap);
    for (int64_t c = 0; c < cols * kLanes; c += kLanes) {
      Vec x = load<Vec>(sums + c) * scale;
      store(sums + c, cap != 0 ? tanh_of(x / cap) * cap : x);
    }
    const int64_t count = std::min(cols * kLanes, decoder.head.outputs - group * kLanes);
    std::memcpy(step.logits + row * decoder.head.outputs + group * kLanes, sums, size_t(count) * sizeof(float));
  }
};

// How bytes are multiplied: by tiles, or else in bundles.
#if HAS_TILES
typedef Int8 Bytes;
#else
typedef BundledInt8 Bytes;
#endif

template <class T, class W>
int run_decoder(const Decoder &decoder, const DecoderStep &step) {
  static thread_local Buffer memory, scratch, partials;
  static thread_local std::deque<Tiles> shared;
  Run<T, W> run(decoder, step);
  if (!run.prepare(memory, scratch, partials, shared)) return 1;
  GOMP_parallel([](void *data) { static_cast<Run<T, W> *>(data)->work(); }, &run, unsigned(step.plan->threads), 0);
  return 0;
}

// Multiply-adds that a thread has done by the time that another one has begun. Fewer are left to one.
constexpr int64_t kAlone = 1 << 17;

// What is multiplied by itself is part of a step, too: of a decoder that has nothing else.
struct Alone {
  DecoderLayer layer = {};
  Decoder decoder = {};
  Plan plan = {};
  DecoderStep step = {};

  Alone(int64_t tokens, int64_t products, int64_t threads) {
    plan.tokens = tokens;
    plan.threads = tokens * products < kAlone ? 1 : threads;
    step.plan = &plan;
  }
};

template <class T, class W>
int run_product(const Matrix &matrix, const void *from, int64_t rows, void *to, int64_t threads) {
  typedef typename T::Stored Stored;
  static thread_local Buffer memory;
  Alone alone(rows, matrix.inputs * matrix.outputs, threads);
  alone.decoder.intermediate = matrix.inputs;
  alone.decoder.head = matrix;
  struct Work {
    Run<T, W> run;
    const Matrix &matrix;
    Stored *from, *to;
  } work{{alone.decoder, alone.step}, matrix, static_cast<Stored *>(const_cast<void *>(from)), static_cast<Stored *>(to)};
  if (!work.run.prepare(memory)) return 1;
  GOMP_parallel(
      [](void *data) {
        Work &mine = *static_cast<Work *>(data);
        mine.run.multiply(mine.matrix, mine.from, mine.to);
      },
      &work, unsigned(alone.plan.threads), 0);
  return 0;
}

template <class T, class W>
int run_experts(const Experts &experts, int64_t top, const void *from, int64_t tokens, const int64_t *chosen,
                const float *shares, void *to, int64_t threads) {
  typedef typename T::Stored Stored;
  static thread_local Buffer memory;
  const int64_t hidden = experts.gate_up.inputs;
  Alone alone(tokens, top * 3 * hidden * experts.down.inputs, threads);
  alone.layer.experts = experts;
  alone.layer.experts.top = top;
  alone.decoder.layers = &alone.layer;
  alone.decoder.num_layers = 1;
  alone.decoder.hidden = hidden;
  alone.decoder.residual_scale = 1;
  struct Work {
    Run<T, W> run;
    const DecoderLayer &layer;
    Stored *from, *to;
  } work{{alone.decoder, alone.step}, alone.layer, static_cast<Stored *>(const_cast<void *>(from)), static_cast<Stored *>(to)};
  if (!work.run.prepare(memory)) return 1;
  if (!work.run.send(alone.layer.experts, chosen, shares, work.from)) return 2;
  GOMP_parallel(
      [](void *data) {
        Work &mine = *static_cast<Work *>(data);
        mine.run.ask(mine.layer, mine.from, mine.to);
      },
      &work, unsigned(alone.plan.threads), 0);
  return 0;
}

// -- packing

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES 1
#endif
#endif

#if HAS_SHUFFLES
template <int Half, int... I>
void exchange(Words &upper, Words &lower, std::integer_sequence<int, I...>) {
  const Words left = __builtin_shufflevector(upper, lower, (I & Half ? kLanes + I - Half : I)...);
  lower = __builtin_shufflevector(upper, lower, (I & Half ? kLanes + I : I + Half)...);
  upper = left;
}

// Rows become columns: halves of a square change places, then halves of its quarters.
template <int Half>
void transpose(Words (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Half)) exchange<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, kLanes>());
  if constexpr (Half > 1) transpose<Half / 2>(rows);
}
#endif

// A group of outputs of which all are there, in squares of 32-bit words: as many steps as there are lanes.
template <class Stored, int Pair>
int64_t pack_squares(const Stored *from, int64_t row_stride, Stored *to, int64_t steps) {
  int64_t step = 0;
#if HAS_SHUFFLES
  if constexpr (sizeof(Stored) * Pair == sizeof(uint32_t)) {
    for (; step + kLanes <= steps; step += kLanes) {
      Words words[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) words[lane] = load<Words>(from + lane * row_stride + step * Pair);
      transpose<kLanes / 2>(words);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) std::memcpy(to + (step + lane) * kLanes * Pair, &words[lane], sizeof(Words));
    }
  }
#endif
  return step;
}

template <class T, class W>
void pack_group(const Packing &p, int64_t group) {
  const int64_t steps = p.inputs / W::kPair;
  auto *to = static_cast<typename W::Stored *>(p.to) + (p.first_group + group * p.group_step) * p.inputs * kLanes;
  const auto *from = static_cast<const typename T::Stored *>(p.from) + group * kLanes * p.row_stride;
  int64_t done = 0;
  if constexpr (std::is_same<T, W>::value)
    if ((group + 1) * kLanes <= p.outputs) done = pack_squares<typename T::Stored, W::kPair>(from, p.row_stride, to, steps);
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto *row = from + lane * p.row_stride;
    if (group * kLanes + lane >= p.outputs) {
      for (int64_t step = 0; step < steps; ++step)
        for (int i = 0; i < W::kPair; ++i) to[step * kLanes * W::kPair + place_of<W>(lane, i)] = 0;
    } else if constexpr (std::is_same<W, Int8>::value) {
      float most = 0;
      for (int64_t i = 0; i < p.inputs; ++i) most = std::max(most, std::fabs(T::widen(row[i])));
      const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
      p.scales[(p.first_group + group * p.group_step) * kLanes + lane] = scale;
      for (int64_t i = 0; i < p.inputs; ++i) {
        const int8_t x = int8_t(std::nearbyint(T::widen(row[i]) * inverse));
        to[i / W::kPair * kLanes * W::kPair + place_of<W>(lane, i % W::kPair)] = x;
      }
    } else {
      for (int64_t step = done; step < steps; ++step)
        std::memcpy(to + (step * kLanes + lane) * W::kPair, row + step * W::kPair, sizeof(*row) * W::kPair);
    }
  }
}

template <class T, class W>
void pack_as(const Packing &packing, Phase &phase) {
  phase.run((packing.outputs + kLanes - 1) / kLanes, [&](int64_t group) { pack_group<T, W>(packing, group); });
}

void pack(const Packing &packing, Phase &phase) {
  switch (packing.dtype) {
#if HAS_KIND(0) || HAS_KIND(3) || HAS_KIND(4)  // the router of experts is not in int8
    case 0:
      return pack_as<Float32, Float32>(packing, phase);
#endif
    case 1:
#if HAS_KIND(3) || HAS_KIND(4)
      if (packing.scales) return pack_as<BFloat16, Int8>(packing, phase);
#endif
#if HAS_KIND(1) || HAS_KIND(3) || HAS_KIND(4)
      if (!packing.scales) return pack_as<BFloat16, BFloat16>(packing, phase);
#endif
      break;
#if HAS_KIND(2)
    case 2:
      return pack_as<Float16, Float16>(packing, phase);
#endif
  }
}

void pack(const CodesPacking &packing, Phase &phase) {
  phase.run((packing.outputs + kLanes - 1) / kLanes, [&](int64_t group) { pack_codes(packing, group); });
}

void pack(const Rounding &r, Phase &phase) {
  phase.run(r.outputs, [&](int64_t row) {
    static thread_local std::vector<float> wide;
    wide.resize(size_t(r.group));
    for (int64_t i = 0; i < r.inputs; i += r.group)
      (r.bits == 8 ? round_numbers<8> : round_numbers<4>)(r.from + row * r.row_stride + i, r.group,
                                                          r.to + row * r.inputs + i, wide.data());
  });
}

template <class Packing>
void pack_all(const Packing *packings, int64_t count, int64_t threads) {
  struct Work {
    const Packing *packings;
    std::deque<Phase> phases;
  } work{packings, std::deque<Phase>(size_t(count))};
  GOMP_parallel(
      [](void *data) {
        Work &mine = *static_cast<Work *>(data);
        for (size_t i = 0; i < mine.phases.size(); ++i) pack(mine.packings[i], mine.phases[i]);
      },
      &work, unsigned(threads), 0);
}

// What numbers and weights are, as `Decoder` says it.
template <class T, class W>
struct KindOf {
  typedef T Numbers;
  typedef W Weights;
};

template <class Body>
int of_kind(int64_t dtype, int64_t narrow, Body body) {
  switch (dtype) {
#if HAS_KIND(0)
    case 0:
      return body(KindOf<Float32, Float32>{});
#endif
    case 1:
#if HAS_KIND(4)
      if (narrow == 2) return body(KindOf<BFloat16, Int4>{});
#endif
#if HAS_KIND(3)
      if (narrow == 1) return body(KindOf<BFloat16, Bytes>{});
#endif
#if HAS_KIND(1)
      if (!narrow) return body(KindOf<BFloat16, BFloat16>{});
#endif
      break;
#if HAS_KIND(2)
    case 2:
      return body(KindOf<Float16, Float16>{});
#endif
  }
  return 1;
}

}  // namespace

// Outputs that lie beside each other in packed weights.
extern "C" int64_t decoder_lanes() { return kLanes; }

// The dtype of the router of experts whose weights are int8: that of what enters the products.
extern "C" int64_t decoder_int8_router() { return std::is_same<RouterOfInt8, BFloat16>::value; }

// Packs matrices, one after the other; bfloat16 with scales to int8, with one scale for each output.
extern "C" void decoder_pack(const Packing *packings, int64_t count, int64_t threads) {
  pack_all(packings, count, threads);
}

// Packs matrices that have a format.
extern "C" void decoder_pack_codes(const CodesPacking *packings, int64_t count, int64_t threads) {
  pack_all(packings, count, threads);
}

// Makes numbers of what numbers would be rounded to when they are packed.
extern "C" void decoder_round(const Rounding *rounding, int64_t threads) { pack_all(rounding, 1, threads); }

// Returns 0, or 1 when there is no memory for the step, which the calling thread keeps for its next one.
extern "C" int decoder_step(const Decoder *decoder, const DecoderStep *step) {
  return of_kind(decoder->dtype, decoder->narrow, [&](auto kind) {
    return run_decoder<typename decltype(kind)::Numbers, typename decltype(kind)::Weights>(*decoder, *step);
  });
}

// (rows, inputs) to (rows, outputs), both of the product's dtype. Returns as `decoder_step` does.
extern "C" int decoder_product(const Product *product, const void *from, int64_t rows, void *to, int64_t threads) {
  return of_kind(product->dtype, product->narrow, [&](auto kind) {
    return run_product<typename decltype(kind)::Numbers, typename decltype(kind)::Weights>(product->matrix, from, rows, to,
                                                                                          threads);
  });
}

// Several products, each of rows of its own: (count, rows, inputs) to (count, rows, outputs), of one dtype and one size.
// Each is made by one thread. Returns as `decoder_step` does.
extern "C" int decoder_products(const Product *products, int64_t count, const void *from, int64_t rows, void *to,
                                int64_t threads) {
  struct Work {
    const Product *products;
    int64_t count, rows;
    const char *from;
    char *to;
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
  } work{products, count, rows, static_cast<const char *>(from), static_cast<char *>(to)};
  const int64_t products_of_all = count * rows * products->matrix.inputs * products->matrix.outputs;
  GOMP_parallel(
      [](void *data) {
        Work &mine = *static_cast<Work *>(data);
        const int64_t size = mine.products->dtype == 0 ? 4 : 2;
        for (int64_t i; (i = mine.next++) < mine.count;) {
          const Product &one = mine.products[i];
          if (decoder_product(&one, mine.from + i * mine.rows * one.matrix.inputs * size, mine.rows,
                              mine.to + i * mine.rows * one.matrix.outputs * size, 1))
            mine.failed = 1;
        }
      },
      &work, unsigned(products_of_all < kAlone ? 1 : threads), 0);
  return work.failed;
}

// (tokens, hidden) to the same, what the `top` experts of each token answer, weighed by `shares`; both are (tokens, top).
// Returns as `decoder_step` does, or 2 where there is no such expert.
extern "C" int decoder_experts(const Asking *asking, int64_t top, const void *from, int64_t tokens,
                               const int64_t *chosen, const float *shares, void *to, int64_t threads) {
  return of_kind(asking->dtype, asking->narrow, [&](auto kind) {
    return run_experts<typename decltype(kind)::Numbers, typename decltype(kind)::Weights>(
        asking->experts, top, from, tokens, chosen, shares, to, threads);
  });
}
