"""Retrofit a pretrained Llama with Dynamic Memory Compression or Sparsification, or pretrain one: `dmc train` for torchrun.

    torchrun train.py --target-cr 4                              # the small base model, on this machine
    torchrun --nproc-per-node 2 train.py --config configs/quickstart.yaml parallel.tensor=2
    python train.py --help                                       # all flags and keys of the configuration

The program is `dmc.commands.train`.
"""

import sys

from dmc.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
