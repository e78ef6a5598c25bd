"""Figures and tables, made from results/ and nothing else."""
