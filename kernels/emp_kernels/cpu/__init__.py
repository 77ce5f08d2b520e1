"""The kernels for CPUs, compiled by numba when they are first used and cached on disk.

code_cache    keeps compiled kernels apart for each state of the sources
status        how a kernel ended
simd          vector instructions that numba has no name for
vectors       vector types, and the steps on them
shuffles      steps that take lanes from fixed places
avx512        steps on vectors that only some CPUs know
select        sums, k-th largest key and kept weights of one row
decide        which weights of a row stay
histogram     bit patterns counted
pack          rows to packed records
unpack        packed records to rows
team          lets a kernel run on several threads
floats        bit patterns to float32 and back
hold          checks packed rows that are to be held in memory
held_job      what a job says of held rows
held_rows     products of held rows, and these unpacked, on any CPU
held_record   the parts of the record of a held row
byte_planes   kept weights of bf16 decoded as bytes
held_planes   held rows of bf16 decoded, and spread over their columns
held_bf16     products of held rows of bf16, and these unpacked, with AVX-512
lanes         kept weights of any format decoded, 16 at a time
dense_tile    products of rows in scratch
held_lanes    products of held rows of any format, and these unpacked, with AVX-512
masks         scores to masks, and rows packed by given masks
sweep         bytes and sums of rows at many numbers of kept weights
turn          transposes matrices
bit_steps     steps on stripes of bits that numba has no name for
whole_pack    weights that all stay to whole records
whole_check   checks whole records
whole_job     what a job says of whole records that are held, and where their parts are
whole_unpack  whole records to weights, on any CPU
whole_steps   steps of the same with AVX-512
whole_simd    the same with AVX-512, and products of one token
held_whole    products of whole records that are held, and these unpacked
"""

from pathlib import Path

from emp_kernels.cpu.code_cache import keep_apart

_FOLDER = Path(__file__).parent

keep_apart(_FOLDER, [*_FOLDER.glob("*.py"), *_FOLDER.parent.glob("*.py")])
