"""Files that ``torch.save`` wrote, read without torch and without running their pickle.

names            the names that a pickle may refer to
pickled_tensors  the storages and tensors that a pickle describes
pickle_reader    the pickle, read and not run
state_dict       the tensors by name, which the pickle must hold
contents         tensors and storages, of either kind of file
range_file       a file object over byte ranges
zip_file         files since torch 1.6
legacy_file      files before torch 1.6
header           the tensors of a file and where they lie
file             a file opened for reading, each tensor dense
"""
