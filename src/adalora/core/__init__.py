"""The method, on torch alone: triplets, importance, orthogonality, schedule, policy, allocator."""
