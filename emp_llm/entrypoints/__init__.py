"""The commands as functions, one file each: what `emp_llm` and the command line offer.

verify              check that a folder is whole, and what pruning its source gives
report              the report of a model pruned before
inspect             what pruning would do
unpack              packed to dense
diff                how two checkpoints differ
prune               the main path: checkpoint in, pruned checkpoint out
pack                the same without pruning
structures          what a model has that can become fewer
shrink              a smaller ordinary model, with fewer of its parts
push                upload a folder to the Hub
evaluate            perplexity and zero-shot accuracy (command: eval)
generate            a text that a model writes, with its speed and memory
compare             EMP beside controls that keep as many weights
compare_structures  fewer structures of one kind, by scores and by controls (command: compare)
"""
