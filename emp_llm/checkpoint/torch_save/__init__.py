"""Files that ``torch.save`` wrote, read without torch and without running their pickle.

names            the names that a pickle may refer to
pickled_tensors  the storages and tensors that a pickle describes
pickle_reader    the pickle, read and not run
state_dict       the tensors by name, which it must hold
contents         what both kinds of file hold
range_file       a file whose bytes are had by range
zip_file         files since torch 1.6
legacy_file      files before
header           the tensors of a file and where they lie
file             the same as a file of dense tensors
"""
