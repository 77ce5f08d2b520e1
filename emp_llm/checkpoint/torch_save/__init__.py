"""Files that ``torch.save`` wrote, read without torch and without running their pickle.

names          the names that a pickle may refer to
pickle_reader  the pickle, read and not run
header         the tensors of a file and where they lie
file           the same as a file of dense tensors
"""
