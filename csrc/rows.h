// The row kernels for C++ callers: raw pointers, shapes, strides and a stream, no header of CUDA or torch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fused_po {

// element types as callers write them
enum Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// statistics as bits of `outputs`, in the order of fused_po.stats.STATISTICS
enum Statistic : unsigned {
  kLogp = 1u << 0,
  kEntropy = 1u << 1,
  kLse = 1u << 2,
  kMeanLogit = 1u << 3,
  kIsTop1 = 1u << 4,
  kLogSumSqProbs = 1u << 5,
};

// raw head outputs with labels; strides in elements
struct Logits {
  const void* x;  // (rows, width), element type `dtype`
  int dtype;
  int64_t rows;
  int64_t width;  // columns of x and out, padding included
  int64_t stride;
  const int64_t* labels;      // (rows,); negative: ignored
  const float* temperatures;  // (rows,), or null: `temperature` for all
  double temperature;
  double softcap;  // 0: none
  double logit_scale;
  int64_t start;  // classes [start, stop) are the leading columns
  int64_t stop;
};

struct Output {
  void* data;  // (rows, width), element type `dtype`; may be x
  int dtype;
  int64_t stride;
};

// null stands for a coefficient that is exactly 0
struct Coefficients {
  const float* c;  // (rows,)
  const float* e;  // (rows,)
  const float* l;  // (rows,)
};

// Each call enqueues on `stream` of `device` and throws std::runtime_error with the reason where it cannot.
void row_stats(const Logits& logits, unsigned outputs, float* partials /* (7, rows) */, int device, void* stream);
void row_softmax(const Logits& logits, const Output& out, unsigned outputs, float* partials /* (7, rows) */, int device,
                 void* stream);
void row_grad(const Logits& logits, const Output& out, const float* anchors /* (4, rows) */, const Coefficients& given,
              int device, void* stream);

// visible devices; 0 where there is no driver
int device_count();
// architectures with machine code in this build, such as "sm_90"
std::vector<std::string> architectures();
std::map<std::string, std::string> build_info();

}  // namespace fused_po
