"""What a run will take, before it: parameters, memory, FLOPs."""
