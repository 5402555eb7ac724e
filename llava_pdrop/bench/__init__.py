"""What a training step and a prompt take, measured with random weights."""
