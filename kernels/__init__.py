"""Kernels written in Triton; installed as ``fastmeta.kernels``.

A module here is imported only when its backend is asked for, so that ``import fastmeta``
never needs Triton.
"""
