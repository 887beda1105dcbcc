"""What a YAML file may say of a model."""
