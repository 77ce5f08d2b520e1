"""All rows of the paper, in the order of its sections: `make paper`."""

import attention
import convolutional
import fully_connected
import kan
import photographs
import vision_transformer
from row import run

ROWS = (
    fully_connected.ROW,
    convolutional.ROW,
    kan.ROW,
    photographs.ROW,
    attention.ROW,
    vision_transformer.ROW,
)

if __name__ == "__main__":
    run(*ROWS)
