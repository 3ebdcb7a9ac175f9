"""Operators: pure functions from adapters to an adapter, computed module by module when the result is read.

>>> from loraloom.ops.merge import merge
>>> from loraloom.ops.interpolate import interpolate
>>> from loraloom.ops.prune import prune
"""
