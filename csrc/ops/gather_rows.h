// Rows of a table of bytes by number, as floats: out[i, j] = table[rows[i], j] / divisor.
#pragma once

#include <cstdint>

namespace fastmeta {

// table [M, W] bytes, rows [n] with values in [0, M), out [n, W] floats. The work is shared by
// `threads` threads, each taking a run of rows; the result does not depend on how many.
void gather_rows(const std::uint8_t* table, std::int64_t width, const std::int64_t* rows,
                 std::int64_t n, float divisor, float* out, int threads);

}  // namespace fastmeta
