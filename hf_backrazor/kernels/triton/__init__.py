"""The primitives for GPUs, in Triton. Each module has what the module of the same name in `kernels` has.

They are imported when a CUDA tensor arrives, never before. Sums that the CPU's primitives make in one order are made in
another here, so what is stored is the same to the bit, and what is a sum to rounding. No call waits for the device.
"""
