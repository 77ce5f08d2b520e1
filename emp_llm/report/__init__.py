"""What a pruning did to every tensor: counted, summed, written, read again and shown.

file_names          the files beside the weights, by name
tensor_statistics   statistics of one tensor, gathered block by block
outlier_rows        rows unlike the others
schema              the form of a report, checked
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
