"""Atomic writing of files: each is whole on disk or not there at all.

atomic       small files: written under another name, flushed, renamed
checksum     checksums of tensors, named by their algorithm
direct_file  large files, written past the page cache by many threads
placed_file  such a file, whose places are given out in order, and its name at the end
"""
