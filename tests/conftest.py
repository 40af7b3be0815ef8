"""One thread for all tests: tiny tensors, and the same order of additions everywhere."""

import torch

torch.set_num_threads(1)
