"""Atomic writing of files: each is whole on disk or not there at all.

atomic       small files: written under another name, flushed, renamed
checksum     checksums of tensors, named by their algorithm
direct_file  large files, written past the page cache by many threads
"""
