"""What a run works with: threads, processes, GPUs and progress. Knows nothing of checkpoints.

once            a value that the first thread to need it computes
memory          the memory that this process takes
module_process  what a process of our own that is asked a question takes
quiet           silences other libraries: logging, progress bars, warnings
progress        progress of long work
launcher        who takes part: torchrun, accelerate launch or srun
team            the processes of a run; here, a single one
rank_store      values that ranks exchange
ranks           several processes that work together
gpu_gain        the seconds a GPU would save
devices         GPUs or the CPU, for the threads of a run
device_trial    whether the kernels run on a GPU
device_choice   the GPUs that were asked for, or that save time
pipeline        pieces of work on several threads; results do not depend on their number
workers         threads, devices, ranks and progress of a run
"""
