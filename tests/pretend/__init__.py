"""A pretend CUDA device, for tests of code for GPUs on a machine without one.

Its tensors say `cuda:0` and are CUDA tensors to torch: dispatch, autograd and autocast treat them so, and what they
hold is in the CPU's memory, where the CPU's kernels work on it (`device.cpp`). What torch has for CUDA alone has a
stand-in that checks what the real one asks of its operands (`kernels.py`); `torch.cuda` is replaced as far as it is
used (`cuda_api.py`). `observer.py` counts launches, and what makes the host wait for the device, by source line.

It finds operands on two devices, host-device synchronisations, memory that is read before it is written (it holds
NaN), work that a CUDA graph may not contain, and operands that a kernel of CUDA would refuse, where its stand-in says
so. It does not find races between streams, a lack of memory, rounding of the GPU's kernels, what a compiler makes of a
function (`torch.compile` returns it unchanged), or anything about time and several GPUs.

    python -c "from pathlib import Path; from pretend.build import build; build(Path('FOLDER'))"
    python -m pretend.command FOLDER/libpretend.so FOLDER train --device cuda ...
"""
