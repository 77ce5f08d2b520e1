"""One file a verb, named as the command: what `emp_llm` and the command line offer.

verify    prove that a folder is whole
report    the report of a model pruned before
inspect   what pruning would do
unpack    packed to dense
diff      how two checkpoints differ
prune     the straight line: checkpoint in, pruned checkpoint out
push      a folder to the Hub
evaluate  perplexity and answers (command: eval)
compare   EMP beside fair controls
"""
