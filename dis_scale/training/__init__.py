"""Training one model: the loop, DeepSpeed, resume points, averages, throughput."""
