"""Greedy non-maximum suppression."""
