// Products with weights of four bits, and of bytes, alone, for tests of matrices, which compile this with no kind of model.

#include "decoder.cpp"

// sums (rows, groups * lanes) of rows (rows, inputs) with a whole matrix, up to so many rows at a time and as many groups
// of outputs as there is code for.
extern "C" void product(const Matrix *matrix, const float *rows, int64_t count, int64_t most_rows, float *sums) {
  const int64_t bundles = matrix->inputs / kBundle, groups = (matrix->outputs + kLanes - 1) / kLanes;
  const int64_t stride = matrix->format ? matrix->format->stride : matrix->inputs * kLanes;
  std::vector<Bundle> entering(size_t(count * bundles));
  for (int64_t i = 0; i < count * bundles; ++i) {
    Vec x[kBundle / kLanes];
    for (int part = 0; part < kBundle / kLanes; ++part) x[part] = load<Vec>(rows + i * kBundle + part * kLanes);
    fill(&entering[size_t(i)], x, true);
  }
  for (int64_t row = 0, some; row < count; row += some) {
    some = std::min<int64_t>({count - row, most_rows, rows_of<Int4>()});
    for (int64_t group = 0, cols; group < groups; group += cols) {
      cols = cols_of<Int4>(int(some));
      while (cols > groups - group) cols /= 2;
      const auto multiply = !matrix->format            ? bundle_products<BundledInt8>.of[some][cols]
                            : matrix->format->bits == 4 ? bundle_products<Int4>.of[some][cols]
                            : matrix->format->group < kBundle ? bundle_products<FineInt8>.of[some][cols]
                                                        : bundle_products<GroupedInt8>.of[some][cols];
      multiply(&entering[size_t(row * bundles)], bundles, static_cast<const char *>(matrix->weights) + group * stride, stride,
               matrix->format, bundles, sums + (row * groups + group) * kLanes, groups * kLanes, 0);
    }
  }
  for (int64_t i = 0; i < count * groups * kLanes; ++i) sums[i] *= matrix->scales[i % (groups * kLanes)];
}
