#define FASTMETA_ISA_NAME avx512
#define FASTMETA_VECTOR_BYTES 64
#include "../executor/entry.h"
#include "isa.h"

namespace fastmeta {
const Kernels avx512_float = avx512::kernels<float>();
const Kernels avx512_double = avx512::kernels<double>();
}  // namespace fastmeta
