"""The rule on rows of bit patterns, and packed rows: in plain Python, for CPUs and for GPUs.

Knows nothing of checkpoints or of transformers. `dispatch` is the way in.

errors             what a kernel can find wrong with a row, or with the machine
numbers            bf16, fp16 and fp32 as bit patterns, and the integers that hold these
layout             where the bytes of a packed row lie
whole_layout       where the bytes of a whole record lie: weights that all stay
rows               row blocks: what is asked of a backend, and what it returns
whole_tables       exponents by their codes in whole records, and back
held               packed weights that lie in memory, checked, to be multiplied from there
backend            what a backend can do with row blocks
checks             arguments are checked before a kernel reads them
counting           how many weights to keep, exactly
reference          the rule and the packed row in plain numpy and Python
whole_reference    weights that all stay, packed and unpacked in plain numpy
held_reference     products from packed weights in plain numpy
reference_backend  the reference, row by row over a row block
cpu/               kernels for CPUs, compiled by numba
cpu_whole          calls the kernels for CPUs on weights that all stay
cpu_arguments      what the kernels for CPUs take for formats, layouts and buffers
cpu_held           calls the kernels for CPUs on packed weights that are held
cpu_backend        calls the other kernels for CPUs
gpu_devices        which GPUs the kernels can run on
gpu_workspace      memory and a stream of a GPU for one thread
gpu/               kernels for GPUs, compiled by Triton
gpu_backend        calls the kernels for GPUs on arrays of the host
gpu_tensors        calls the kernels for GPUs on tensors that stay there
gpu_arguments      tensors are checked before a kernel for GPUs takes them
gpu_held           pruned rows that stay packed on a GPU, and are multiplied from there
gpu_held_whole     the same for whole records
dispatch           chooses the backend, and calls it
held_dispatch      the same for packed weights that stay in memory
histogram          magnitudes of a whole group counted, and the threshold they give
"""
