// One step of a small decoder, for callgrind to count: driver LIBRARY TOKENS CONTEXT. Weights are zero: what is counted does
// not depend on them.

#include "decoder.cpp"  // for its structures; the code is the library's

#include <dlfcn.h>

namespace {

constexpr int64_t kHidden = 256, kInner = 512, kHeads = 4, kKvHeads = 2, kDim = 64, kLayers = 2, kVocabulary = 512;
constexpr int64_t kPage = 32, kPositions = 256;

void *zeros(int64_t bytes) { return std::calloc(size_t(bytes + 64), 1); }

Matrix matrix(int64_t outputs, int64_t inputs) {
  return {zeros(outputs * inputs * 4), nullptr, nullptr, outputs, inputs};
}

Norm norm() { return {static_cast<float *>(zeros(kHidden * 4)), nullptr, 0, 0, 0, 1e-5}; }

}  // namespace

int main(int, char **arguments) {
  void *library = dlopen(arguments[1], RTLD_NOW);
  const auto run = library ? reinterpret_cast<decltype(&decoder_step)>(dlsym(library, "decoder_step")) : nullptr;
  if (!run) return 2;
  const int64_t tokens = std::atoi(arguments[2]), context = std::atoi(arguments[3]);
  std::vector<DecoderLayer> layers(kLayers);
  for (DecoderLayer &layer : layers) {
    layer.before_attention = norm();
    layer.before_mlp = norm();
    layer.qkv = matrix((kHeads + 2 * kKvHeads) * kDim, kHidden);
    layer.output = matrix(kHidden, kHeads * kDim);
    layer.gate_up = matrix(2 * kInner, kHidden);
    layer.down = matrix(kHidden, kInner);
    layer.gated = 1;
    layer.cosines = static_cast<float *>(zeros(kPositions * kDim / 2 * 4));
    layer.sines = static_cast<float *>(zeros(kPositions * kDim / 2 * 4));
    const int64_t bytes = kPositions * kKvHeads * kDim * 4;
    layer.attention = {zeros(bytes), zeros(bytes), 0, kPage, kHeads, kKvHeads, kDim, kDim, 0, 0, 0.125, 0};
  }
  Decoder decoder{};
  decoder.layers = layers.data();
  decoder.num_layers = kLayers;
  decoder.hidden = kHidden;
  decoder.intermediate = kInner;
  decoder.rotary = kDim;
  decoder.embedding = matrix(kVocabulary, kHidden);
  decoder.embedding_scale = decoder.residual_scale = decoder.logit_scale = 1;
  decoder.norm = norm();
  decoder.head = decoder.embedding;

  std::vector<int32_t> ids(size_t(tokens), 3), positions, table;
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < tokens; ++i) {
    positions.push_back(int32_t(context + i));
    slots.push_back(context + i);
  }
  for (int32_t page = 0; page < kPositions / kPage; ++page) table.push_back(page);
  const int32_t starts[] = {0, int32_t(tokens)}, contexts[] = {int32_t(context)};
  const int64_t order[] = {0}, sample[] = {tokens - 1};
  const Plan plan = {starts, contexts, table.data(), slots.data(), order, nullptr, int64_t(table.size()), 1, tokens, 1};
  std::vector<float> logits(kVocabulary);
  const DecoderStep step = {ids.data(), positions.data(), sample, 1, logits.data(), &plan};
  return run(&decoder, &step);
}
