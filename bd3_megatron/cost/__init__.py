"""Cost counts without torch: FLOPs, memory, activations, traffic, parameters by rank."""
