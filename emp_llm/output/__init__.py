"""The output folder of a run: whole, or not there; resumed by the same command.

meta_llama_files  config and tokenizer of a checkpoint in Meta's format
sidecar_files     index and config
journal           what a run has finished
carried_files     files that travel with the weights, copied byte for byte
run_description   what the bytes of a result depend on
publication       moves files to their place in one step
overlap           refuses an output folder that overlaps the source
output_folder     the folder itself: staged, resumed, published
"""
