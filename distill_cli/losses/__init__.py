"""Losses of the student: divergences from the teacher's top-k, and the fused head that feeds them."""
