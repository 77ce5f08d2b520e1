"""Whole tensors read from a checkpoint's files into memory: pruned, unpacked or still packed.

tensor_readers  tensors read row block by row block, on the CPU or on a GPU
read_ahead      reads several of them ahead, on all cores
"""
