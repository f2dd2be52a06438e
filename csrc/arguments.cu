// From the host interface to kernel arguments.
#include <limits>

#include "launch.h"

namespace fused_po {

namespace {

int element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

void require(bool holds, const std::string& what, const char* reason) {
  if (!holds) throw std::runtime_error(what + ": " + reason);
}

}  // namespace

std::string describe(const char* kernel, const Logits& logits, const Capabilities& gpu) {
  static const char* const names[] = {"float32", "bfloat16", "float16"};
  const bool known = logits.dtype >= kFloat32 && logits.dtype <= kFloat16;
  return std::string(kernel) + " (" + std::to_string(logits.rows) + " rows, classes " + std::to_string(logits.start) +
         " to " + std::to_string(logits.stop) + ", " + (known ? names[logits.dtype] : "unknown element type") +
         ") on compute capability " + std::to_string(gpu.major) + "." + std::to_string(gpu.minor);
}

RowArgs common_args(const Logits& logits, const std::string& what) {
  require(logits.dtype >= kFloat32 && logits.dtype <= kFloat16, what, "element types are float32, bfloat16 and float16");
  require(logits.stop - logits.start <= logits.width, what, "there are fewer columns than classes");
  // column numbers are 32 bits, with room for one pass of a block beyond the row
  require(logits.start <= logits.stop && logits.width <= (1 << 30), what, "a row has 0 to 2^30 columns");
  require(logits.rows >= 0 && logits.rows <= std::numeric_limits<int32_t>::max() / 16, what, "too many rows");
  RowArgs args{};
  args.x = static_cast<const unsigned char*>(logits.x);
  args.labels = logits.labels;
  args.temperatures = logits.temperatures;
  args.rows = logits.rows;
  args.x_stride = logits.stride * element_bytes(logits.dtype);
  args.start = logits.start;
  args.inverse = static_cast<float>(1.0 / logits.temperature);
  args.softcap = static_cast<float>(logits.softcap);
  args.logit_scale = static_cast<float>(logits.logit_scale);
  args.width = static_cast<int>(logits.stop - logits.start);
  args.out_width = static_cast<int>(logits.width);
  args.tiles = 1;
  args.x_code = logits.dtype;
  return args;
}

void add_output(RowArgs& args, const Logits& logits, const Output& out, const std::string& what) {
  require(out.dtype >= kFloat32 && out.dtype <= kFloat16, what, "element types are float32, bfloat16 and float16");
  const bool in_place = logits.rows > 0 && out.data == logits.x;
  require(!in_place || (out.dtype == logits.dtype && out.stride == logits.stride), what,
          "in place, the output has the type and stride of the logits");
  args.out = static_cast<unsigned char*>(out.data);
  args.out_stride = out.stride * element_bytes(out.dtype);
  args.out_code = out.dtype;
}

int wanted_partials(unsigned outputs) {
  return (outputs & kEntropy ? kWeighted : 0) | (outputs & kLogSumSqProbs ? kSquare : 0) |
         (outputs & kMeanLogit ? kTotal : 0) | (outputs & kIsTop1 ? kBefore : 0);
}

}  // namespace fused_po
