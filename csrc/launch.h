// What the host side of every kernel shares: arguments, dispatch over element types, launch with checks.
#pragma once

#include <stdexcept>
#include <string>

#include "plan.h"
#include "rows.cuh"

#ifdef FUSED_PO_FIBERS
#include "launch_fibers.h"
#else

#include "runtime.h"

namespace fused_po {

using Kernel = void (*)(RowArgs);

inline int code_of(Kernel kernel) { return kernel_code(reinterpret_cast<const void*>(kernel)); }

inline bool fits(Kernel kernel, const Geometry& geometry) {
  return kernel_fits(reinterpret_cast<const void*>(kernel), geometry);
}

inline void launch(Kernel kernel, const Geometry& geometry, const RowArgs& args, void* stream, const std::string& what) {
  launch_kernel(reinterpret_cast<const void*>(kernel), geometry, &args, stream, what);
}

}  // namespace fused_po

#endif  // FUSED_PO_FIBERS

namespace fused_po {

// "row_stats (rows 8, classes 1000, bfloat16) on compute capability 9.0", for errors
std::string describe(const char* kernel, const Logits& logits, const Capabilities& gpu);

// the arguments that every kernel reads; throws where they make no sense
RowArgs common_args(const Logits& logits, const std::string& what);
void add_output(RowArgs& args, const Logits& logits, const Output& out, const std::string& what);

// partials to make for the statistics asked for
int wanted_partials(unsigned outputs);

inline int64_t row_vectors(const Logits& logits) {
  return ceil_div(logits.stop - logits.start, logits.dtype == kFloat32 ? kColumns<Float32> : kColumns<BFloat16>);
}

// calls `body` with the element type and whether there is a softcap, as types
template <class Body>
void dispatch(const Logits& logits, Body body) {
  const auto with_element = [&](auto element) {
    if (logits.softcap != 0) {
      body(element, std::true_type{});
    } else {
      body(element, std::false_type{});
    }
  };
  switch (logits.dtype) {
    case kFloat32:
      return with_element(Float32{});
    case kBFloat16:
      return with_element(BFloat16{});
    default:
      return with_element(Float16{});
  }
}

}  // namespace fused_po
