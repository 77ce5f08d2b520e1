"""The output folder of a run: whole, or not there; resumed by the same command.

meta_llama_files  config and tokenizer of a checkpoint in Meta's format
sidecar_files     index, config and other files beside the weights
journal           what a run has finished
run_description   what the bytes of a result depend on
publication       moves files to their place in one step
output_folder     the folder itself: staged, resumed, published
"""
