"""Algorithms: what dW is for a set of factors. One file a member, mathematics only."""
