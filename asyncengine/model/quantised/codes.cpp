// What stored codes are, on the CPU: ggml's blocks taken apart into codes, and codes made numbers. Plain C ABI, compiled
// on first use by compiled_codes.py. All of it is done with plain torch where there is no compiler, to the same bits:
// float_blocks.py, four_bit_blocks.py and eight_bit_blocks.py of the GGUF reader describe the blocks, EightBits.weight
// and FourBits.weight the numbers. A load would spend most of its time there.
//
// Nothing is contracted (-ffp-contract=off): a number is rounded where torch rounds it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

// The entry point of torch's own OpenMP runtime, called directly: a second runtime would bring a second thread pool.
extern "C" {
#if defined(CODES_SERIAL)
static void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }
#else
void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
#endif

// The structures below are mirrored in compiled_codes.py.
struct Blocks {
  const uint8_t *from;
  uint8_t *codes;   // two in a byte, neighbours beside each other, or a byte each
  float *scales;    // of each group: what a step is
  float *minima;    // of each group: what is added, of types that have it; else null
  int64_t type;     // ggml's
  int64_t count;    // of blocks
  int64_t threads;
};

struct Numbers {
  const void *codes;    // (outputs, inputs) int8, or two codes in a byte, the even input in the lower half
  const float *scales;  // (outputs, inputs / group)
  const float *zeros;   // as the scales, or null
  const float *values;  // what the sixteen codes of four bits stand for; null if codes have eight
  void *to;             // (outputs, inputs)
  int64_t outputs, inputs, group;
  int64_t bfloat16;     // what is written, else float32
  int64_t threads;
};
}

namespace {

template <class Body> void share_out(int64_t tasks, int64_t threads, const Body &body) {
  struct Shared {
    const Body &body;
    std::atomic<int64_t> next;
    int64_t tasks;
    void take() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(i);
    }
  } shared{body, {0}, tasks};
  threads = std::min(threads, tasks);
  if (threads <= 1)
    shared.take();
  else
    GOMP_parallel([](void *data) { static_cast<Shared *>(data)->take(); }, &shared, unsigned(threads), 0);
}

template <class T> T read(const uint8_t *from) {
  T found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

float half(const uint8_t *from) {
  const uint32_t bits = read<uint16_t>(from), sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31;
  uint32_t found = bits & 1023;
  if (exponent == 31) {
    found = sign | 0x7f800000 | found << 13;
  } else if (exponent) {
    found = sign | (exponent + 112) << 23 | found << 13;
  } else {  // subnormal: so many times 2 ** -24
    const float small = float(found) * 0x1p-24f;
    std::memcpy(&found, &small, sizeof found);
    found |= sign;
  }
  float number;
  std::memcpy(&number, &found, sizeof number);
  return number;
}

uint16_t rounded(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- blocks ----------------------------------------------------------------------------------------------------------
//
// Each function takes one block, and writes its codes, scales and perhaps minima.

// Codes of which the lower halves of `width` bytes come first.
void neighbours(const uint8_t *from, int bytes, int width, uint8_t *codes) {
  for (int start = 0; start < bytes; start += width, codes += width)
    for (int i = 0; i < width / 2; ++i) {
      const uint8_t even = from[start + 2 * i], odd = from[start + 2 * i + 1];
      codes[i] = uint8_t((even & 15) | odd << 4);
      codes[width / 2 + i] = uint8_t(even >> 4 | (odd & 0xf0));
    }
}

void q4_0(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  *scales = half(from);
  neighbours(from + 2, 16, 16, codes);
}

void q4_1(const uint8_t *from, uint8_t *codes, float *scales, float *minima) {
  *scales = half(from), *minima = half(from + 2);
  neighbours(from + 4, 16, 16, codes);
}

// Scales and minima of Q4_K and Q5_K, in six bits each.
void scales_and_minima(const uint8_t *from, float *scales, float *minima) {
  const float step = half(from), least = half(from + 2);
  const uint8_t *low = from + 4, *middle = from + 8, *rest = from + 12;
  for (int i = 0; i < 4; ++i) {
    scales[i] = float(low[i] & 63) * step;
    minima[i] = -(float(middle[i] & 63) * least);
    scales[4 + i] = float((rest[i] & 15) | (low[i] >> 6) << 4) * step;
    minima[4 + i] = -(float(rest[i] >> 4 | (middle[i] >> 6) << 4) * least);
  }
}

void q4_k(const uint8_t *from, uint8_t *codes, float *scales, float *minima) {
  scales_and_minima(from, scales, minima);
  neighbours(from + 16, 128, 32, codes);
}

void iq4_xs(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  const float step = half(from);
  const uint32_t high = read<uint16_t>(from + 2);
  for (int i = 0; i < 8; ++i) {
    const int low = from[4 + i / 2] >> 4 * (i % 2) & 15;
    scales[i] = float((low | (high >> 2 * i & 3) << 4) - 32.0f) * step;
  }
  neighbours(from + 8, 128, 16, codes);
}

void mxfp4(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  const uint32_t bits = std::max(uint32_t(from[0]) << 23, 1u << 22);  // the least is 2 ** -127
  std::memcpy(scales, &bits, sizeof bits);
  neighbours(from + 1, 16, 16, codes);
}

void q8_0(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  *scales = half(from);
  std::memcpy(codes, from + 2, 32);
}

// Four bits each, of which the lower halves come first, and fifth bits.
void five_bits(const uint8_t *fifth, const uint8_t *from, uint8_t *codes) {
  const uint32_t bits = read<uint32_t>(fifth);
  for (int i = 0; i < 16; ++i) {
    codes[i] = uint8_t(((from[i] & 15) | (bits >> i & 1) << 4) - 16);
    codes[16 + i] = uint8_t((from[i] >> 4 | (bits >> (16 + i) & 1) << 4) - 16);
  }
}

void q5_0(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  *scales = half(from);
  five_bits(from + 2, from + 6, codes);
}

void q5_1(const uint8_t *from, uint8_t *codes, float *scales, float *minima) {
  *scales = half(from), *minima = half(from + 2);
  five_bits(from + 4, from + 8, codes);
}

void q2_k(const uint8_t *from, uint8_t *codes, float *scales, float *minima) {
  const float step = half(from + 80), least = half(from + 82);
  for (int i = 0; i < 16; ++i) {
    scales[i] = float(from[i] & 15) * step;
    minima[i] = -(float(from[i] >> 4) * least);
  }
  for (int run = 0; run < 2; ++run)
    for (int place = 0; place < 4; ++place)
      for (int i = 0; i < 32; ++i) *codes++ = uint8_t((from[16 + 32 * run + i] >> 2 * place & 3) - 2);
}

void q3_k(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  const float step = half(from + 108);
  for (int i = 0; i < 16; ++i) {
    const int low = from[96 + i % 8] >> 4 * (i / 8) & 15, high = from[104 + i % 4] >> 2 * (i / 4) & 3;
    scales[i] = (float(low | high << 4) - 32.0f) * step;
  }
  for (int run = 0; run < 2; ++run)
    for (int place = 0; place < 4; ++place)
      for (int i = 0; i < 32; ++i) {
        const int third = from[i] >> (4 * run + place) & 1;
        *codes++ = uint8_t(((from[32 + 32 * run + i] >> 2 * place & 3) | third << 2) - 4);
      }
}

void q5_k(const uint8_t *from, uint8_t *codes, float *scales, float *minima) {
  scales_and_minima(from, scales, minima);
  for (int run = 0; run < 4; ++run)
    for (int place = 0; place < 2; ++place)
      for (int i = 0; i < 32; ++i) {
        const int fifth = from[16 + i] >> (2 * run + place) & 1;
        *codes++ = uint8_t(((from[48 + 32 * run + i] >> 4 * place & 15) | fifth << 4) - 16);
      }
}

void q6_k(const uint8_t *from, uint8_t *codes, float *scales, float *) {
  const float step = half(from + 208);
  for (int i = 0; i < 16; ++i) scales[i] = float(int8_t(from[192 + i])) * step;
  for (int run = 0; run < 2; ++run)
    for (int place = 0; place < 4; ++place)
      for (int i = 0; i < 32; ++i) {
        const int low = from[64 * run + 32 * (place % 2) + i] >> 4 * (place / 2) & 15;
        const int high = from[128 + 32 * run + i] >> 2 * place & 3;
        *codes++ = uint8_t((low | high << 4) - 32);
      }
}

struct Type {
  int64_t id, numbers, bytes, code_bytes, group;
  void (*take)(const uint8_t *from, uint8_t *codes, float *scales, float *minima);
};

constexpr Type kTypes[] = {
    {2, 32, 18, 16, 32, q4_0},     {3, 32, 20, 16, 32, q4_1},      {6, 32, 22, 32, 32, q5_0},
    {7, 32, 24, 32, 32, q5_1},     {8, 32, 34, 32, 32, q8_0},      {10, 256, 84, 256, 16, q2_k},
    {11, 256, 110, 256, 16, q3_k}, {12, 256, 144, 128, 32, q4_k},  {13, 256, 176, 256, 32, q5_k},
    {14, 256, 210, 256, 16, q6_k}, {20, 32, 18, 16, 32, q4_0},     {23, 256, 136, 128, 32, iq4_xs},
    {39, 32, 17, 16, 32, mxfp4},
};

// ---- numbers ---------------------------------------------------------------------------------------------------------

inline void put(float number, float *to) { *to = number; }
inline void put(float number, uint16_t *to) { *to = rounded(number); }

template <class T> void row_of_bytes(const Numbers &n, int64_t row) {
  const int64_t groups = n.inputs / n.group;
  const int8_t *codes = static_cast<const int8_t *>(n.codes) + row * n.inputs;
  T *to = static_cast<T *>(n.to) + row * n.inputs;
  for (int64_t group = 0; group < groups; ++group, codes += n.group, to += n.group) {
    const float scale = n.scales[row * groups + group];
    const float zero = n.zeros ? n.zeros[row * groups + group] : 0.0f;
    for (int64_t i = 0; i < n.group; ++i) put((float(codes[i]) - zero) * scale, to + i);
  }
}

template <class T> void row_of_halves(const Numbers &n, int64_t row) {
  const int64_t groups = n.inputs / n.group;
  const uint8_t *codes = static_cast<const uint8_t *>(n.codes) + row * n.inputs / 2;
  T *to = static_cast<T *>(n.to) + row * n.inputs;
  for (int64_t group = 0; group < groups; ++group, codes += n.group / 2, to += n.group) {
    const float scale = n.scales[row * groups + group];
    const float zero = n.zeros ? n.zeros[row * groups + group] : 0.0f;
    T own[16];
    for (int i = 0; i < 16; ++i) put((n.values[i] - zero) * scale, own + i);
    for (int64_t i = 0; i < n.group / 2; ++i) to[2 * i] = own[codes[i] & 15], to[2 * i + 1] = own[codes[i] >> 4];
  }
}

}  // namespace

// Returns 0, or 1 if it does not know the type.
extern "C" int codes_of_blocks(const Blocks *blocks) {
  for (const Type &type : kTypes) {
    if (type.id != blocks->type) continue;
    const int64_t some = std::max<int64_t>((1 << 16) / type.bytes, 1), groups = type.numbers / type.group;
    share_out((blocks->count + some - 1) / some, blocks->threads, [&](int64_t task) {
      for (int64_t i = task * some, end = std::min(i + some, blocks->count); i < end; ++i)
        type.take(blocks->from + i * type.bytes, blocks->codes + i * type.code_bytes, blocks->scales + i * groups,
                  blocks->minima ? blocks->minima + i * groups : nullptr);
    });
    return 0;
  }
  return 1;
}

extern "C" void numbers_of_codes(const Numbers *numbers) {
  const Numbers &n = *numbers;
  const int64_t some = std::max<int64_t>((1 << 15) / std::max<int64_t>(n.inputs, 1), 1);
  share_out((n.outputs + some - 1) / some, n.threads, [&](int64_t task) {
    for (int64_t row = task * some, end = std::min(row + some, n.outputs); row < end; ++row)
      if (n.values)
        n.bfloat16 ? row_of_halves<uint16_t>(n, row) : row_of_halves<float>(n, row);
      else
        n.bfloat16 ? row_of_bytes<uint16_t>(n, row) : row_of_bytes<float>(n, row);
  });
}
