"""What a folder with weights becomes in memory, for each kind of model."""
