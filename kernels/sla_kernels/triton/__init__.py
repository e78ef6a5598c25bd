"""Fused Triton kernels: routing, both branches and Proj, forward and backward.

Imported only where they are used; `backend` says what they support and joins them to the operator.
"""
