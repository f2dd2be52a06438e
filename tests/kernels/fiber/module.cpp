// What is not in the sources of the extension: its interface comes from csrc/bindings.cpp as it is.
#include "launch.h"

namespace fused_po {

int device_count() { return 5; }
std::vector<std::string> architectures() { return {"fibers"}; }

// of the last launch, and how much the host side has asked
std::map<std::string, std::string> build_info() {
  return {{"cluster", std::to_string(last_launch.cluster)},
          {"threads", std::to_string(last_launch.threads)},
          {"blocks", std::to_string(last_launch.blocks)},
          {"shared", std::to_string(last_launch.shared)},
          {"questions", std::to_string(questions)}};
}

}  // namespace fused_po

// here and below for ctypes
extern "C" void fused_po_configure(unsigned long long seed, int planted) {
  fused_po::fiber::executor.seed = seed;
  fused_po::fiber::planted = planted;
}

// launches are noted from now on, or run; a note stays until others are wanted
extern "C" void fused_po_note(int wanted) {
  fused_po::note.wanted = wanted != 0;
  if (wanted) fused_po::note.kernel.clear();
}
extern "C" const char* fused_po_noted_kernel() { return fused_po::note.kernel.c_str(); }
extern "C" const void* fused_po_noted_arguments() { return &fused_po::note.args; }
extern "C" int fused_po_argument_bytes() { return sizeof(fused_po::RowArgs); }
