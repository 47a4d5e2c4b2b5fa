"""What the student minimises: divergences from the teacher's top-k, and the fused head that feeds them."""
