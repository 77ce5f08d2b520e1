"""What a run works with: threads, processes, GPUs and progress. Knows nothing of checkpoints.

quiet          other libraries kept quiet: logging, bars, warnings
progress       reporting how far long work is
launcher       who takes part: torchrun, accelerate launch or srun
team           the processes of a run; here, a single one
rank_store     values that ranks exchange
ranks          several processes that work together
gpu_gain       the seconds a GPU would save
devices        what the threads of a run work on
device_trial   whether the kernels run on a GPU
device_choice  the GPUs that were asked for, or are worth it
pipeline       pieces of work on several threads, with one order of results
workers        threads, devices, ranks and progress of a run
"""
