// From the output of the head to logits, and e to the power of their differences.
#pragma once

#include <cmath>

#include "device.cuh"

namespace fused_po {

constexpr float kInfinity = INFINITY;
constexpr float kLog2e = 1.4426950408889634f;

// e^shift. The shift comes from a subtraction in full float32: folding log2(e) into the logits first
// would round logits far from 0.
DEVICE float exp_shift(float shift) { return device::exp2_fast(device::product(shift, kLog2e)); }

// From raw head output to logits: z = scale u, where u, the logit before its scale, is x or tanh(inner x).
struct Transform {
  float scale;
  float inner;
  float slope;  // dz/dx, at 0 where there is a softcap
};

// u; `bend`: dz/dx over `slope`, 1 without a softcap
template <bool kSoftcap>
DEVICE float unscaled_logit(float x, const Transform& transform, float& bend) {
  if constexpr (kSoftcap) {
    const float a = device::product(x, transform.inner);
    // up to 0.9 a fit of tanh(a) / a in a^2, relative error 2e-8: beyond, what 1 - tanh|a| is off by weighs little
    constexpr float kFit[] = {0.00130395952f, -0.0068600555f, 0.0209041256f, -0.0537214912f, 0.133303598f, -0.333332121f};
    const float a2 = device::product(a, a), size = fabsf(a);
    float fit = kFit[0];
#pragma unroll
    for (int k = 1; k < 6; k++) fit = fmaf(fit, a2, kFit[k]);
    const float small = fmaf(device::product(fit, a2), a, a);
    // 2 e^(-2|a|), then 1 - tanh|a|, of which 1 - tanh^2 is made without a difference
    const float twice = device::exp2_fast(fmaf(size, -2.0f * kLog2e, 1.0f));
    const float rest = device::product(twice, device::reciprocal_fast(fmaf(0.5f, twice, 1.0f)));
    const float large = 1.0f - rest;
    const bool is_small = size < 0.9f;
    const float tanh = is_small ? small : device::with_sign(large, a);
    bend = is_small ? fmaf(-tanh, tanh, 1.0f) : fmaf(rest, large, rest);
    return tanh;
  } else {
    bend = 1.0f;
    return x;
  }
}

template <bool kSoftcap>
DEVICE float to_logit(float x, const Transform& transform, float& bend) {
  return device::product(unscaled_logit<kSoftcap>(x, transform, bend), transform.scale);
}

}  // namespace fused_po
