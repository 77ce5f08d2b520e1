"""The files that a pruned folder holds beside its weights, by name."""

__all__ = [
    "CARD_NAME",
    "EVAL_NAME",
    "FIGURE_NAME",
    "NOT_AS_WRITTEN",
    "OF_THEIR_OWN",
    "REPORT_NAME",
    "SHRINK_FIGURE_NAME",
    "SHRINK_REPORT_NAME",
    "SHRUNKEN_NOT_AS_WRITTEN",
]

CARD_NAME = "README.md"
REPORT_NAME = "emp_report.json"
FIGURE_NAME = "emp_report.svg"
EVAL_NAME = "emp_eval.json"
SHRINK_REPORT_NAME = "emp_shrink.json"
SHRINK_FIGURE_NAME = "emp_shrink.svg"
"""These two have names of their own: they stay with a smaller model when it is pruned as well."""

OF_THEIR_OWN = (CARD_NAME, FIGURE_NAME, REPORT_NAME, EVAL_NAME)
"""Files that a report does not describe: itself, and what people, `eval` and `push` may rewrite."""

NOT_AS_WRITTEN = (
    "the folder is not as it was written; download, prune or pack it again, or delete "
    f"{REPORT_NAME} if another model was saved over it"
)
"""The remedy where a report is not that of the files beside it."""

SHRUNKEN_NOT_AS_WRITTEN = (
    "the folder is not as it was written; download or shrink it again, or delete "
    f"{SHRINK_REPORT_NAME} if another model was saved over it"
)
"""The same of a model that was shrunken."""
