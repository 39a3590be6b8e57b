"""The digits, loaded once in the fork server: its ranks share them."""

import gc

import torch

from common import datasets

_threads = torch.get_num_threads()
torch.set_num_threads(1)  # more would start OpenMP's, which do not survive a fork
datasets.digits()
torch.set_num_threads(_threads)
gc.freeze()
