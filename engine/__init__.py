"""What one process needs: data, optimizers, the loop, checkpoints, devices, tracking."""
