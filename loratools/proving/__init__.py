"""Proofs that an output is what its receipt, or the maths, says; nothing here makes anything."""
