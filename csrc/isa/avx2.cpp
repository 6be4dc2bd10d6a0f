#define FASTMETA_ISA_NAME avx2
#define FASTMETA_VECTOR_BYTES 32
#include "../executor/entry.h"
#include "isa.h"

namespace fastmeta {
const Kernels avx2_float = avx2::kernels<float>();
const Kernels avx2_double = avx2::kernels<double>();
}  // namespace fastmeta
