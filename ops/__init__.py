"""What the model computes with."""
