// The Python module: pointers come as integers, 0 stands for one that is not there. No torch header, so that one build
// serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rows.h"

#ifndef FUSED_PO_MODULE
#define FUSED_PO_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

fused_po::Logits logits(uintptr_t x, int dtype, int64_t rows, int64_t width, int64_t stride, uintptr_t labels,
                        uintptr_t temperatures, double temperature, double softcap, double logit_scale, int64_t start,
                        int64_t stop) {
  return {at<const void>(x), dtype,       rows,    width,       stride, at<const int64_t>(labels),
          at<const float>(temperatures), temperature, softcap, logit_scale, start,  stop};
}

void row_stats(uintptr_t x, int dtype, int64_t rows, int64_t width, int64_t stride, uintptr_t labels,
               uintptr_t temperatures, double temperature, double softcap, double logit_scale, int64_t start,
               int64_t stop, unsigned outputs, uintptr_t partials, int device, uintptr_t stream) {
  const auto given = logits(x, dtype, rows, width, stride, labels, temperatures, temperature, softcap, logit_scale,
                            start, stop);
  fused_po::row_stats(given, outputs, at<float>(partials), device, at<void>(stream));
}

void row_softmax(uintptr_t x, int dtype, int64_t rows, int64_t width, int64_t stride, uintptr_t out, int out_dtype,
                 int64_t out_stride, uintptr_t labels, uintptr_t temperatures, double temperature, double softcap,
                 double logit_scale, int64_t start, int64_t stop, unsigned outputs, uintptr_t partials, int device,
                 uintptr_t stream) {
  const auto given = logits(x, dtype, rows, width, stride, labels, temperatures, temperature, softcap, logit_scale,
                            start, stop);
  fused_po::row_softmax(given, {at<void>(out), out_dtype, out_stride}, outputs, at<float>(partials), device,
                        at<void>(stream));
}

void row_grad(uintptr_t x, int dtype, int64_t rows, int64_t width, int64_t stride, uintptr_t out, int out_dtype,
              int64_t out_stride, uintptr_t labels, uintptr_t temperatures, double temperature, double softcap,
              double logit_scale, int64_t start, int64_t stop, uintptr_t anchors, uintptr_t c, uintptr_t e, uintptr_t l,
              int device, uintptr_t stream) {
  const auto given = logits(x, dtype, rows, width, stride, labels, temperatures, temperature, softcap, logit_scale,
                            start, stop);
  fused_po::row_grad(given, {at<void>(out), out_dtype, out_stride}, at<const float>(anchors),
                     {at<const float>(c), at<const float>(e), at<const float>(l)}, device, at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(FUSED_PO_MODULE, module) {
  module.doc() = "Row kernels of fused_po on raw pointers; fused_po.kernels.cuda is the interface for tensors.";
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("row_stats", &row_stats, release, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("width"),
             py::arg("stride"), py::arg("labels"), py::arg("temperatures"), py::arg("temperature"), py::arg("softcap"),
             py::arg("logit_scale"), py::arg("start"), py::arg("stop"), py::arg("outputs"), py::arg("partials"),
             py::arg("device"), py::arg("stream"));
  module.def("row_softmax", &row_softmax, release, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("width"),
             py::arg("stride"), py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"), py::arg("labels"),
             py::arg("temperatures"), py::arg("temperature"), py::arg("softcap"), py::arg("logit_scale"),
             py::arg("start"), py::arg("stop"), py::arg("outputs"), py::arg("partials"), py::arg("device"),
             py::arg("stream"));
  module.def("row_grad", &row_grad, release, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("width"),
             py::arg("stride"), py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"), py::arg("labels"),
             py::arg("temperatures"), py::arg("temperature"), py::arg("softcap"), py::arg("logit_scale"),
             py::arg("start"), py::arg("stop"), py::arg("anchors"), py::arg("c"), py::arg("e"), py::arg("l"),
             py::arg("device"), py::arg("stream"));
  module.def("device_count", &fused_po::device_count, "Visible GPUs, 0 without a driver.");
  module.def("architectures", &fused_po::architectures, "Architectures with machine code in this build.");
  module.def("build_info", &fused_po::build_info, "What this build was made with.");
}
