"""Bases: which modules a base model has, in which order, under which names. Data files plus the code that reads them."""
