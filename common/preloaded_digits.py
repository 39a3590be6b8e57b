"""The digits, loaded once in the fork server: its ranks share them."""

import gc
import signal

import torch

from common import datasets

before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in preloaded.py
threads = torch.get_num_threads()
torch.set_num_threads(1)  # more would start OpenMP's, which do not survive a fork
datasets.digits()
torch.set_num_threads(threads)
gc.freeze()
signal.signal(signal.SIGINT, before)
