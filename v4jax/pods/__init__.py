"""What a job would take on a slice of TPUs or a machine of GPUs, before one is rented."""
