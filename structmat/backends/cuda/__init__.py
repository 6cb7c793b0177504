"""What the GPU backends share: strides, schedules, sources of kernels, costs. Nothing here imports CuPy or torch."""
