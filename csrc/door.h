// The prepared call behind fastmeta/inner_loop/door.py.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmeta {

void bind_door(pybind11::module_& m);

}  // namespace fastmeta
