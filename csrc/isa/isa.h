// The executors that were compiled in, one pair an instruction set.
#pragma once

#include "../program.h"

namespace fastmeta {
extern const Kernels baseline_float, baseline_double;
#ifdef FASTMETA_X86
extern const Kernels avx2_float, avx2_double;
extern const Kernels avx512_float, avx512_double;
#endif
}  // namespace fastmeta
