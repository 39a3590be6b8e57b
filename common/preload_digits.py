"""A fork server imports this to load the digits, which its ranks then share."""

import torch

from common import datasets

threads = torch.get_num_threads()
torch.set_num_threads(1)  # more would start OpenMP's, which do not survive a fork
datasets.digits()
torch.set_num_threads(threads)
