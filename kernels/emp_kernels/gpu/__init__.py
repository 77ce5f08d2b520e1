"""Triton kernels over rows of weights, and the functions that launch them on tensors of a device.

Legend: w_RC are bit patterns, R rows of C weights, int16 or int32, the integers that torch and
Triton have in common; a key is a pattern without its sign. One program works on a row,
tile by tile, each a power of two wide: rows may have any length, and one that fits the caches is
read from the device's memory once.
"""
