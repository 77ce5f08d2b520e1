"""Text that a model generates, with the speed and the memory that this takes.

options   the options of a generation
results   what was generated and measured; where two texts part
prompt    a prompt as a model's tokens
listener  who hears of the text as it is generated
stream    hands on the text, and keeps the times at which tokens come
run       a model loaded, its text, its speed and memory
apart     the same in a process of its own
"""
