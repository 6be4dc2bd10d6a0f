#define FASTMETA_ISA_NAME baseline
#define FASTMETA_VECTOR_BYTES 16
#include "../executor/entry.h"
#include "isa.h"

namespace fastmeta {
const Kernels baseline_float = baseline::kernels<float>();
const Kernels baseline_double = baseline::kernels<double>();
}  // namespace fastmeta
