"""Kernels for GPUs over rows of weights, and the functions that launch them on torch's tensors.

common           keys, exact magnitudes and tiles
search           the k-th largest key of a row
decide           sums and count of a row, and which of its weights stay
histogram        bit patterns counted
launching        the rule as tensors, and a second launch for counts that float64 cannot decide
prune_kernel     the kernel that prunes rows
prune            launches it
look_back        where a row's record begins, learned from the rows before it
pack_sections    the sections of a packed record, written
pack_kernel      the kernel that packs rows
pack             launches it
unpack_parts     the sections of a packed record, read
unpack_kernel    the kernel that unpacks rows of any layout
unpack_bytes     the kernel that unpacks rows whose values are bytes, four weights at a time
unpack_launch    launches one of the two
unpack           has a row block unpacked
multiply_kernel  the kernels that multiply rows with a few tokens
multiply         launches one of them
whole_parts      a tile of whole records, read
whole_kernel     the kernels that check, decode and multiply whole records
whole            launches them

Legend: w_RC are bit patterns, R rows of C weights, as int16 or int32, the integer dtypes that torch
and Triton share; a key is a pattern without its sign bit. One program works on a row, *tile* by
tile, each a power of two of weights: so rows may have any length, and a row that fits the caches is
read from the device's memory only once.
"""
