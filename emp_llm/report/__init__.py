"""What a pruning did to every tensor: counted, summed, written, read again and shown.

file_names          the files beside the weights, by name
fields              the report as a type: every field
tensor_statistics   statistics of one tensor, gathered row block by row block
outlier_rows        rows unlike the others
schema              the form of a report that was read, checked by its type
totals              sums over tensors, in one place
report              the report itself
evaluation_results  emp_eval.json
file                emp_report.json, written and read
folder_files        the other files of the folder
prune_command       the command that makes a report again
plotting            matplotlib, if it is installed
page/               the report as a page and as figures
card/               the model card
"""
