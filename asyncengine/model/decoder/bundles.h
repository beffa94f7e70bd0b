// Products of rows whose numbers enter as integers, with weights of four bits or of bytes, for decoder.cpp, which includes
// this.
//
// `kBundle` numbers of a row are rounded to 16 bits with a scale of their own, which keeps more digits than bfloat16 does.
// A weight is an integer too, in steps of a scale. So what a bundle and a column come to is exact, however it is added up,
// and each output is one chain of additions over the bundles, in ascending order: a row gets the same bits whatever else
// is multiplied. Any processor with vectors multiplies integers of 16 bits, in pairs, twice as many at a time as floats;
// nothing here hangs on products of bfloat16. What codes stand for lies between -128 and 127: 32 such products, or those of
// values from 0 to 255, stay far below 2^31.
//
// Bytes with one scale for each output lie as decoder.cpp says. Of codes whose scales are those of some inputs, what one
// vector of outputs needs lies in one run of memory:
//
//     codes   of eight bits, (inputs, lane) bytes
//             of four bits, (inputs / 8, lane) words of 32 bits: input 2 i of eight is in bits 4 i to 4 i + 3, input
//             2 i + 1 in bits 16 + 4 i to 16 + 4 i + 3, so that shifting by 4 i brings a pair to the ends of two halves
//     scales  (inputs / group, lane) float16; a group is 32 inputs or a multiple, of eight bits also 16
//     zeros   the same again, where there are any
//
// and the next one begins at a multiple of 64 bytes. The scales of an output have had a power of two taken out, which
// is applied to the sum: so they fit into float16 whatever their size.

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

constexpr int kBundle = 32;

extern "C" {
struct Format {        // how codes are stored; mirrored in coded_matrix.py
  int16_t values[32];  // what the sixteen codes of four bits stand for, twice
  int64_t bits;        // of a code: 4 or 8
  int64_t group;       // inputs that share a scale
  int64_t zeros;       // whether there are zeros
  int64_t stride;      // bytes of what a vector of outputs needs
};

struct CodesPacking {  // one matrix that is to be put into that order; mirrored too
  const uint16_t *numbers;  // (outputs, inputs) bfloat16 that are to be rounded to integers; or null
  int64_t row_stride;       // theirs
  const uint8_t *codes;     // (outputs, inputs / 2): the lower half of a byte is the input with the even number; or bytes
  const float *scales;      // (outputs, inputs / group)
  const float *zeros;       // as `scales`, in the unit of the values; or null
  int64_t outputs, inputs;
  int64_t group;  // of what is given; a multiple of the format's
  double step;    // what a value of 1 stands for
  const Format *format;
  char *to;
  int64_t first_group, group_step;  // group g of the outputs becomes group first_group + g * group_step
  float *factors;                   // (outputs): what sums are multiplied by
};
}

namespace {

struct Bundle {
  int16_t numbers[kBundle];
  float scale;
  int32_t sum;   // of the numbers
  int32_t half;  // of those of the first half, if that is asked for
};

inline uint32_t most_of(Words v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)v);
#else
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, uint32_t(v[i]));
  return most;
#endif
}

// Rounds numbers to integers. Infinity and NaN make a NaN of whatever the bundle enters.
inline void fill(Bundle *to, const Vec (&x)[kBundle / kLanes], bool halves) {
  Words most = {};
#pragma GCC unroll 8
  for (int i = 0; i < kBundle / kLanes; ++i) {  // as integers, of which that of a NaN is the largest
    const Words magnitude = (Words)x[i] & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  const uint32_t bits = most_of(most);
  const float largest = load<float>(&bits);
  const Vec inverse = splat(largest > 1e-30f ? 32767.0f / largest : 0.0f);
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vec sums[2] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kBundle / kLanes; ++i) {
    const Vec shifted = fused(x[i], inverse, shifter);
    store_low_halves(reinterpret_cast<uint16_t *>(to->numbers) + i * kLanes, (Words)shifted);
    Vec &sum = sums[2 * i * kLanes / kBundle];
    sum = sum + (shifted - shifter);
  }
  to->scale = largest * (1.0f / 32767.0f);
  const auto whole = [](Vec sum) {
    const float all = lanes_sum(sum);
    return all == all ? int32_t(all) : 0;
  };
  to->sum = whole(sums[0] + sums[1]);
  if (halves) to->half = whole(sums[0]);
}

// What codes stand for.
struct Codes {
#if defined(__AVX512BW__)
  static constexpr int32_t kOffset = 0;
  const __m512i values;
  explicit Codes(const int16_t *of) : values(_mm512_loadu_si512(of)) {}
  // Of the ends of each word's halves; what is left of them does not matter, because the values are there twice.
  Words pair(Words shifted) const { return (Words)_mm512_permutexvar_epi16((__m512i)shifted, values); }
#else
  // Bytes look bytes up, and are not negative, so that the upper byte of each half can stay zero. What that adds to a
  // sum is taken off at its start; both stay below 255 * 32767 * 32.
  static constexpr int32_t kOffset = 128;
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
  Bytes values;
  explicit Codes(const int16_t *of) {
    for (int i = 0; i < kVectorBytes; ++i) values[i] = uint8_t(of[i % 16] + kOffset);
  }
  Words pair(Words shifted) const {
    const Words at = (shifted & 0x000f000fu) | 0xff00ff00u;  // what is out of range becomes 0
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Words)_mm256_shuffle_epi8((__m256i)values, (__m256i)at);
#elif defined(__SSSE3__) && !defined(__AVX__)
    return (Words)_mm_shuffle_epi8((__m128i)values, (__m128i)at);
#elif defined(__aarch64__)
    return (Words)vqtbl1q_u8((uint8x16_t)values, (uint8x16_t)at);
#else
    Words found;
    for (int i = 0; i < kLanes; ++i) found[i] = values[at[i] & 15] | uint32_t(values[at[i] >> 16 & 15]) << 16;
    return found;
#endif
  }
#endif
};

// sum + the products of both halves of each word with those of `pair`.
inline Words add_pairs(Words sum, Words halves, int32_t pair) {
#if defined(__AVX512VNNI__)
  return (Words)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)halves, _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
  return sum + (Words)_mm512_madd_epi16((__m512i)halves, _mm512_set1_epi32(pair));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (Words)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)halves, _mm256_set1_epi32(pair));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (Words)_mm256_madd_epi16((__m256i)halves, _mm256_set1_epi32(pair));
#elif defined(__SSE2__) && !defined(__AVX__)
  return sum + (Words)_mm_madd_epi16((__m128i)halves, _mm_set1_epi32(pair));
#else
  const uint32_t first = uint32_t(int32_t(int16_t(pair))), second = uint32_t(pair >> 16);
  return sum + (Words)((Ints)(halves << 16) >> 16) * first + (Words)((Ints)halves >> 16) * second;
#endif
}

// The bytes of two inputs, one after the other, as the halves of words.
inline Words byte_pair(const char *p) {
#if defined(__AVX512BW__)
  const Words order = (Words)iota() | (Words)(iota() + kLanes) << 16;
  return (Words)_mm512_permutexvar_epi16((__m512i)order, _mm512_cvtepi8_epi16(load<__m256i>(p)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i both = load<__m128i>(p);
  return (Words)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(both, _mm_srli_si128(both, 8)));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const Ints first = __builtin_convertvector(load<Bytes>(p), Ints);
  const Ints second = __builtin_convertvector(load<Bytes>(p + kLanes), Ints);
  return ((Words)first & 0xffffu) | (Words)second << 16;
#endif
}

// sums[row][lane] of `Rows` rows of bundles and `Cols` groups of outputs, which are `stride` bytes apart; of weights of so
// many bits, with scales for `Group` inputs or a multiple, or, if that is 0, for each output, which need no format. What
// lies `ahead` bytes further on is brought nearer meanwhile: a run is so short that it is over before the processor has
// found out that it is one.
template <int Bits, int Group, int Rows, int Cols>
__attribute__((noinline)) void multiply_bundles(const Bundle *inputs, int64_t input_stride, const void *weights,
                                                int64_t stride, const Format *format, int64_t bundles, float *sums,
                                                int64_t sum_stride, int64_t ahead) {
  constexpr bool kCoded = Bits == 4;
  constexpr int kEight = kLanes * Bits;  // bytes of eight inputs
  static constexpr int16_t kNone[32] = {};
  const Codes codes(kCoded ? format->values : kNone);
  constexpr int kParts = Group == kBundle / 2 ? 2 : 1, kEights = kBundle / 8 / kParts;  // of a bundle; of a part
  const int64_t run = Group == kBundle ? format->group / kBundle : 1, scales_at = bundles * (kBundle / 8) * kEight;
  const bool zeros = Group && format->zeros;
  Vec sum[Rows][Cols] = {};
  for (int64_t step = 0, share = 0, used = 0; step < bundles * kParts; ++step) {
    const int64_t bundle = step / kParts;
    const int first = int(step % kParts) * kEights;
    Words dots[Rows][Cols];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c)
        dots[r][c] = Words{} - uint32_t(kCoded ? Codes::kOffset * inputs[r * input_stride + bundle].sum : 0);
    for (int eight = first; eight < first + kEights; ++eight) {
      const char *at = static_cast<const char *>(weights) + (bundle * (kBundle / 8) + eight) * kEight;
#pragma GCC unroll 8
      for (int c = 0; c < Cols; ++c) {
        prefetch(at + c * stride + ahead);
        if (kEight > 64) prefetch(at + c * stride + ahead + 64);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const auto halves_of = [&](int c) {
          const char *lanes = at + c * stride;
          return kCoded ? codes.pair(load<Words>(lanes) >> (4 * i)) : byte_pair(lanes + i * 2 * kLanes);
        };
        if constexpr (Rows <= Cols) {  // the order that needs the fewer registers
#pragma GCC unroll 8
          for (int c = 0; c < Cols; ++c) {
            const Words halves = halves_of(c);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
              const int32_t pair = load<int32_t>(inputs[r * input_stride + bundle].numbers + 8 * eight + 2 * i);
              dots[r][c] = add_pairs(dots[r][c], halves, pair);
            }
          }
        } else {
          Words halves[Cols];
#pragma GCC unroll 8
          for (int c = 0; c < Cols; ++c) halves[c] = halves_of(c);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            const int32_t pair = load<int32_t>(inputs[r * input_stride + bundle].numbers + 8 * eight + 2 * i);
#pragma GCC unroll 8
            for (int c = 0; c < Cols; ++c) dots[r][c] = add_pairs(dots[r][c], halves[c], pair);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) {
      Vec scale = splat(1.0f), zero = {};
      if constexpr (Group) {
        const char *at = static_cast<const char *>(weights) + c * stride + scales_at;
        const auto *scales = reinterpret_cast<const uint16_t *>(at) + share * kLanes;
        prefetch(reinterpret_cast<const char *>(scales) + ahead);
        scale = Float16::widen_vector(scales);
        if (zeros) zero = Float16::widen_vector(scales + bundles * kParts / run * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Bundle &of = inputs[r * input_stride + bundle];
        Vec dot = __builtin_convertvector((Ints)dots[r][c], Vec);
        const int32_t entered = kParts == 1 ? of.sum : first ? of.sum - of.half : of.half;
        if (zeros) dot = fused(zero, splat(-float(entered)), dot);
        sum[r][c] = fused(dot, scale * of.scale, sum[r][c]);
      }
    }
    if (++used == run) used = 0, ++share;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < Cols; ++c) store(sums + r * sum_stride + c * kLanes, sum[r][c]);
}

// The codes of eight inputs as they are multiplied.
inline uint32_t word_of(uint32_t bytes) {
  const auto gathered = [](uint32_t nibbles) {  // four, one in each byte
    nibbles = (nibbles | nibbles >> 4) & 0x00ff00ffu;
    return (nibbles | nibbles >> 8) & 0xffffu;
  };
  return gathered(bytes & 0x0f0f0f0fu) | gathered(bytes >> 4 & 0x0f0f0f0fu) << 16;
}

inline Vec widen_bfloat16(const uint16_t *from) {
  typedef uint16_t Halves16 __attribute__((vector_size(kLanes * 2)));
  return (Vec)(__builtin_convertvector(load<Halves16>(from), Words) << 16);
}

// Numbers in units of their scale, rounded to what bits of a code can stand for.
template <int Bits>
inline Vec rounded(const float *wide, float scale) {
  constexpr float kLeast = Bits == 4 ? -8.0f : -127.0f, kMost = Bits == 4 ? 7.0f : 127.0f;
  const Vec shifter = splat(12582912.0f), whole = (load<Vec>(wide) / scale + shifter) - shifter;
  const Vec low = maximum(whole, splat(kLeast));
  return low > kMost ? splat(kMost) : low;
}

// Widens numbers that share a scale, and finds it as `nearest` in four_bits.py does; or NaN, if there is a number among
// them that is none, and 0 if all are 0. `count` is a multiple of a bundle.
inline float scale_of_share(const uint16_t *numbers, int64_t count, float *wide) {
  Vec above = {}, below = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = widen_bfloat16(numbers + i);
    store(wide + i, x);
    above = maximum(x, above);
    below = maximum(-x, below);
  }
  const float highest = lanes_max(above), lowest = lanes_max(below);
  float extreme = highest > lowest ? highest : -lowest, best = 0, least = kInfinity;
  if (highest == lowest)  // the first of them
    for (int64_t i = count; i-- > 0;)
      if (std::fabs(wide[i]) == highest) extreme = wide[i];
  for (const float farthest : {-8.0f, -7.5f, -7.0f}) {
    const float scale = extreme != 0 ? extreme / farthest : 1.0f;
    Vec errors = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec error = rounded<4>(wide + i, scale) * scale - load<Vec>(wide + i);
      errors = errors + error * error;
    }
    const float error = lanes_sum(errors);
    if (error < least) least = error, best = scale;
  }
  if (least == kInfinity) return __builtin_nanf("");
  return extreme != 0 ? best : 0.0f;
}

// The same as `nearest_bytes` in eight_bits.py does.
inline float scale_of_bytes(const uint16_t *numbers, int64_t count, float *wide) {
  Words most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = widen_bfloat16(numbers + i);
    store(wide + i, x);
    const Words magnitude = (Words)x & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  const uint32_t bits = most_of(most);
  return bits >= 0x7f800000u ? __builtin_nanf("") : load<float>(&bits) / 127.0f;
}

// Rounds numbers that share a scale, which is returned. What is no number is no code either.
template <int Bits>
float round_share(const uint16_t *numbers, int64_t count, uint8_t *codes, float *wide) {
  const float scale = Bits == 4 ? scale_of_share(numbers, count, wide) : scale_of_bytes(numbers, count, wide);
  if (scale != scale) {
    std::memset(codes, 0, size_t(count * Bits / 8));
    return scale;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec found = rounded<Bits>(wide + i, scale != 0 ? scale : 1.0f) + (Bits == 4 ? 8.0f : 0.0f);
    if constexpr (Bits == 4)
      for (int j = 0; j < kLanes; j += 2) codes[(i + j) / 2] = uint8_t(int(found[j]) | int(found[j + 1]) << 4);
    else
      for (int j = 0; j < kLanes; ++j) codes[i + j] = uint8_t(int8_t(found[j]));
  }
  return scale;
}

// What numbers that share a scale are rounded to.
template <int Bits>
void round_numbers(const uint16_t *numbers, int64_t count, float *to, float *wide) {
  const float scale = Bits == 4 ? scale_of_share(numbers, count, wide) : scale_of_bytes(numbers, count, wide);
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, rounded<Bits>(wide + i, scale != 0 ? scale : 1.0f) * scale);
}

// Packs the outputs of one vector, whose rows begin where the pointers say.
void pack_rows(const CodesPacking &p, int64_t group, const uint8_t *codes, const float *scales, const float *zeros) {
  const Format &format = *p.format;
  const int64_t row_bytes = p.inputs * format.bits / 8, shares = p.inputs / format.group, repeat = p.group / format.group;
  const int64_t count = std::min<int64_t>(kLanes, p.outputs - group * kLanes), theirs = shares / repeat;
  const int64_t place = p.first_group + group * p.group_step;
  char *to = p.to + place * format.stride;
  for (int64_t word = 0; word < row_bytes / 4; ++word) {
    uint32_t lanes[kLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = load<uint32_t>(codes + lane * row_bytes + word * 4);
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t four = format.bits == 4 ? word_of(lanes[lane]) : lanes[lane];
      char *at = to + word * kLanes * 4;
      if (format.bits == 4)
        std::memcpy(at + lane * 4, &four, 4);
      else
        for (int i = 0; i < 4; ++i) at[i * kLanes + lane] = char(four >> 8 * i);
    }
  }
  auto *to_scales = reinterpret_cast<uint16_t *>(to + row_bytes * kLanes), *to_zeros = to_scales + shares * kLanes;
  std::fill_n(to_scales, shares * kLanes * (format.zeros ? 2 : 1), uint16_t(0));
  std::fill_n(p.factors + place * kLanes, kLanes, 0.0f);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t row = lane * theirs;
    float most = 0;
    for (int64_t i = 0; i < theirs; ++i) most = std::max(most, std::fabs(scales[row + i]));
    int exponent = 0;
    if (std::isfinite(most)) std::frexp(most, &exponent);
    const double taken = std::ldexp(1.0, 15 - exponent);  // the largest is then between 2^14 and 2^15
    p.factors[place * kLanes + lane] = float(std::ldexp(p.step, exponent - 15));
    for (int64_t i = 0; i < shares; ++i) {
      to_scales[i * kLanes + lane] = Float16::narrow(float(scales[row + i / repeat] * taken));
      if (zeros) to_zeros[i * kLanes + lane] = Float16::narrow(zeros[row + i / repeat]);
    }
  }
}

void pack_codes(const CodesPacking &p, int64_t group) {
  const int64_t share = p.group, shares = p.inputs / share, first = group * kLanes;
  if (!p.numbers)
    return pack_rows(p, group, p.codes + first * (p.inputs * p.format->bits / 8), p.scales + first * shares,
                     p.zeros ? p.zeros + first * shares : nullptr);
  static thread_local std::vector<uint8_t> codes;
  static thread_local std::vector<float> scales, wide;
  const int64_t bits = p.format->bits;
  codes.resize(size_t(kLanes * p.inputs * bits / 8));
  scales.resize(size_t(kLanes * shares));
  wide.resize(size_t(share));
  const int64_t count = std::min<int64_t>(kLanes, p.outputs - first);
  for (int64_t i = 0; i < count * shares; ++i)
    scales[size_t(i)] = (bits == 8 ? round_share<8> : round_share<4>)(
        p.numbers + (first + i / shares) * p.row_stride + i % shares * share, share, codes.data() + i * share * bits / 8,
        wide.data());
  pack_rows(p, group, codes.data(), scales.data(), nullptr);
}

}  // namespace
