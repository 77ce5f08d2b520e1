"""Reports of prunings: statistics of each tensor and their sums; written, read, checked and shown.

file_names          the files beside the weights, by name
source_fields       the models that a folder was made from
fields              the report as a type: every field
tensor_statistics   statistics of one tensor, gathered row block by row block
outlier_rows        rows unlike the others
schema              the form of a report that was read, checked by its type
totals              sums over the tensors of a report
report              the report itself
evaluation_results  emp_eval.json
file                emp_report.json, written and read
shrink_report       emp_shrink.json: its fields, written and read
folder_files        the other files of the folder
prune_command       the command that gives the weights of a report
plotting            matplotlib, if it is installed
page/               the report as a page and as figures
card/               the model card
"""
